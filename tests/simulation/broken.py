"""How a run says that a promise was broken."""

from __future__ import annotations

from typing import NoReturn


class BrokenError(BaseException):
    """Something that must hold does not. ``promise`` says what, for people and for counting.

    No ``Exception``: cores and shells catch those of an engine, and this one is to end the run from wherever it is.
    """

    def __init__(self, promise: str, found: str) -> None:
        self.promise = promise
        super().__init__(f"{promise}: {found}")


def broken(promise: str, found: str) -> NoReturn:
    """End the run here."""
    raise BrokenError(promise, found)


def hold(fact: bool, promise: str, found: object) -> None:
    """Break the promise unless the fact holds. ``found`` is turned into text only then."""
    if not fact:
        broken(promise, str(found() if callable(found) else found))
