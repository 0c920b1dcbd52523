"""What the next step computes. Pure: no torch, no clock of its own; the engine asks, performs and reports back.

Every sequence has tokens, of which a number is computed already. One that lacks its last token only is *decoding* and
has a place in every step; one that lacks more is *prefilling* and gets what is left of the step's budget, first come
first served, cut into chunks. So a long prompt never makes the running streams wait for more than one budget.

An *exact* sequence is one that is to be the same whatever runs beside it, whenever it is begun again: in floating point
that takes the same products of the same shapes. So it shares no forward and no state with others, its prompt is cut at
multiples of ``GRID``, and what follows is computed token by token, also where it is known already.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from loopmux_worker.engine.base import Key
from loopmux_worker.engine.slots.rows import SHORTEST, Copy, Rows

GRID = 64
"""Tokens of a chunk of an exact sequence's prompt: few enough to be computed beside running streams."""
_TRUST = 3
"""Failed steps with others after which a sequence stays alone to its end."""


@dataclass(slots=True)
class Sequence:
    """One request's tokens on their way through the model: prompt, resumed prefix and output.

    ``exact`` is the length of the prompt where the sequence is exact, None where it is not.
    """

    key: Key
    tokens: list[int]
    identity: str
    adapter: str | None = None
    session: str | None = None
    exact: int | None = None
    row: int | None = None
    computed: int = 0
    cached: int | None = None  # of its tokens, found when it was first computed
    afresh: bool = False  # whatever others know of its beginning is not copied
    strikes: int = 0
    alone: bool = False

    @property
    def lacks(self) -> int:
        """Tokens still to compute."""
        return len(self.tokens) - self.computed

    @property
    def takes(self) -> bool:
        """Whether state that others computed may be its beginning."""
        return not self.afresh and self.exact is None

    def chunk(self, budget: int) -> int:
        """How many tokens it has in the next step if the budget is so many."""
        if self.exact is None:
            return min(self.lacks, budget)
        return max(1, min(self.exact - self.computed, GRID))


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence in a step: ``tokens[start:start + count]``, whose state goes to ``row``.

    With ``samples`` they reach the end of what is known, so the step brings the next token.
    """

    key: Key
    row: int
    start: int
    count: int
    samples: bool
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """One step, in forwards: one for all that can share it, and one for each exact sequence.

    In the first the decoding segments come first, by length and row so that like ones can be computed together.
    """

    forwards: tuple[tuple[Segment, ...], ...] = ()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Of all forwards, in their order."""
        return tuple(chain.from_iterable(self.forwards))

    @property
    def tokens(self) -> int:
        """Tokens in the step."""
        return sum(segment.count for segment in self.segments)

    @property
    def keys(self) -> int:
        """Keys that the tokens of its chunks attend to: each to those before it, and its own."""
        return sum(s.count * (2 * s.start + s.count + 1) // 2 for s in self.segments if s.count > 1)


class Scheduler:
    """The sequences of one engine and their order.

    Args:
        rows: the book of the KV memory.
        most: sequences that run at once.
    """

    def __init__(self, rows: Rows, most: int) -> None:
        self.rows = rows
        self._most = self._allowed = most
        self._waiting: list[Sequence] = []
        self._running: dict[Key, Sequence] = {}
        self._turn = False  # whose turn it is: the suspects' or the others'

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def running(self) -> int:
        """Sequences that have a row."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._waiting)

    @property
    def decoding(self) -> int:
        """Sequences that take part in the next step with one token."""
        return sum(sequence.lacks == 1 for sequence in self._members())

    @property
    def beginning(self) -> int:
        """Sequences whose prompts the next steps can compute: those that have a row, and those that can get one."""
        open_places = max(0, self._allowed - len(self._running))
        return sum(s.lacks > 1 for s in self._running.values()) + min(len(self._waiting), open_places)

    @property
    def reached(self) -> int:
        """Tokens that are computed of the sequence whose prompt comes first in the next step."""
        return next((sequence.computed for sequence in self._members() if sequence.lacks > 1), 0)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in, behind those that wait."""
        self._waiting.append(sequence)

    def __getitem__(self, key: Key) -> Sequence:
        return self._running[key]

    # --- before a step ------------------------------------------------------------------------------------------------

    def admit(self, budget: int, now: float) -> list[Copy]:
        """Give rows to waiting sequences while the budget has work for them; the copies are to be made before the step.

        A sequence whose beginning is just being computed for another one waits until it is there to copy.
        """
        copies: list[Copy] = []
        pending = sum(sequence.lacks for sequence in self._running.values() if sequence.lacks > 1)
        while self._waiting and len(self._running) < self._allowed and pending < budget:
            sequence = self._waiting[0]
            if sequence.takes and self._comes_soon(sequence):
                break
            known = sequence.tokens if sequence.takes else []
            taken = self.rows.take(known, sequence.identity, sequence.session, now)
            if taken is None:
                break
            row, copy = taken
            self._waiting.pop(0)
            self._running[sequence.key] = sequence
            sequence.row, sequence.computed = row.index, row.filled
            pending += sequence.lacks
            if copy is not None:
                copies.append(copy)
        return copies

    def _comes_soon(self, sequence: Sequence) -> bool:
        """Whether a running prefill will have more of the sequence's beginning than any row has now."""
        known: int | None = None
        for other in self._running.values():
            if other.lacks < 2 or other.identity != sequence.identity:
                continue
            shared = _shared(other.tokens, sequence.tokens)
            if shared >= SHORTEST and shared > other.computed:
                if known is None:
                    known = self.rows.known(sequence.tokens, sequence.identity)
                if shared >= known + SHORTEST:
                    return True
        return False

    def plan(self, budget: int) -> Plan:
        """The next step: every decoding sequence, and chunks of ``budget`` tokens together. Changes nothing.

        The chunk of an exact sequence is not cut, so the last one may exceed the budget by less than ``GRID``.
        """
        members = self._members()
        decoding = sorted((s for s in members if s.lacks == 1), key=lambda s: (s.computed.bit_length(), s.row or 0))
        shared: list[Segment] = []
        alone: list[tuple[Segment]] = []
        for sequence in (*decoding, *(s for s in members if s.lacks > 1)):
            count = 1
            if sequence.lacks > 1:
                if budget <= 0:
                    break
                count = sequence.chunk(budget)
                budget -= count
            segment = _segment(sequence, count)
            if sequence.exact is None:
                shared.append(segment)
            else:
                alone.append((segment,))
        return Plan((tuple(shared), *alone) if shared else tuple(alone))

    def _members(self) -> list[Sequence]:
        """Who takes part in the next step: all who are trusted, or one suspect."""
        trusted = [s for s in self._running.values() if not s.alone]
        suspects = [s for s in self._running.values() if s.alone]
        if suspects and (self._turn or not trusted):
            return suspects[:1]
        return trusted

    # --- after a step -------------------------------------------------------------------------------------------------

    def done(self, plan: Plan) -> None:
        """The step was computed."""
        for segment in plan.segments:
            sequence = self._running.get(segment.key)
            if sequence is not None:
                if sequence.cached is None:
                    sequence.cached = segment.start
                sequence.computed = segment.start + segment.count
                self._note(sequence)
                if sequence.alone and sequence.strikes < _TRUST:
                    sequence.alone = False
        self._turn = not self._turn

    def append(self, key: Key, token: int) -> None:
        """The step's token for a sequence."""
        self._running[key].tokens.append(token)

    def failed(self, plan: Plan) -> Key | None:
        """The step raised. The state of its tokens is not relied on; one sequence is suspected.

        Returns:
            The key of the sequence that was alone in the step, and therefore is at fault; None when it cannot be told.
            Then the youngest is set apart and has its next step alone.
        """
        self._turn = not self._turn
        keys = [segment.key for segment in plan.segments if segment.key in self._running]
        if len(keys) == 1:
            return keys[0]
        youngest = next((key for key in reversed(self._running) if key in keys), None)
        if youngest is not None:
            suspect = self._running[youngest]
            suspect.strikes, suspect.alone = suspect.strikes + 1, True
        return None

    def preempt(self) -> Key | None:
        """Memory is short: the youngest gives up its row and waits again, in front; None if there is only one.

        No other takes its place before one of the rest has ended.
        """
        if len(self._running) < 2:
            return None
        key = next(reversed(self._running))
        sequence = self._running.pop(key)
        self._allowed = len(self._running)
        assert sequence.row is not None
        self.rows.drop(sequence.row)
        sequence.row, sequence.computed = None, 0
        self._waiting.insert(0, sequence)
        return key

    def undo(self, copies: Iterable[Copy], *, short: bool) -> None:
        """Copies could not be made: their sequences wait again, in front, in their order, and will do without.

        So no copy fails a sequence, and none is tried for ever. With ``short`` memory nobody takes the place of a
        running sequence before one has ended.
        """
        targets = {copy.target for copy in copies}
        back = [s for s in self._running.values() if s.row in targets]
        for sequence in reversed(back):
            assert sequence.row is not None
            self.rows.drop(sequence.row)
            del self._running[sequence.key]
            sequence.row, sequence.computed, sequence.afresh = None, 0, True
            self._waiting.insert(0, sequence)
        if short and self._running:
            self._allowed = len(self._running)

    def remove(self, key: Key, now: float, *, park: bool = True) -> None:
        """A sequence ended or was cancelled; its row is kept for a return unless its state is no good."""
        sequence = self._running.pop(key, None)
        if sequence is None:
            self._waiting = [waiting for waiting in self._waiting if waiting.key != key]
            return
        assert sequence.row is not None
        self._allowed = min(self._most, self._allowed + 1)
        self._note(sequence)
        if park:
            self.rows.park(sequence.row, now)
        else:
            self.rows.drop(sequence.row)

    def _note(self, sequence: Sequence) -> None:
        """Keep the book of the row: what is computed can be found by others."""
        assert sequence.row is not None
        row = self.rows[sequence.row]
        row.tokens += sequence.tokens[len(row.tokens) : sequence.computed]
        row.filled = sequence.computed


def _segment(sequence: Sequence, count: int) -> Segment:
    assert sequence.row is not None
    samples = sequence.lacks == count
    return Segment(sequence.key, sequence.row, sequence.computed, count, samples, sequence.adapter)


def _shared(one: list[int], other: list[int]) -> int:
    """Length of the common beginning of two token lists."""
    limit = min(len(one), len(other))
    for index in range(0, limit, SHORTEST):
        if one[index : index + SHORTEST] != other[index : index + SHORTEST]:
            return index
    return limit
