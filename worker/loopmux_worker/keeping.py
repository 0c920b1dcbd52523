"""One request's output on its way to the broker: put together, kept until acknowledged, sent again. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from loopmux.cadence import KEPT, RESEND
from loopmux.codec import pack
from loopmux.errors import EngineError
from loopmux.messages import Tok
from loopmux.results import TokenLogprob, ToolCall
from loopmux.wire import WORKER_BODY_LIMIT, Header, Kind, Message, pack_tokens
from loopmux_worker.engine.base import Key, Produced

SOONEST = 0.02
"""Seconds between two TOK of a stream, unless ``FULL`` tokens are there: readers see no difference, the broker does."""
FULL = 8
"""Tokens that are sent without waiting."""


@dataclass(frozen=True, slots=True)
class _Kept:
    message: Message
    end: int  # index behind its last token
    since: float


def _size(message: Message) -> int:
    return len(message.body) + len(message.tokens)


class OutputStream:
    """Collects what a request produces and turns it into messages.

    Methods return the messages to send now; the caller sends them, or not while the broker is away: they are kept and
    come again from ``resend``.

    Args:
        key: the request and attempt.
        start: absolute index of the first token to come (the length of the prefix).
    """

    def __init__(self, key: Key, start: int) -> None:
        self.key = key
        self.fingerprint = ""
        """Of the weights that produce it; said with the first tokens."""
        self.end = start
        """Index behind the last token that was added."""
        self.terminal: Message | None = None
        """The terminal once there is one."""
        self.held = 0
        """Bytes that are kept."""
        self._sent = start
        self._sent_at: float | None = None
        self._ids: list[int] = []
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._logprobs: list[TokenLogprob] = []
        self._kept: deque[_Kept] = deque()
        self._again_at = 0.0
        self._forget_at = 0.0

    def add(self, produced: Produced, now: float) -> list[Message]:
        """Take tokens in; the first ones go at once.

        Raises:
            EngineError: they do not follow the ones before, or a message with them would be too large.
        """
        if produced.position != self.end or not produced.ids:
            found = f"{len(produced.ids)} tokens at position {produced.position}"
            raise EngineError(f"the engine produced {found}, expected some at {self.end}")
        self.end += len(produced.ids)
        self._ids += produced.ids
        self._text.append(produced.text)
        self._reasoning.append(produced.reasoning)
        self._calls += produced.calls
        self._logprobs += produced.logprobs
        due = self.flush_at()
        return self.flush(now) if due is not None and now >= due else []

    def flush_at(self) -> float | None:
        """When the tokens at hand are to be sent; None if there are none."""
        if not self._ids:
            return None
        if self._sent_at is None or len(self._ids) >= FULL:
            return 0.0
        return self._sent_at + SOONEST

    def flush(self, now: float) -> list[Message]:
        """Put the tokens at hand into a message.

        Raises:
            EngineError: it would be larger than a worker may send.
        """
        if not self._ids:
            return []
        fingerprint = self.fingerprint if self._sent_at is None else ""
        reasoning = "".join(self._reasoning)
        body = pack(Tok("".join(self._text), tuple(self._calls), tuple(self._logprobs), fingerprint, reasoning))
        ids, start = self._ids, self._sent
        self._ids, self._text, self._reasoning, self._calls, self._logprobs = [], [], [], [], []
        if len(body) > WORKER_BODY_LIMIT:
            self.end = self._sent
            raise EngineError(f"{len(ids)} tokens came with {len(body)} bytes, at most {WORKER_BODY_LIMIT} can be sent")
        header = Header(Kind.TOK, self.key.request, seq=start, arg=len(ids), attempt=self.key.attempt)
        message = Message(header, body=body, tokens=pack_tokens(ids))
        self._sent, self._sent_at = self.end, now
        self._kept.append(_Kept(message, self.end, now))
        self.held += _size(message)
        return [message]

    def finish(self, kind: Kind, body: bytes, now: float) -> list[Message]:
        """Flush and end with a terminal."""
        messages = self.flush(now)
        header = Header(kind, self.key.request, seq=self.end, attempt=self.key.attempt)
        self.terminal = Message(header, body=body)
        self._again_at, self._forget_at = now + RESEND, now + KEPT
        return [*messages, self.terminal]

    def acknowledge(self, received: int) -> None:
        """The client has the tokens below ``received``: they need not be kept."""
        while self._kept and self._kept[0].end <= received:
            self._let_go()

    def _let_go(self) -> None:
        self.held -= _size(self._kept.popleft().message)

    @property
    def start(self) -> int:
        """Index of the first token that can still be sent."""
        return self._kept[0].message.header.seq if self._kept else self._sent

    def resend(self, start: int, now: float) -> list[Message]:
        """Everything from the token ``start`` on that was sent, as it first was."""
        messages = [kept.message for kept in self._kept if kept.end > start]
        return [*messages, *self.terminal_again(now)]

    def due(self) -> float:
        """When ``tick`` has something to do."""
        times = [self._kept[0].since + KEPT] if self._kept else []
        if self.terminal is not None:
            return min(self._again_at, self._forget_at, *times)
        flush_at = self.flush_at()
        return min([*times, *([] if flush_at is None else [flush_at])], default=float("inf"))

    def tick(self, now: float) -> list[Message]:
        """What the clock asks for: tokens that waited long enough, the terminal again. Old output is let go."""
        while self._kept and now >= self._kept[0].since + KEPT:
            self._let_go()
        if self.terminal is not None:
            return self.terminal_again(now) if now >= self._again_at else []
        flush_at = self.flush_at()
        return self.flush(now) if flush_at is not None and now >= flush_at else []

    def expired(self, now: float) -> bool:
        """Whether the terminal waited so long that the request is to be forgotten."""
        return self.terminal is not None and now >= self._forget_at

    def terminal_again(self, now: float) -> list[Message]:
        """The terminal as it first was; nothing before there is one."""
        if self.terminal is None:
            return []
        self._again_at = now + RESEND
        return [self.terminal]
