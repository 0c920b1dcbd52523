"""What an error comes down to: memory that ran out, a lost device, a panic. Pure: knows libraries by their words.

Libraries say so in errors of many types, and wrap those in others.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from loopmux.errors import EngineError, LoopmuxError

_OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",  # its workspace, which it takes by itself
    "allocate memory",  # torch's allocators, and the system's own words
    "start new thread",  # a thread's stack is memory too
    "failed to map segment",  # of a shared library, while it is imported
    "bad_alloc",
)
"""What libraries say of it where the type does not tell."""
_NO_KERNEL = "could not create a primitive"
"""All that oneDNN says where memory is too short for the code of a kernel; where more follows (a primitive descriptor,
say) it is another matter. The thread in which it happened gets no new kernel from then on, however much memory there
is; others do (seen with torch 2.13).
"""
_LOST = (
    "device-side assert triggered",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "launch timed out",
    "unspecified launch failure",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
)
"""CUDA's errors after which it refuses everything else that the process asks for (CUDA Runtime API, ``cudaError_t``:
"the only way to continue using CUDA is to terminate the process and launch a new one")."""


class DeviceLostError(EngineError):
    """The device refuses whatever this process asks for: only a new process can use it."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was made from, the innermost last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def ran_out(error: BaseException | None) -> BaseException | None:
    """The innermost one of an error's causes that says that memory ran out, or None."""
    found = None
    for cause in causes(error):
        found = cause if _out_of_memory(cause) else found
    return found


def device_lost(error: BaseException | None) -> DeviceLostError | None:
    """The error to end the process with, if one of an error's causes says that the device is lost.

    Errors of ours say nothing of a device, but may quote a request, whose words are anybody's.
    """
    for cause in causes(error):
        if isinstance(cause, DeviceLostError):
            return cause
        if (
            isinstance(cause, RuntimeError)
            and not isinstance(cause, LoopmuxError)
            and (str(cause) == _NO_KERNEL or any(words in str(cause) for words in _LOST))
        ):
            return DeviceLostError(f"the device is lost to this process, which ends: {in_words(cause)}")
    return None


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Rust code that panics (tokenizers, llguidance) raises what is no Exception, and would end its thread with it.

    Raises:
        EngineError: it panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each library has a class of its own, which it does not export
            raise
        raise EngineError(f"the library of tokenizers or that of grammars panicked ({in_words(error)})") from error


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, SystemError):  # what CPython says where there is no memory even for the exception
        return "without setting an exception" in str(error)
    said = str(error)
    return isinstance(error, MemoryError) or said == _NO_KERNEL or any(words in said for words in _OUT_OF_MEMORY)


def in_words(error: BaseException) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
