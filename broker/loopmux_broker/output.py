"""The output of one request: what has been produced, what was pushed to the client, what the client has.

::

    0 ........ acknowledged ........ cursor ........ total
      ids only               chunks, pushed    chunks, waiting for credit

Token ids are kept from the first on: another attempt goes on behind them. Bodies are kept until the client has
acknowledged them.
"""

from __future__ import annotations

from dataclasses import dataclass

_OVERHEAD = 256
"""Bytes that a chunk costs besides its message, so that many tiny chunks count as what they are."""


@dataclass(slots=True)
class Chunk:
    """One TOK message as it came: tokens ``seq`` to ``end`` - 1."""

    seq: int
    end: int
    data: bytes


class Output:
    """One request's stream. ``credit`` is the first token index that may not be pushed yet."""

    __slots__ = ("acknowledged", "chunks", "credit", "cursor", "held", "highest", "ids", "paused", "said", "total")

    def __init__(self, credit: int) -> None:
        self.credit = credit
        self.total = 0
        self.acknowledged = 0
        self.highest = 0  # tokens that the client may have: the end of the last chunk ever pushed
        self.held = 0  # bytes of unacknowledged chunks
        self.ids = bytearray()  # all token ids, packed as on the wire
        self.chunks: list[Chunk] = []
        self.cursor = 0  # how many of chunks were pushed on the client's present connection
        self.paused = False  # after a reconnection, until the client says from where
        self.said: tuple[int, int] | None = None  # the last CREDIT, to recognise a repeated one

    def add(self, seq: int, end: int, data: bytes, tokens: bytes) -> int:
        """Take the next chunk (``seq`` is ``total``), ``data`` with these ``tokens``, and return the bytes it costs."""
        size = len(data) + _OVERHEAD
        self.chunks.append(Chunk(seq, end, data))
        self.ids += tokens
        self.total = end
        self.held += size
        return size

    def restore(self, ids: bytes) -> None:
        """Begin where the client is: these tokens came from another attempt, under another broker."""
        self.ids = bytearray(ids)
        self.total = self.acknowledged = self.highest = len(ids) // 4
        self.paused = False

    def take(self, most: int) -> list[Chunk]:
        """Chunks that may be pushed now, ``most`` of them, marked as pushed."""
        taken: list[Chunk] = []
        if self.paused:
            return taken
        for chunk in self.chunks[self.cursor : self.cursor + most]:
            # A chunk is never split, so one larger than the client's whole window goes when nothing else is under way.
            if chunk.end > self.credit and not (chunk.seq == self.acknowledged and chunk.seq < self.credit):
                break
            taken.append(chunk)
        if taken:
            self.cursor += len(taken)
            self.highest = max(self.highest, taken[-1].end)
        return taken

    def drained(self) -> bool:
        """Whether everything there is has been pushed."""
        return self.cursor == len(self.chunks) and not self.paused

    def grant(self, credit: int, received: int) -> bool:
        """A CREDIT came: ``received`` tokens are with the client. Returns whether it wants what it lacks pushed again.

        It does when its connection is new, and when it says the same as the time before: then it waits for something.
        """
        again = self.paused or self.said == (credit, received)
        self.said = (credit, received)
        self.credit = max(self.credit, credit)
        self.acknowledge(received)
        if again:
            self.rewind()
        return again

    def acknowledge(self, received: int) -> None:
        """Drop the chunks that the client has, but not their token ids."""
        count = size = 0
        for chunk in self.chunks:
            if chunk.end > received:
                break
            count += 1
            size += len(chunk.data) + _OVERHEAD
        del self.chunks[:count]
        self.held -= size
        self.cursor = max(self.cursor - count, 0)
        self.acknowledged = max(self.acknowledged, received)

    def pause(self) -> None:
        """The client's connection changed: push nothing until it says what it has."""
        self.paused = True

    def rewind(self) -> None:
        """Push again from what is acknowledged."""
        self.paused = False
        self.cursor = 0

    def block(self, seq: int) -> None:
        """The push of the chunk at ``seq`` failed: it is the next to push."""
        while self.cursor and self.chunks[self.cursor - 1].seq >= seq:
            self.cursor -= 1

    def truncate(self) -> None:
        """Drop what the client cannot have yet, for an end that does not wait."""
        while self.chunks and self.chunks[-1].end > self.highest:
            self.held -= len(self.chunks.pop().data) + _OVERHEAD
        self.cursor = min(self.cursor, len(self.chunks))
        self.total = self.highest
        del self.ids[4 * self.total :]
