"""A broker for programs that do not care where it runs: the one that is there, or a private one for this process.

A private stack is started at most once per configuration, kept for later calls, and stopped at exit; should the
process be killed, its stack notices and ends by itself. A forked child starts its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopmux import modelfolders
from loopmux.endpoints import default_endpoint, ipc_path
from loopmux.errors import BadRequestError
from loopmux.privatestack import PrivateStack, default_environment, launcher_command
from loopmux.weightfiles import Unusable

LogCallback = Callable[[str], None]

_CONNECT_TIMEOUT = 1.0
"""Seconds for a tcp connection to the broker's host; a socket file answers at once."""

_Key = tuple[str, str | None] | None
"""What a stack serves: (base model, adapter folder), or None for what the configuration says."""


class _Stacks:
    """The private stacks of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_key: dict[_Key, PrivateStack] = {}

    def running(self, key: _Key, model_id: str) -> PrivateStack | None:
        """The stack for a key, if it is there; ``model_id`` is noted as one of its users."""
        with self.lock:
            return self._running(key, model_id)

    def start(self, key: _Key, model_id: str, config: dict[str, Any] | None) -> PrivateStack:
        """As ``running``; starts a stack where none is there."""
        with self.lock:
            stack = self._running(key, model_id)
            if stack is None:
                stack = self.by_key[key] = PrivateStack(config, launcher_command())
                stack.models.add(model_id)
                try:
                    stack.begin()
                except BaseException:
                    self.by_key.pop(key).stop()
                    raise
            return stack

    def _running(self, key: _Key, model_id: str) -> PrivateStack | None:
        stack = self.by_key.get(key)
        if stack is None:
            return None
        if not stack.alive:
            self.by_key.pop(key).stop()
            return None
        stack.models.add(model_id)
        return stack

    def drop(self, unwanted: Callable[[PrivateStack], bool]) -> None:
        """Stop the stacks that are not wanted any more."""
        with self.lock:
            keys = [key for key, stack in self.by_key.items() if unwanted(stack)]
            dropped = [self.by_key.pop(key) for key in keys]
        with contextlib.ExitStack() as stopping:  # whose end is interrupted, those after it are stopped all the same
            for stack in dropped:
                stopping.callback(stack.stop)


_stacks = _Stacks()
_inherited: list[_Stacks] = []
"""Stacks of the parent process, in a forked child: kept from being collected, since they are not the child's to end."""


def ensure_running(model_id: str, log_callback: LogCallback | None = None) -> str:
    """The endpoint of a broker: the default one if somebody listens there, else that of this process's private stack.

    Starts the stack if needed and waits until it is ready, which can take minutes the first time that an environment
    is built; ``log_callback`` gets the lines of progress, in the calling thread. The model's configuration is found as
    ``loopmux up`` finds it.

    Raises:
        ConfigError: the configuration is wrong, or a package for starting a stack is not installed.
        ConnectionLostError: the stack did not start; the message has its last lines.
    """
    endpoint = default_endpoint()
    if listening(endpoint):
        return endpoint
    stack = _stacks.running(None, model_id)
    if stack is None:
        if log_callback is not None:
            log_callback(f"no broker at {endpoint}: starting a private one")
        stack = _stacks.start(None, model_id, None)
    return _ready(stack, log_callback)


def ensure_model(
    base_model: str, adapter_dir: str | Path | None = None, log_callback: LogCallback | None = None
) -> str:
    """The endpoint of a private stack that serves this base model and adapter as ``default``.

    It runs in the ``default`` environment of the configuration, which is built first if need be; without a
    configuration, in the launcher's own default.

    Raises:
        BadRequestError: a folder that is not there, or a hub id that looks like a slip of the pen.
        ConfigError, ConnectionLostError: as ``ensure_running``.
    """
    base = _base(base_model, log_callback)
    adapter = None if adapter_dir is None else _adapter(adapter_dir)
    stack = _stacks.running((base, adapter), "default")
    if stack is None:
        model = {"base_model": base} | ({"adapter_dir": adapter} if adapter else {})
        environments = default_environment(launcher_command(), log_callback)
        config = {"environments": environments, "models": {"default": model}}
        stack = _stacks.start((base, adapter), "default", config)
    return _ready(stack, log_callback)


def shutdown(model_id: str) -> None:
    """This process does not need the model any more: stops a private stack when none of its models is needed."""

    def unwanted(stack: PrivateStack) -> bool:
        needed = model_id in stack.models
        stack.models.discard(model_id)
        return needed and not stack.models

    _stacks.drop(unwanted)


def shutdown_all() -> None:
    """Stop every private stack of this process. Brokers that others started are left alone."""
    _stacks.drop(lambda stack: True)  # noqa: ARG005 - every one


def listening(endpoint: str) -> bool:
    """Whether somebody accepts connections at an endpoint.

    Raises:
        ConfigError: it is no endpoint.
    """
    path = ipc_path(endpoint)
    try:
        if path is None:
            host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
            return True
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return True
    except OSError:
        return False


def _ready(stack: PrivateStack, log: LogCallback | None) -> str:
    try:
        stack.wait_ready(log)
    except BaseException:
        if not stack.alive:
            _stacks.drop(lambda each: each is stack)
        raise
    return stack.endpoint


def _base(given: str, log: LogCallback | None) -> str:
    """A base model's folder, absolute because the configuration will lie elsewhere, or its hub id."""
    try:
        found = modelfolders.base_model(given, Path())
    except Unusable as error:
        raise BadRequestError(f"base_model: {error.message}") from error
    if log is not None and found.note:
        log(found.note)
    return found.name


def _adapter(given: str | Path) -> str:
    try:
        return str(modelfolders.adapter_folder(str(given)))
    except Unusable as error:
        raise BadRequestError(f"adapter_dir: {error.message}") from error


def _forget_parent() -> None:
    global _stacks
    _inherited.append(_stacks)
    _stacks = _Stacks()


os.register_at_fork(after_in_child=_forget_parent)
atexit.register(shutdown_all)
