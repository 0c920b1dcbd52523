"""What installers print, taken from pip 23.2, uv 0.13 and older ones, and what people get of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopmux_launcher import tools
from loopmux_launcher.progress import Progress

MUCH = 1 << 40

PIP_CONFLICT = """
Processing ./w/cc-1.0-py3-none-any.whl (from aa->-r r3.txt (line 3))
ERROR: Cannot install -r r3.txt (line 3) and -r r3.txt (line 4) \
because these package versions have conflicting dependencies.

The conflict is caused by:
    aa 1.0 depends on cc<2
    bb 1.0 depends on cc>=2

To fix this you could try to:
1. loosen the range of package versions you've specified
ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/en/latest/topics/dependency-resolution/
"""
UV_CONFLICT = """
Using Python 3.11.7 environment at: uve
error: No solution found when resolving dependencies
  cause: Because all versions of bb depend on cc>=2 and all versions of aa depend on cc<2, we can conclude that all
         versions of aa and all versions of bb are incompatible.
"""
OLD_UV_CONFLICT = """
  × No solution found when resolving dependencies:
  ╰─▶ Because cc<=1.0 is available and you require cc==9, we can conclude that your requirements are unsatisfiable.
"""
OLD_UV_UNREACHABLE = """
error: Failed to fetch: `http://127.0.0.1:9/simple/zzyy/`
  Caused by: Request failed after 3 retries
  Caused by: Connection refused (os error 111)
"""
PIP_UNREACHABLE = """
WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('<x object at 0x7f>: \
Failed to establish a new connection: [Errno 111] Connection refused')': /simple/zzyy/
ERROR: Could not find a version that satisfies the requirement zzyy (from versions: none)
ERROR: No matching distribution found for zzyy
"""
UV_UNREACHABLE = """
error: Request failed after 3 retries in 5.3s
  cause: Failed to fetch: https://nosuch.invalid/simple/zzyy/
  cause: dns error
  cause: failed to lookup address information: Name or service not known
"""
PIP_FULL = """
Installing collected packages: structlog, pyzmq, numpy, msgpack
ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device
"""
PIP_TAMPERED = """
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the package versions, \
please update the hashes. Otherwise, examine the package contents carefully; someone may have tampered with them.
    cc==1.0 from file:///w/cc-1.0-py3-none-any.whl (from -r h.txt (line 1)):
        Expected sha256 00e8
             Got        00e9
"""
UV_TAMPERED = """
error: Failed to download `cc==1.0`
  cause: Hash mismatch for `cc==1.0`

         Expected:
           sha256:00e8
"""
NO_ENSUREPIP = """
The virtual environment was not created successfully because ensurepip is not available.
"""


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (PIP_CONFLICT, ["aa 1.0 depends on cc<2; bb 1.0 depends on cc>=2"]),
        (UV_CONFLICT, ["No solution found", "all versions of aa depend on cc<2"]),
        (OLD_UV_CONFLICT, ["No solution found when resolving dependencies: Because cc<=1.0 is available"]),
        (OLD_UV_UNREACHABLE, ["could not be reached (Connection refused", "check the network", "simple/zzyy"]),
        (PIP_UNREACHABLE, ["could not be reached (Connection refused)", "check the network", "zzyy"]),
        (UV_UNREACHABLE, ["could not be reached (failed to lookup address", "check the network", "nosuch.invalid"]),
        (PIP_FULL, ["the disk is full", "/envs", "env prune", "$XDG_DATA_HOME"]),
        (PIP_TAMPERED, ["not the one that was locked", "cc==1.0 from", "Expected sha256 00e8", "Got 00e9"]),
        (UV_TAMPERED, ["not the one that was locked", "`cc==1.0`", "sha256:00e8"]),
        (NO_ENSUREPIP, ["ensurepip is not available", "python3-venv"]),
        ("", ["exit code 1"]),
    ],
)
def test_an_installers_reason_is_short_and_says_what_to_do(output: str, says: list[str]) -> None:
    found = tools.reason(output.splitlines(), 1, MUCH, Path("/envs"))
    for part in says:
        assert part in found
    hints = ("could not be reached", "the disk is full", "not the one that was locked", "python3-venv")
    assert [h for h in hints if h in found] == [h for h in hints if any(h in part for part in says)]
    assert len(found) < 1000
    assert "pip.pypa.io" not in found


def test_a_disk_without_room_is_the_reason_whatever_is_printed() -> None:
    assert "the disk is full, 0 MB are free at /envs" in tools.reason(["Error: Command '['python"], 1, 0, Path("/envs"))


def test_a_kill_is_told_as_such() -> None:
    assert "SIGKILL (out of memory, or killed by hand)" in tools.reason(["Collecting cc"], -9, MUCH, Path("/envs"))


def test_uv_makes_an_environment_by_itself_and_pip_is_put_into_one_that_is_empty() -> None:
    python, target = Path("/usr/bin/python3"), Path("/envs/e")
    [alone] = tools.Tool(Path("/uv")).create(python, target)
    assert (alone[:2], alone[-3:]) == (["/uv", "venv"], ["--python", str(python), str(target)])
    empty, pip = tools.Tool().create(python, target)
    assert (empty[0], empty[-2:]) == (str(python), ["--without-pip", str(target)])
    assert (pip[0], "ensurepip" in pip) == ("/envs/e/bin/python", True)


@pytest.mark.parametrize("uv", [None, Path("/uv")])
@pytest.mark.parametrize("locked", [False, True])
def test_what_is_installed_is_in_the_files_and_where_it_is_locked_nothing_else(uv: Path | None, locked: bool) -> None:
    command = tools.Tool(uv).install(Path("/envs/e/bin/python"), [Path("a"), Path("b")], locked=locked)
    assert command[0] == ("/uv" if uv else "/envs/e/bin/python")
    assert command[-4:] == ["-r", "a", "-r", "b"]
    assert ("--require-hashes" in command, "--no-deps" in command) == (locked, locked)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["Collecting torch==2.13.0 (from -r x (line 1))", "Processing /w/peft-1-py3.whl (from -r x)"],
         ["resolving torch==2.13.0 (1 so far)", "resolving peft-1-py3.whl (2 so far)"]),
        (["  Downloading transformers-5.whl (13.3 MB)"], ["downloading transformers-5.whl, 13.3 MB"]),
        (["  Downloading typer-0.29.2-py3-none-any.whl (121 kB)"], []),
        (["Installing collected packages: a, b, c"], ["installing 3 packages"]),
        (["Building wheel for x (pyproject.toml): started"], ["building x from source"]),
        (["Requirement already satisfied: y"], []),
        (["Resolved 9 packages in 2ms", "Downloading torch (200.1MiB)", " Downloaded torch",
          "Prepared 8 packages in 1s"],
         ["resolved 9 packages", "downloading torch, 200.1 MB", "downloaded torch", "installing 9 packages"]),
    ],
)  # fmt: skip
def test_lines_become_progress(lines: list[str], told: list[str], tmp_path: Path) -> None:
    found: list[str] = []
    progress = Progress(tmp_path, tmp_path / "tmp", found.append)
    for line in lines:
        progress.line(line)
    assert found == told


def test_between_lines_files_tell_how_far_it_is(tmp_path: Path) -> None:
    found: list[str] = []
    scratch, packages = tmp_path / "tmp" / "pip-unpack-x", tmp_path / "lib" / "python3.11" / "site-packages"
    scratch.mkdir(parents=True)
    (packages / "pip-23.dist-info").mkdir(parents=True)
    progress = Progress(tmp_path, tmp_path / "tmp", found.append)
    progress.line("  Downloading torch-2.whl (3.0 MB)")
    (scratch / "torch-2.whl").write_bytes(bytes(1_000_000))
    progress.tick()
    progress.line("Collecting b")
    progress.tick()  # of that nothing can be seen
    progress.line("Installing collected packages: a, b, c")
    (packages / "a-1.dist-info").mkdir()
    progress.tick()
    assert found.pop(2) == "resolving b (1 so far)"
    assert found[1::2] == ["downloading torch-2.whl, 1 of 3 MB", "installing 1 of 3 packages"]
