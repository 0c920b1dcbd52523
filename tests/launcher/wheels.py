"""Wheels made on the spot, so that environments are built without a network: tiny ones, and what the worker needs."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path


def write_wheel(folder: Path, name: str, version: str, requires: Sequence[str] = (), code: str = "") -> Path:
    """A wheel with one module of its name."""
    needs = "".join(f"Requires-Dist: {r}\n" for r in requires)
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    module = {f"{name}.py": f"__version__ = {version!r}\n{code}".encode()}
    return _write(folder, f"{name}-{version}", "py3-none-any", module, info)


def write_workers_needs(folder: Path) -> None:
    """Wheels of what the worker needs, put together from this environment's installed files."""
    for name in ("pyzmq", "msgpack", "structlog"):
        found = distribution(name)
        files = [f for f in found.files or () if ".." not in f.parts and f.suffix != ".pyc"]
        info = {n: found.read_text(n) or "" for n in ("METADATA", "WHEEL")}
        tag = next(line.removeprefix("Tag: ") for line in info["WHEEL"].splitlines() if line.startswith("Tag: "))
        modules = {str(f): Path(str(f.locate())).read_bytes() for f in files if ".dist-info" not in f.parts[0]}
        _write(folder, f"{name}-{found.version}", tag, modules, info)


def _write(folder: Path, stem: str, tag: str, modules: Mapping[str, bytes], info: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = {**modules, **{f"{stem}.dist-info/{name}": text.encode() for name, text in info.items()}}
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items())
    files[f"{stem}.dist-info/RECORD"] = (record + f"{stem}.dist-info/RECORD,,\n").encode()
    wheel = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
