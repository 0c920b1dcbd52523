"""The broker's settings, from the command line or a file (`configfile`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields

from loopmux import endpoints
from loopmux.cadence import HEARTBEAT, KEPT, RESEND
from loopmux.errors import ConfigError
from loopmux_broker.admission import MIB, Limits
from loopmux_broker.queues import HeadStart
from loopmux_broker.stalls import Stall


@dataclass(frozen=True, slots=True)
class ClientKey:
    """A client's public key, and how many tokens it is served where one of weight 1 is served one."""

    key: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Everything that can be set. Times are seconds, sizes bytes.

    Attributes:
        endpoints: where clients connect; empty means ``$LOOPMUX_ENDPOINT`` or the per-user default.
        worker_endpoints: where workers and launchers connect; empty means beside the first client endpoint.
        key: the file of the broker's own key; with it every tcp endpoint lets in keys only, and may be on any address.
        client_keys: the public keys that may connect as clients, by the names of those who have them.
        worker_keys: those that may connect as workers and launchers.
        heartbeat: interval in which peers say something; after three they count as gone.
        window: tokens a client may be sent before it has to grant more.
        settle: after its start, how long a model that nobody has declared yet may still be: workers and launchers need
            a moment to join, above all a broker that was started again.
        grace: how long the requests of a client that fell silent live on.
        closed_grace: the same where its connection closed while it was still talking: its process has ended.
        claim_wait: how long a request that a client brings to a broker that was started again waits for its worker.
        orphan_grace: how long after its start one that a worker brings waits for its client.
        max_attempts: workers that may be lost with a request; the last of them runs it alone.
        resend: interval of what is repeated until it is answered.
        run_timeout: after which an unanswered RUN is given up.
        tombstone: how long an end waits for its acknowledgement.
        retry: when to try again after a full pipe.
        request_output: output that one request may hold unacknowledged before it is cancelled (slow client): the
            largest message of a worker, and as much again around it.
        limits: what may wait or be held.
        head_start: order in the queues.
        stall: how long an engine may stand still.
    """

    endpoints: tuple[str, ...] = ()
    worker_endpoints: tuple[str, ...] = ()
    key: str = ""
    client_keys: dict[str, str | ClientKey] = field(default_factory=dict)
    worker_keys: dict[str, str] = field(default_factory=dict)
    heartbeat: float = HEARTBEAT
    window: int = 1024
    settle: float = 3.0
    grace: float = 30.0
    closed_grace: float = 2.0
    claim_wait: float = 0.25
    orphan_grace: float = 30.0
    max_attempts: int = 3
    resend: float = RESEND
    run_timeout: float = 2.0
    tombstone: float = KEPT
    retry: float = 0.01
    request_output: int = 2 * MIB
    limits: Limits = field(default_factory=Limits)
    head_start: HeadStart = field(default_factory=HeadStart)
    stall: Stall = field(default_factory=Stall)

    def with_endpoints(self, clients: tuple[str, ...], workers: tuple[str, ...]) -> BrokerConfig:
        """The same with these endpoints; where there are none for clients, or for workers, the default.

        Raises:
            ConfigError: an endpoint that is malformed, or tcp that must not be listened on (``check_served``).
        """
        chosen = clients or (endpoints.default_endpoint(),)
        behind = workers or (endpoints.worker_endpoint(chosen[0]),)
        for endpoint in chosen:
            self.check_served(endpoint, "client_keys", self.client_keys)
        for endpoint in behind:
            self.check_served(endpoint, "worker_keys", self.worker_keys)
        both = [e for e in chosen if e in behind]
        if both:
            raise ConfigError(f"{both[0]} is given for clients and for workers, expected two different endpoints")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return BrokerConfig(**values | {"endpoints": chosen, "worker_endpoints": behind})

    def check_served(self, endpoint: str, side: str, keys: Collection[object]) -> None:
        """Refuse to serve tcp that lets in anybody of another host, or nobody at all.

        Raises:
            ConfigError: says what to do.
        """
        if not self.key:
            endpoints.check_local(endpoint)
        elif endpoints.ipc_path(endpoint) is None and not keys:
            raise ConfigError(
                f"{endpoint}: found no {side} in the settings, expected the public key of everybody who may connect "
                "there (`loopmux keys new NAME` prints one), or an ipc endpoint"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each client's key, by name."""
        return {n: one.weight if isinstance(one, ClientKey) else 1.0 for n, one in self.client_keys.items()}

    @property
    def listed_clients(self) -> dict[str, str]:
        """The public keys of clients, by name."""
        return {n: one.key if isinstance(one, ClientKey) else one for n, one in self.client_keys.items()}
