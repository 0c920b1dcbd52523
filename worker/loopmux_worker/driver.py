"""The engine thread: the one thread that runs the engine. Commands come in by a queue, events go out by another.

Where preparing a request may take long it is done in a second thread: a prompt of some megabytes takes seconds to
tokenise, for which running streams would stand still.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from loopmux.errors import LoopmuxError
from loopmux.results import Usage
from loopmux_worker import logs
from loopmux_worker.causes import device_lost
from loopmux_worker.engine.base import Engine, Failed, Finished, Job, Key, Load, Output, engine_error
from loopmux_worker.events import Adapt, Adapted, Cancel, Cancelled, Event, Hint, Stepped, Submit
from loopmux_worker.preparing import Preparer

Command = Submit | Cancel | Hint | Adapt
"""What the engine's thread is told."""


@dataclass(frozen=True, slots=True)
class _Preparing:
    """A job that is being prepared. The engine's thread is told at once, so that a ``Cancel`` behind it finds it."""

    job: Job
    prepared: Future[Any]


_BACKLOG = 256
"""Steps whose outputs may wait for the I/O thread; an engine that is faster than the wire is made to wait."""

_AGAIN = 0.01
"""Seconds until an engine that cannot load an adapter yet, and has no step to make, is asked again."""


class Driver:
    """Runs an engine in a thread of its own.

    Args:
        engine: handed over; nobody else may touch it until ``stop``, but for what it allows beside its steps.
        wake: called (in the engine's thread) when there is something in ``drain``.
    """

    def __init__(self, engine: Engine, wake: Callable[[], None]) -> None:
        self._engine, self._wake = engine, wake
        self._preparer = Preparer(engine.prepare) if engine.slow_to_prepare else None
        self._preparing: dict[Key, _Preparing] = {}  # in the order in which they came
        self._commands: queue.SimpleQueue[Command | _Preparing | None] = queue.SimpleQueue()  # None only wakes
        self._events: queue.Queue[Event] = queue.Queue(_BACKLOG)
        self._stopping = threading.Event()
        self._running: set[Key] = set()
        self._load = Load(0, 0, 0)
        self._adapts: deque[tuple[Adapt, frozenset[Key]]] = deque()  # with what was being prepared before
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.died: BaseException | None = None
        """What ended the thread, if it was not asked to end."""

    def start(self) -> None:
        """Begin."""
        if self._preparer is not None:
            self._preparer.start()
        self._thread.start()

    def put(self, command: Command) -> None:
        """Hand a command to the engine; never blocks. Requests are taken in in the order in which they come."""
        if self._preparer is None or not isinstance(command, Submit):
            self._commands.put(command)
            return
        preparing = _Preparing(command.job, self._preparer.put(command.job))
        self._commands.put(preparing)
        preparing.prepared.add_done_callback(lambda _: self._commands.put(None))

    def drain(self) -> list[Event]:
        """What happened since the last call."""
        events: list[Event] = []
        try:
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def stop(self, timeout: float) -> bool:
        """End the thread and close the engine; False if it did not end in time (a step is taking long)."""
        self._stopping.set()
        self._commands.put(None)
        if self._preparer is not None:
            self._preparer.stop()
        if self._thread.ident is None:  # it was never started, so the engine is still ours
            self._engine.close()
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except BaseException as error:  # noqa: BLE001 - handed to the I/O thread, which ends the process with it
            self.died = error
            self._wake()
        finally:
            self._engine.close()

    def _turn(self) -> None:
        """Carry out the commands at hand, then one step."""
        due = self._engine.due()
        if self._adapts and due is None:
            due = _AGAIN
        for command in self._take(due):
            match command:
                case Submit(job):
                    self._take_in(job)
                case _Preparing(job):
                    self._preparing[job.key] = command
                case Cancel(key):
                    self._post(Cancelled(key, self._cancel(key)))
                case Hint(hint):
                    self._engine.hint(hint)
                case Adapt():
                    self._adapts.append((command, frozenset(self._preparing)))
        self._take_in_prepared()
        while self._adapts and self._may_adapt(*self._adapts[0]):
            self._post(self._adapt(self._adapts.popleft()[0]))
        self._report([] if self._engine.due() is None else self._step())

    def _take(self, due: float | None) -> list[Command | _Preparing]:
        """The commands at hand; waits for the first one, or for being woken, while the engine has nothing to do."""
        taken: list[Command | _Preparing] = []
        try:
            command = self._commands.get_nowait() if due == 0 else self._commands.get(timeout=due)
            while True:
                if command is not None:  # else it only wakes
                    taken.append(command)
                command = self._commands.get_nowait()
        except queue.Empty:
            pass  # that is the end of what is at hand
        return taken

    def _take_in_prepared(self) -> None:
        while self._preparing and (first := next(iter(self._preparing.values()))).prepared.done():
            del self._preparing[first.job.key]
            self._take_in(first.job, first.prepared)

    def _take_in(self, job: Job, prepared: Future[Any] | None = None) -> None:
        try:
            if prepared is None:
                self._engine.submit(job)
            else:
                self._engine.add(prepared.result())
        except Exception as error:  # noqa: BLE001 - whatever a request does to the engine, it is that request's failure
            self._report([Failed(job.key, _survived(error))])
        else:
            self._running.add(job.key)

    def _cancel(self, key: Key) -> Usage | None:
        if (preparing := self._preparing.pop(key, None)) is not None:
            preparing.prepared.cancel()  # if it is not its turn yet; else what comes of it is left alone
            return Usage(completion_tokens=len(preparing.job.prefix))
        self._running.discard(key)
        return self._engine.cancel(key)

    def _may_adapt(self, command: Adapt, before: frozenset[Key]) -> bool:
        """Requests that came before it are taken in first: one that uses what is unloaded is to run to its end."""
        return self._preparing.keys().isdisjoint(before) and (not command.load or self._engine.can_load())

    def _adapt(self, command: Adapt) -> Adapted:
        """Load or unload an adapter; whatever that does to the engine, the requests that run go on."""
        order = command.order
        try:
            if command.load:
                self._engine.load_adapter(order.name, order.folder, order.model)
            else:
                self._engine.unload_adapter(order.name)
        except Exception as error:  # noqa: BLE001 - who asked for it hears of it
            if not isinstance(error, LoopmuxError):
                logs.exception("adapting failed", adapter=order.name, load=command.load)
            return Adapted(command.id, order, None, _survived(error))
        return Adapted(command.id, order, self._engine.describe())

    def _step(self) -> list[Output]:
        """One step. If it raises, the requests that were running fail and the engine goes on without them."""
        try:
            outputs = self._engine.step()
        except Exception as error:  # noqa: BLE001 - one bad batch must not end the worker
            logs.exception("engine step failed", requests=len(self._running))
            return self._fail_all(_survived(error))
        self._running -= {output.key for output in outputs if isinstance(output, (Finished, Failed))}
        return outputs

    def _fail_all(self, error: LoopmuxError) -> list[Output]:
        outputs: list[Output] = [Failed(key, error, self._engine.cancel(key) or Usage()) for key in self._running]
        self._running.clear()
        return outputs

    def _report(self, outputs: list[Output]) -> None:
        load = self._engine.load()
        if self._preparing:
            load = replace(load, queued=load.queued + len(self._preparing))
        if outputs or load != self._load:
            self._load = load
            self._post(Stepped(tuple(outputs), load))

    def _post(self, event: Event) -> None:
        """Hand an event over; waits where the I/O thread is behind, unless the worker is ending."""
        while not self._stopping.is_set():
            try:
                self._events.put(event, timeout=0.1)
            except queue.Full:
                continue
            break
        self._wake()


def _survived(error: Exception) -> LoopmuxError:
    """What the requests that met an exception fail with.

    Raises:
        DeviceLostError: there is nothing to go on with; it ends the thread, and with it the worker, for the launcher to
            start another one.
    """
    if (lost := device_lost(error)) is not None:
        raise lost from error
    return engine_error("the engine", error)
