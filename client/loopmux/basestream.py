"""A generation as its reader has it, whichever client it is of: the text so far, and in the end one outcome."""

from __future__ import annotations

from typing import Generic, TypeVar

from loopmux.bound import Bound
from loopmux.driver import Driver, ForCaller, Sink
from loopmux.errors import CancelledError, LoopmuxError
from loopmux.events import CancelAsked, Consumed, Deliver, Fail, Finish, Request, Submitted
from loopmux.results import Result, StreamEvent, TextDelta

D = TypeVar("D", bound=Driver)


class BaseStream(Bound, Generic[D]):
    """What ``Stream`` and ``AsyncStream`` are but for waiting; ``put`` hands something to whoever waits."""

    _instead = "read it here, and pass on its result"

    def __init__(self, driver: D, request: Request, put: Sink) -> None:
        self.request_id = request.id.hex()
        self._id = request.id
        self._driver, self._put = driver, put
        self._texts: list[str] = []
        self._outcome: Result | LoopmuxError | None = None
        self._raised = False
        driver.start(Submitted(request), put)

    @property
    def text(self) -> str:
        """The text of the events read so far."""
        return "".join(self._texts)

    def cancel(self) -> None:
        """Ask for the end of the request; of a ``Stream`` from any thread.

        The reader then gets CancelledError, or the end of the stream if that was first.
        """
        if self._outcome is None:
            self._driver.post(CancelAsked(self._id))

    def leave(self) -> None:
        """Stop reading: an unfinished request is cancelled in the engine, and the reader's side ends at once."""
        if self._outcome is None:
            self._driver.forget(self._id)
            self._driver.post(CancelAsked(self._id))
            left = "the stream was left before its end"
            self._outcome = CancelledError(left, request_id=self.request_id, partial_text=self.text)
            self._put(Fail(self._id, self._outcome))  # for whoever waits for the next event

    def _taken(self, item: ForCaller) -> StreamEvent | None:
        """The event that came; None when it was the outcome instead."""
        match item:
            case Deliver(_, event, report):
                if isinstance(event, TextDelta):
                    self._texts.append(event.text)
                if report:
                    self._driver.post(Consumed(self._id, report))
                return event
            case Finish(_, result):
                self._outcome = result
            case Fail(_, error):
                self._outcome = error
        self._put(item)  # another one who waits here as well must not wait for ever
        return None

    def _over(self, end: type[Exception]) -> Exception:
        """What iterating comes to behind the last event: the request's error, once, or the ``end`` of the iteration."""
        if isinstance(self._outcome, LoopmuxError) and not self._raised:
            self._raised = True
            return self._outcome
        return end()

    def _result(self) -> Result:
        """The outcome, which is there."""
        if isinstance(self._outcome, LoopmuxError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome
