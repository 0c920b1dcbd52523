"""Whether a device still computes, where its errors do not say that it is lost.

``causes.device_lost`` knows such errors by their words, which another release of CUDA may change. Then every step
fails, whoever is in it, and none ever succeeds again: which shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loopmux_worker.causes import DeviceLostError, device_lost, in_words, ran_out

_ASKED = 3
"""Failures in a row from which the device is asked: a bad request causes two by itself, beside others and alone."""
_HOPELESS = 64
"""Failures in a row after which a device that still answers is given up, too: more than the bad requests that come one
after the other while nobody else is served."""


class Failures:
    """Counts the failures of steps in a row.

    Args:
        device: that they compute on. A CPU is never lost.
        probe: computes something small on it, and raises if that fails.
    """

    def __init__(self, device: torch.device, probe: Callable[[torch.device], None] | None = None) -> None:
        self._device, self._probe = device, probe or _compute
        self._row = 0

    def succeeded(self) -> None:
        """A step was computed."""
        self._row = 0

    def note(self, error: Exception) -> None:
        """A step raised.

        Raises:
            DeviceLostError: none will ever succeed.
        """
        if (lost := device_lost(error)) is not None:
            raise lost from error
        if self._device.type == "cpu" or ran_out(error):
            return
        self._row += 1
        if self._row < _ASKED:
            return
        if self._row >= _HOPELESS:
            reason = "and none succeeded"
        elif (unlike := self._asked()) is not None:
            reason = f"and so does anything else there ({in_words(unlike)})"
        else:
            return
        raise DeviceLostError(
            f"{self._device} is lost to this process, which ends: {self._row} steps failed one after the other "
            f"({in_words(error)}), {reason}"
        ) from error

    def _asked(self) -> Exception | None:
        """What the device makes of a small computation, if it is no answer."""
        try:
            self._probe(self._device)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what was asked for
            return None if ran_out(error) else error
        return None


def _compute(device: torch.device) -> None:
    ones = torch.ones(8, device=device)
    if (found := float(ones @ ones)) != 8:
        raise RuntimeError(f"8 ones times 8 ones are {found}")
