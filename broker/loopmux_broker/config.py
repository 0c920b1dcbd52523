"""The broker's settings: ``configs/broker.yaml`` and the command line, checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from loopmux import endpoints
from loopmux.cadence import HEARTBEAT, KEPT, RESEND
from loopmux.codec import FieldError, build
from loopmux.errors import ConfigError
from loopmux.nearest import did_you_mean
from loopmux_broker.admission import MIB, Limits
from loopmux_broker.queues import HeadStart
from loopmux_broker.stalls import Stall


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Everything that can be set. Times are seconds, sizes bytes.

    Attributes:
        endpoints: where clients connect; empty means ``$LOOPMUX_ENDPOINT`` or the per-user default.
        worker_endpoints: where workers and launchers connect; empty means beside the first client endpoint.
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
        request_output: output that one request may hold unacknowledged before it is cancelled (slow client).
        limits: what may wait or be held.
        head_start: order in the queues.
        stall: how long an engine may stand still.
    """

    endpoints: tuple[str, ...] = ()
    worker_endpoints: tuple[str, ...] = ()
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
    request_output: int = MIB
    limits: Limits = field(default_factory=Limits)
    head_start: HeadStart = field(default_factory=HeadStart)
    stall: Stall = field(default_factory=Stall)

    def with_endpoints(self, clients: tuple[str, ...], workers: tuple[str, ...]) -> BrokerConfig:
        """The same with endpoints from the command line (where given) and the defaults filled in.

        Raises:
            ConfigError: an endpoint that is malformed, or tcp beyond this host.
        """
        chosen = clients or self.endpoints or (endpoints.default_endpoint(),)
        behind = workers or self.worker_endpoints or (endpoints.worker_endpoint(chosen[0]),)
        for endpoint in (*chosen, *behind):
            endpoints.check_local(endpoint)
        both = [e for e in chosen if e in behind]
        if both:
            raise ConfigError(f"{both[0]} is given for clients and for workers, expected two different endpoints")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return BrokerConfig(**values | {"endpoints": chosen, "worker_endpoints": behind})


def load(path: Path) -> BrokerConfig:
    """Read a configuration file.

    Raises:
        ConfigError: with file, line, key, what was found and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        config = build(BrokerConfig, values, strict=True)
        _check_numbers(config, "")
    except FieldError as error:
        line = _line(tree, error.path.split("."))
        raise ConfigError(f"{path}:{line}: {error}{_nearest(error)}") from error
    return config


def _check_numbers(config: Any, path: str) -> None:
    for f in fields(config):
        value, where = getattr(config, f.name), f"{path}{f.name}"
        if is_dataclass(value):
            _check_numbers(value, f"{where}.")
        elif isinstance(value, (int, float)):
            low = 0 if f.name in ("grace", "closed_grace", "priority", "continuing", "tokens", "per_size") else None
            fits = math.isfinite(value) and (value > 0 if low is None else value >= low)
            if not fits:
                expected = "a number above 0" if low is None else "a number of at least 0"
                raise FieldError(where, f"{value} ({type(value).__name__})", expected)


def _nearest(error: FieldError) -> str:
    if not error.unknown:
        return ""
    known = error.expected.removeprefix("one of ").split(", ")
    hint = did_you_mean(error.path.rsplit(".", 1)[-1], known)
    return f" ({hint})" if hint else ""


def _line(node: yaml.Node | None, path: list[str]) -> int:
    """The line of the deepest key of ``path`` that the file has, from 1."""
    line = node.start_mark.line + 1 if node is not None else 1
    for name in path:
        if not isinstance(node, yaml.MappingNode):
            break
        pair = next(((k, v) for k, v in node.value if k.value == name.split("[")[0]), None)
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line
