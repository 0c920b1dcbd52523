"""What belongs to one process, and says so to who wants to send it to another one."""

from __future__ import annotations

from typing import ClassVar, NoReturn, SupportsIndex


class Bound:
    """Holds a connection, or a place in one, and so is neither pickled nor copied."""

    _instead: ClassVar[str]
    """What to do instead, for the error."""

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        kind = type(self)
        raise TypeError(
            f"{kind.__module__}.{kind.__qualname__} belongs to this process and cannot be pickled or copied: "
            f"{self._instead}"
        )
