"""Whether an error says that memory ran out: libraries say so in errors of many types, and wrap those in others."""

from __future__ import annotations

import errno

_WORDS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",  # its workspace, which it takes by itself
    "allocate memory",  # torch's allocators, and the system's own words
    "start new thread",  # a thread's stack is memory too
    "failed to map segment",  # of a shared library, while it is imported
    "bad_alloc",
)
"""What they say where the type does not tell."""


def ran_out(error: BaseException | None) -> BaseException | None:
    """The error that says that memory ran out: the innermost one of those that an error was made from, or None."""
    found = None
    while error is not None:
        found = error if _says_so(error) else found
        error = error.__cause__ or error.__context__
    return found


def _says_so(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS)


def in_words(error: BaseException) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
