"""Accounts: how many tokens each client was served by workers that serve the same models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopmux_broker.clients import Principal
    from loopmux_broker.queues import Line
    from loopmux_broker.requests import Lane


@dataclass(slots=True, eq=False)
class Account:
    """What one client was served.

    Attributes:
        served: tokens, by the client's weight, with those that are only expected.
        expected: how many of them what runs has yet to produce.
        usual: how many tokens its last answers had, None before the first.
        lines: where it has requests that wait, by lane.
    """

    served: float = 0.0
    expected: float = 0.0
    usual: float | None = None
    lines: dict[Lane, Line] = field(default_factory=dict)

    @property
    def settled(self) -> float:
        """Without what is only expected."""
        return self.served - self.expected


@dataclass(slots=True, eq=False)
class Ledger:
    """The accounts of all clients with the workers that serve some models.

    Attributes:
        level: the settled account of the client that was given a slot last; lower ones wait, or have been away.
    """

    level: float = 0.0
    accounts: dict[Principal, Account] = field(default_factory=dict)

    def of(self, principal: Principal) -> Account:
        """A client's account; a new one is level with the others."""
        account = self.accounts.get(principal)
        if account is None:
            account = self.accounts[principal] = Account(self.level)
        return account

    def lift(self, principal: Principal, level: float) -> Account:
        """A client that has nothing queued asks for something: time away is no credit."""
        account = self.of(principal)
        if not account.lines:
            account.served = max(account.served, level)
        return account

    def absorb(self, other: Ledger) -> None:
        """The workers of both serve a model in common from now on.

        By how much a client is ahead of the others, or behind them, it is in the sum of both.
        """
        for principal, theirs in other.accounts.items():
            ours = self.of(principal)
            ours.served += theirs.served - other.level
            ours.expected += theirs.expected
            ours.usual = theirs.usual if ours.usual is None else ours.usual
            ours.lines |= theirs.lines
            for line in theirs.lines.values():
                line.account = ours
