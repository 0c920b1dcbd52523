"""Answers to who introduces himself: clients and administrators (HELLO), workers and launchers (REGISTER)."""

from __future__ import annotations

from loopmux import codec, wire
from loopmux.errors import AuthError, ProtocolError
from loopmux.messages import Welcome
from loopmux.wire import Header, Kind, Message
from loopmux_broker.ends import error_to
from loopmux_broker.events import Action, Log, Peer, Send
from loopmux_broker.tables import Tables


def agree(versions: tuple[int, ...]) -> int | None:
    """The best protocol version that both sides speak."""
    return max(set(versions) & set(wire.VERSIONS), default=None)


def no_common_version(peer: Peer, versions: tuple[int, ...]) -> Send:
    """The answer to a peer whose protocol versions are all unknown here."""
    theirs, ours = (", ".join(map(str, v)) or "none" for v in (versions, wire.VERSIONS))
    text = f"no common protocol version: the peer speaks {theirs}, the broker {ours}; install one release everywhere"
    return error_to(peer, ProtocolError(text))


def another_key(tables: Tables, peer: Peer, role: str, name: str, key: str, holder: str) -> list[Action]:
    """The answer to a peer that introduces itself as somebody who is known under another key, and a line about it."""
    tables.counters["other_keys"] += 1
    fields: dict[str, object] = {"role": role, "name": name, "key": key, "known_under": holder}
    error = AuthError(f"this {role} is known here under another key than the one that it comes with: use that one")
    return [Log("warning", "another key", fields), error_to(peer, error)]


def welcome(tables: Tables, peer: Peer, version: int, max_body: int, introduction: int) -> Send:
    """WELCOME for a client, a worker or a launcher; ``introduction`` is the number of the HELLO or REGISTER."""
    config, identity = tables.config, tables.identity
    body = Welcome(version, identity.epoch, config.heartbeat, max_body, config.window, identity.software)
    return Send(peer, Message(Header(Kind.WELCOME, seq=introduction), route=codec.pack(body)))
