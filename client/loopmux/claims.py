"""The claim on an ipc path: a second process that binds the same path would silently steal it.

A lock on a file beside the socket says who holds the path; the kernel drops it with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path

from loopmux.endpoints import CHOOSE_ANOTHER, private_folder
from loopmux.errors import ConfigError, LoopmuxError
from loopmux.folders import unusable


class BusyError(LoopmuxError):
    """Another process holds an endpoint."""

    code = "busy"


class Claim:
    """This process's hold on the path of an ipc socket. Removes its files, and folders that it made, when released."""

    def __init__(self, path: Path) -> None:
        """Take the path.

        Raises:
            BusyError: a living process holds it.
            ConfigError: the folder is somebody else's or cannot be used, or the path is taken by something that is no
                socket.
        """
        self.path = path
        self.lock = path.with_name(f"{path.name}.lock")
        self._made = [folder for folder in path.parents if not folder.exists()]
        private_folder(path.parent)
        self._descriptor = self._take()
        self._clear_stale()

    def _take(self) -> int:
        while True:
            try:
                descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                self._unmake()
                raise unusable(self.path.parent, "sockets", CHOOSE_ANOTHER, error) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = (_written(descriptor) or ["unknown"])[0]
                os.close(descriptor)
                raise BusyError(
                    f"ipc://{self.path} is held by a running broker, process {holder} (lock {self.lock}): "
                    "use that one, stop it (loopmux down), or choose another --endpoint"
                ) from None
            if self._is_current(descriptor):
                # A holder that was killed left its folders, too: they go with this claim.
                self._made += [Path(folder) for folder in _written(descriptor)[1:]]
                try:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, "\n".join([str(os.getpid()), *map(str, self._made)]).encode(), 0)
                except OSError as error:  # a full disk
                    self._descriptor = descriptor
                    self.release(theirs=True)
                    raise unusable(self.path.parent, "sockets", CHOOSE_ANOTHER, error) from error
                return descriptor
            os.close(descriptor)  # its last holder removed the file between our opening and locking it

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.lock.stat())
        except OSError:  # it is gone, or its folder
            return False

    def _clear_stale(self) -> None:
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            self.release()
            raise ConfigError(f"{self.path} exists and is no socket: expected a free path, choose another --endpoint")
        if _answers(self.path):
            self.release(theirs=True)
            raise BusyError(
                f"ipc://{self.path} is held by a running program that is no broker of ours: stop it, or choose another "
                "--endpoint"
            )
        self.path.unlink()

    def release(self, *, theirs: bool = False) -> None:
        """Give the path up. The socket itself must be closed by now, unless it is `theirs`, which stays."""
        if self._is_current(self._descriptor):  # else somebody has removed it, and the path may be another one's now
            with contextlib.suppress(FileNotFoundError):
                if not theirs and stat.S_ISSOCK(self.path.lstat().st_mode):
                    self.path.unlink()
            self.lock.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._unmake()

    def _unmake(self) -> None:
        with contextlib.suppress(OSError):  # not empty: somebody else uses it too
            for folder in self._made:
                folder.rmdir()


def _written(descriptor: int) -> list[str]:
    """What a lock file says: its holder, and the folders that this one made."""
    return os.pread(descriptor, 4096, 0).decode(errors="replace").splitlines()


def _answers(path: Path) -> bool:
    """Whether somebody listens on a socket's path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # too slow, or not for us: either way somebody is there
    return True
