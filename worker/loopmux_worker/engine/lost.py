"""A device that this process has lost. Pure: knows libraries by their words."""

from __future__ import annotations

from loopmux.errors import EngineError

_WORDS = (
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


def device_lost(error: BaseException | None) -> DeviceLostError | None:
    """The error to end the process with, if ``error`` or one that it was made from says that the device is lost."""
    while error is not None:
        if isinstance(error, DeviceLostError):
            return error
        if any(words in str(error) for words in _WORDS):
            said = str(error).splitlines()[0]
            return DeviceLostError(f"the device is lost to this process, which ends: {type(error).__name__}: {said}")
        error = error.__cause__ or error.__context__
    return None
