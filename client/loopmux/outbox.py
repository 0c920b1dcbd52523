"""What a client's socket does not take yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from loopmux.wire import Kind, Message

_MOOT = (Kind.SUBMIT, Kind.ATTACH, Kind.CREDIT, Kind.CANCEL)
"""What need not be said any more about a request that is over."""


class Outbox:
    """Messages that wait for room in a socket, in order, none of them twice.

    Whatever wants an answer is said again until there is one, so while a broker hangs the same would pile up here. Of
    one kind about one request the newest is kept, in the place of the first, and behind ENDACK nothing that was said
    before. That bounds what waits by the number of requests. Hints about sessions, which may get lost, are about no
    request: only the last one waits.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[tuple[Kind, bytes], Message] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Message]:
        return iter(self._waiting.values())

    def extend(self, messages: Iterable[Message]) -> None:
        """These wait, too."""
        for message in messages:
            kind, request = message.header.kind, message.header.request
            if kind is Kind.ENDACK:
                for moot in _MOOT:
                    self._waiting.pop((moot, request), None)
            self._waiting[kind, request] = message

    def drop(self, count: int) -> None:
        """The first so many were sent."""
        for _ in range(count):
            self._waiting.popitem(last=False)

    def clear(self) -> None:
        """Nothing waits any more."""
        self._waiting.clear()
