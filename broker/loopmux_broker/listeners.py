"""Every socket that the broker listens on: those that were handed over, and those that are opened here.

The parent of the broker has them, and its forks with it: when a broker dies, ports stay the same, nobody else can take
them, and who connects meanwhile waits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from loopmux import endpoints
from loopmux.listening import Listening
from loopmux_broker.config import BrokerConfig
from loopmux_broker.doors import Side
from loopmux_broker.inherited import Listener


class Listeners:
    """Listens on all endpoints for a broker to serve.

    Attributes:
        all: those for clients first, that for administrators last.
    """

    def __init__(
        self, clients: Sequence[str], workers: Sequence[str], settings: BrokerConfig, given: Sequence[Listener]
    ) -> None:
        """Listen where ``clients`` and ``workers`` say, or else the settings; ``given`` are served besides.

        Raises:
            BusyError, ConfigError: an endpoint cannot be had; whatever was taken before is given back.
        """
        self._given, self._own = {one.endpoint: one for one in given}, list[Listening]()
        self._keyed = bool(settings.key)
        for_clients = _named(clients, given, Side.CLIENTS, settings.endpoints)
        for_workers = _named(workers, given, Side.WORKERS, settings.worker_endpoints)
        config = settings.with_endpoints(for_clients, for_workers)
        try:
            serving = self._open(Side.CLIENTS, config.endpoints)
            # The others are named after where clients connect: with port 0 the system has chosen one.
            config = settings.with_endpoints(tuple(one.endpoint for one in serving), for_workers)
            serving += self._open(Side.WORKERS, config.worker_endpoints)
            self.all = serving + self._open(Side.ADMINS, [endpoints.admin_endpoint(config.endpoints[0])])
        except BaseException:
            self.close()
            raise

    def _open(self, side: Side, named: Sequence[str]) -> list[Listener]:
        return [self._given.get(endpoint) or self._listen(side, endpoint) for endpoint in named]

    def _listen(self, side: Side, endpoint: str) -> Listener:
        self._own.append(Listening(endpoint, keyed=self._keyed))
        return Listener(side, self._own[-1].fileno(), self._own[-1].endpoint)

    def check(self, settings: BrokerConfig) -> None:
        """Refuse settings with which these must not be served.

        Raises:
            ConfigError: says what to do (``BrokerConfig.check_served``).
        """
        for one in self.all:
            keys = settings.worker_keys if one.side is Side.WORKERS else settings.listed_clients
            settings.check_served(one.endpoint, f"{one.side.value[:-1]}_keys", keys)

    def close(self) -> None:
        """Stop listening. The files of those that were opened here go too."""
        for given in self._given.values():
            os.close(given.descriptor)
        for own in reversed(self._own):  # the first one made the folder
            own.close()


def _named(
    arguments: Sequence[str], given: Sequence[Listener], side: Side, configured: Sequence[str]
) -> tuple[str, ...]:
    """The endpoints of one side: of the command line or else the settings, and of sockets that were handed over.

    The first one is what those beside it are named after: an argument, else one that was handed over, whose owner looks
    for them there.
    """
    handed = (one.endpoint for one in given if one.side is side)
    return tuple(dict.fromkeys([*arguments, *handed, *(() if arguments else configured)]))
