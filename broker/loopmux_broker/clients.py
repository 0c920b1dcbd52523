"""Clients: who they are over their connections, what they have here, and whose account and limits that counts for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loopmux_broker.events import Peer
from loopmux_broker.requests import Request


@dataclass(slots=True, eq=False)
class Principal:
    """Who limits and fairness are about: a key, with every client that has it, or one client that has none.

    Attributes:
        name: of the key.
        weight: how many tokens it is served where one of weight 1 is served one.
        known, queued, held: what admission limits: requests with tombstones, those that wait, bytes of bodies of live
            ones.
    """

    name: str = ""
    weight: float = 1.0
    known: int = 0
    queued: int = 0
    held: int = 0

    @property
    def who(self) -> str:
        """For people."""
        return f"key {self.name!r}" if self.name else "this client"


@dataclass(slots=True, eq=False)
class Client:
    """One client instance, present (``peer`` set) or away.

    Attributes:
        instance: 16 random bytes that stay the same over its reconnections.
        key: the name of its key, empty without one, None as long as only a worker has named it.
        principal: whose requests these are.
        heard: when it last said anything.
        introduction: number of the HELLO by which it is known, which rises with each of its connections.
        complete: it has brought all that it had with a former broker.
        requests: all of them, tombstones included; changed by ``add`` and ``drop``.
        blocked: its pipe was full a moment ago; nothing is pushed until the retry.
        waiting: requests with something to push, at the next try or because it was too much for one go, in order.
    """

    instance: bytes
    peer: Peer | None
    key: str | None
    principal: Principal
    heard: float
    software: str = ""
    introduction: int = 0
    complete: bool = False
    requests: dict[bytes, Request] = field(default_factory=dict)
    blocked: bool = False
    waiting: dict[bytes, Request] = field(default_factory=dict)

    def add(self, request: Request) -> None:
        """The request is known from now on, or was already."""
        self.principal.known += request.id not in self.requests
        self.requests[request.id] = request

    def drop(self, request: Request) -> None:
        """The request is forgotten."""
        self.principal.known -= self.requests.pop(request.id, None) is not None


class Clients:
    """All clients, by instance and by connection."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """``weights`` has all keys, by name."""
        self._keys = {name: Principal(name, weight) for name, weight in weights.items()}
        self.by_instance: dict[bytes, Client] = {}
        self.by_peer: dict[Peer, Client] = {}

    def introduce(
        self, instance: bytes, peer: Peer, key: str, introduction: int, software: str, now: float
    ) -> tuple[Client, bool]:
        """A client said who it is: the client, and whether this connection (no other client's) is new to it."""
        client = self.by_instance.get(instance)
        if client is None:
            client = self.by_instance[instance] = Client(instance, None, key, self._principal(key), now, software)
        elif client.key is None:  # nothing of what only a worker has named is let in, so no more than the number moves
            client.key, client.principal = key, self._principal(key)
            client.principal.known += len(client.requests)
        moved = client.peer != peer
        if moved and client.peer is not None:
            del self.by_peer[client.peer]
        client.peer, client.heard, client.blocked = peer, now, False
        if introduction != client.introduction:
            client.introduction, client.complete = introduction, False  # what it said before may be a former broker's
        self.by_peer[peer] = client
        return client, moved

    def expect(self, instance: bytes, now: float) -> Client:
        """A client that is known from a worker alone; it is away."""
        client = self.by_instance[instance] = Client(instance, None, None, Principal(), now)
        return client

    def _principal(self, key: str) -> Principal:
        return self._keys[key] if key else Principal()

    def part(self, client: Client) -> None:
        """Its connection is gone; the client itself stays known."""
        if client.peer is not None:
            del self.by_peer[client.peer]
        client.peer, client.blocked = None, False
        client.waiting.clear()

    def forget(self, client: Client) -> None:
        """It is gone for good."""
        self.part(client)
        self.by_instance.pop(client.instance, None)
