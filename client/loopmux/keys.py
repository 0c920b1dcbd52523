"""Keys for tcp: files that hold one, and which ones a connection to a broker uses (CURVE)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from loopmux import folders
from loopmux.codec import build, plain, show
from loopmux.endpoints import beyond_this_host
from loopmux.errors import ConfigError

KEY_VARIABLE, SERVER_KEY_VARIABLE = "LOOPMUX_KEY", "LOOPMUX_SERVER_KEY"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LENGTH = 40
_BETWEEN = re.compile(r"[^0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]+")
"""What is not in Z85."""
_FORM = f"{_LENGTH} characters of Z85, as `loopmux keys show FILE` prints them"


@dataclass(frozen=True, slots=True)
class Key:
    """What a key file holds, as JSON. ``public`` and ``secret`` are Z85; who has ``secret`` is who it names."""

    name: str
    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A connection's key, and the public part of the broker's, which no other process can pretend to have."""

    key: Key
    server: str


def default_folder() -> Path:
    """``loopmux/keys`` in the user's folder of settings."""
    return folders.settings() / "loopmux" / "keys"


def check_name(name: str) -> None:
    """Refuse what is no name for a key.

    Raises:
        ValueError: says what was found and what was expected.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"found {show(name)}, expected up to 64 letters, digits, '.', '-' and '_', a letter or digit first"
        )


def file_named(text: str) -> Path:
    """The file whose name is given as a key's.

    Raises:
        ValueError: there is none, and the text may be a key itself; says so without the text.
    """
    path = os.path.expanduser(text)  # noqa: PTH111 - raises nothing, whoever ~name is
    known = os.path.exists(path)  # noqa: PTH110 - likewise, of whatever length
    if not known and any(len(piece) == _LENGTH for piece in _BETWEEN.split(text)):
        raise ValueError(
            f"found {len(text)} characters that name no file and may hold a key itself, expected the name of its file "
            "(`loopmux keys new NAME` makes one)"
        )
    return Path(path)


def to_bytes(part: str) -> bytes:
    """The 32 bytes of a part of a key.

    Raises:
        ValueError: it is none; says what was found (not the text: it may be a secret) and what was expected.
    """
    from zmq.utils import z85

    try:
        found = z85.decode(part) if len(part) == _LENGTH else b""
    except Exception:  # noqa: BLE001 - of several types, none of which says what it is about
        found = b""
    if not found:
        raise ValueError(f"found a text of {len(part)} characters that is no part of a key, expected {_FORM}")
    return found


def new(name: str, folder: Path) -> tuple[Path, Key]:
    """Make a key and write it to ``folder``, which is made where it is missing; nobody else can read either.

    Raises:
        ConfigError: no name for a key, a file of that name is there, or it cannot be written.
    """
    import json

    _needs_curve()
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(f"name: {error}") from error
    public, secret = (part.decode() for part in zmq.curve_keypair())
    key, path = Key(name, public, secret), folder / f"{name}.key"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(plain(key), indent=2) + "\n")
        except OSError:
            path.unlink()  # else it would be in the way of the next try
            raise
    except FileExistsError as error:
        raise ConfigError(f"{error.filename} is there already: choose another name or folder, or remove it") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    return path, key


def read(path: Path) -> Key:
    """The key of a file.

    Raises:
        ConfigError: it cannot be read, others can read it too, or it holds no key.
    """
    _needs_curve()
    make = "`loopmux keys new NAME` makes one"
    try:
        mode, text = path.stat().st_mode, path.read_text()
        key = _parsed(text)
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}; {make}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no key file: {error}; {make}") from error
    if mode & 0o077:
        raise ConfigError(
            f"{path} can be read by others (mode {mode & 0o777:o}), expected this user alone: chmod 600 {path}, and "
            "make a new key if somebody may have read it"
        )
    return key


def _parsed(text: str) -> Key:
    import json

    key = build(Key, json.loads(text), strict=True)
    check_name(key.name)
    to_bytes(key.secret)
    if zmq.curve_public(key.secret.encode()).decode() != key.public:
        raise ValueError("found a public part that does not belong to the secret one, expected those of one key")
    return key


def public_part(text: str) -> str:
    """A public part as it is given: itself, or a file that holds it, alone or in a key.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(text)
    try:
        if path.is_file():
            text = path.read_text().strip()
            if len(text) != _LENGTH:
                return read(path).public
        to_bytes(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"a broker's public key: {error}, or a file that holds them") from error
    return text


def credentials(endpoint: str, key: str | Path | None = None, server_key: str | None = None) -> Credentials | None:
    """What a connection to an endpoint shows: the key of the file ``key``, to the broker whose public part is given.

    Where they are None they are ``$LOOPMUX_KEY`` and ``$LOOPMUX_SERVER_KEY``. Without both a connection is in the
    clear, which it may be on this host; to an ipc endpoint it always is.

    Raises:
        ConfigError: only one of the two, neither for an endpoint that may be on another host, or one that is wrong.
    """
    if endpoint.startswith("ipc://"):
        return None
    file = key or os.environ.get(KEY_VARIABLE)
    server = server_key or os.environ.get(SERVER_KEY_VARIABLE)
    if file and server:
        _needs_curve()
        try:
            path = file_named(str(file))
        except ValueError as error:
            raise ConfigError(f"{endpoint}: key, ${KEY_VARIABLE}: {error}") from error
        return Credentials(read(path), public_part(server))
    if file or server or beyond_this_host(endpoint):
        found = f"${KEY_VARIABLE} alone" if file else f"${SERVER_KEY_VARIABLE} alone" if server else "neither"
        raise ConfigError(
            f"{endpoint}: found {found}, expected a key file (key=, ${KEY_VARIABLE}) and the broker's public key "
            f"(server_key=, ${SERVER_KEY_VARIABLE}): make a key with `loopmux keys new NAME`, have its public part "
            "entered into the broker's settings, and ask for that of the broker"
        )
    return None


def _needs_curve() -> None:
    """Keys need a libzmq that was built with them.

    Raises:
        ConfigError: this one was not.
    """
    if not zmq.has("curve"):
        raise ConfigError(
            f"libzmq {zmq.zmq_version()} of {zmq.__file__} has no CURVE, which keys need: install pyzmq from its "
            "wheels, or a libzmq with libsodium"
        )
