"""Clients: who they are over their connections, and what they have here."""

from __future__ import annotations

from dataclasses import dataclass, field

from loopmux_broker.events import Peer
from loopmux_broker.requests import Request


@dataclass(slots=True, eq=False)
class Client:
    """One client instance, present (``peer`` set) or away.

    Attributes:
        instance: 16 random bytes that stay the same over its reconnections.
        heard: when it last said anything.
        introduction: number of the HELLO by which it is known, which rises with each of its connections.
        complete: it has brought all that it had with a former broker.
        requests: all of them, tombstones included.
        queued, held: what admission limits: waiting requests, and bytes of bodies of live ones.
        served: tokens it was served, as `queues` keeps account of them.
        blocked: its pipe was full a moment ago; nothing is pushed until the retry.
        waiting: requests with something to push, at the next try or because it was too much for one go, in order.
    """

    instance: bytes
    peer: Peer | None
    heard: float
    software: str = ""
    introduction: int = 0
    complete: bool = False
    requests: dict[bytes, Request] = field(default_factory=dict)
    queued: int = 0
    held: int = 0
    served: float = 0.0
    blocked: bool = False
    waiting: dict[bytes, Request] = field(default_factory=dict)


class Clients:
    """All clients, by instance and by connection."""

    def __init__(self) -> None:
        self.by_instance: dict[bytes, Client] = {}
        self.by_peer: dict[Peer, Client] = {}

    def introduce(
        self, instance: bytes, peer: Peer, introduction: int, software: str, now: float
    ) -> tuple[Client, bool]:
        """A client said who it is: the client, and whether this connection (no other client's) is new to it."""
        client = self.by_instance.get(instance)
        if client is None:
            client = self.by_instance[instance] = Client(instance, None, now, software)
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
        client = self.by_instance[instance] = Client(instance, None, now)
        return client

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
