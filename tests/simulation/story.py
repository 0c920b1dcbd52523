"""What happened in a run, for people: faults and milestones always, every message where one asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from loopmux import wire
from loopmux.errors import ProtocolError
from loopmux.wire import Kind

_BEATS = frozenset({Kind.PING, Kind.PONG, Kind.HB})


@dataclass
class Story:
    """Lines of (time, who, what). ``loud`` tells messages too."""

    clock: object
    loud: bool = False
    names: dict[bytes, str] = field(default_factory=dict)
    lines: list[tuple[float, str, str]] = field(default_factory=list)

    def tell(self, who: object, what: str) -> None:
        self.lines.append((self.clock.now, str(who), what))

    def message(self, sender: object, receiver: object, data: bytes, *, lost: bool = False) -> None:
        try:
            message = wire.from_bytes(data)
        except ProtocolError as error:
            self.tell(f"{sender} → {receiver}", f"garbage: {error}")
            return
        if message.kind in _BEATS:
            return
        header = message.header
        parts = [header.kind.name]
        if header.request != wire.NO_ID:
            parts.append(self.names.get(header.request, header.request.hex()[:6]))
        if header.kind is Kind.TOK:
            parts.append(f"{header.seq}..{header.seq + header.arg - 1}")
        elif header.seq or header.arg:
            parts.append(f"seq {header.seq} arg {header.arg}")
        if header.attempt:
            parts.append(f"attempt {header.attempt}")
        self.tell(f"{sender} → {receiver}", " ".join(parts) + ("  (pipe full)" if lost else ""))

    def text(self, last: int | None = None) -> str:
        """The story, or the last lines of it."""
        lines = self.lines if last is None else self.lines[-last:]
        return "\n".join(f"{when:9.4f}  {who:<20} {what}" for when, who, what in lines)
