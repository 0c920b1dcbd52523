"""Accounts: how many tokens each client was served by workers that serve the same models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopmux_broker.clients import Principal
    from loopmux_broker.requests import Lane, Request

Turn = tuple[float, float, int, int, "Line"]
"""When a line's turn comes: (tokens served less the head start of its first, arrival less head start, number of that
request, number of this turn, line)."""

_SLACK = 64
"""Models that nobody knows any more and whose ledgers may be kept before they are swept."""


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
class Line:
    """One principal's requests in one lane, sorted backwards so that the next one is popped off the end."""

    account: Account
    entries: list[tuple[float, int, Request]] = field(default_factory=list)
    turn: Turn | None = None


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
        """The account of a client that asks for something; with nothing queued it starts no lower than ``level``.

        Time away is no credit.
        """
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


class Ledgers:
    """By model: those that a worker serves together have one in common."""

    def __init__(self, known: Callable[[str], bool]) -> None:
        """``known`` says whether anybody serves, declares or waits for a model."""
        self._known = known
        self._by_model: dict[str, Ledger] = {}
        self._swept = 0  # how many models there were after the last sweep

    def get(self, model: str) -> Ledger | None:
        """A model's ledger, if there is one."""
        return self._by_model.get(model)

    def of(self, model: str) -> Ledger:
        """A model's ledger; it may be a new one."""
        ledger = self._by_model.get(model)
        if ledger is None:
            self._sweep()
            ledger = self._by_model[model] = Ledger()
        return ledger

    def unite(self, models: Iterable[str]) -> list[Account]:
        """Let models have one ledger from now on. Returns the accounts that changed by that."""
        models = list(models)
        found = dict.fromkeys(self._by_model[model] for model in models if model in self._by_model)
        kept, *rest = found or [Ledger()]
        absorbed = dict.fromkeys(rest)
        for ledger in absorbed:
            kept.absorb(ledger)
        self._by_model |= {model: kept for model, ledger in self._by_model.items() if ledger in absorbed}
        self._sweep()
        self._by_model |= dict.fromkeys(models, kept)
        return [kept.accounts[who] for who in dict.fromkeys(who for ledger in absorbed for who in ledger.accounts)]

    def forget(self, principal: Principal) -> None:
        """Drop the accounts of somebody who is gone for good."""
        for ledger in dict.fromkeys(self._by_model.values()):
            ledger.accounts.pop(principal, None)

    def _sweep(self) -> None:
        if len(self._by_model) > 2 * self._swept + _SLACK:
            self._by_model = {model: ledger for model, ledger in self._by_model.items() if self._known(model)}
            self._swept = len(self._by_model)
