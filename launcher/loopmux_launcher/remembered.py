"""What the launcher remembers of adapters that were loaded at run time: written down before it counts. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from loopmux.messages import AdapterOrder
from loopmux_launcher.adapters import Added, extended, without
from loopmux_launcher.events import Action, AdapterOrdered, AdaptersSaved, Announce, AnswerOrder, SaveAdapters
from loopmux_launcher.groups import Group


class Remembered:
    """The adapters that were added, and those of them that are ``idle``: their model is not in the configuration."""

    def __init__(self, added: Iterable[Added], idle: Collection[Added]) -> None:
        self._added = {one.name: one for one in added if one not in idle}
        self._idle = {one.name: one for one in idle}
        self._saving: dict[bytes, tuple[AdapterOrder, bool]] = {}

    def get(self, model: str) -> Added | None:
        """The adapter that is served under this model id."""
        return self._added.get(model)

    def renew(self, groups: Iterable[Group]) -> tuple[tuple[Group, ...], dict[Added, str]]:
        """The groups of another configuration, with all adapters that now have a model there.

        Returns:
            The groups, and those adapters that were served before and are idle from now on, with the reason.
        """
        before, known = self._added, (self._added | self._idle).values()
        extended_groups, left_out = extended(groups, known)
        self._added = {one.name: one for one in known if one not in left_out}
        self._idle = {one.name: one for one in left_out}
        return extended_groups, {one: why for one, why in left_out.items() if one.name in before}

    def ordered(self, event: AdapterOrdered, groups: Sequence[Group]) -> Iterator[Action]:
        """The broker wants an adapter remembered, or forgotten; said again meanwhile, it is answered once."""
        id_, order = event.id, event.order
        if id_ in self._saving:
            return
        one = Added(order.name, order.model, order.folder)
        if (self.get(order.name) == one) if event.load else (order.name not in self._added):
            yield AnswerOrder(id_)
        elif event.load and (trouble := self._cannot_add(one, groups)):
            yield AnswerOrder(id_, trouble)
        else:
            kept = [known for known in (self._added | self._idle).values() if known.name != order.name]
            self._saving[id_] = (order, event.load)
            yield SaveAdapters(id_, (*kept, one) if event.load else tuple(kept))

    def _cannot_add(self, one: Added, groups: Sequence[Group]) -> str:
        others = groups if one.name not in self._added else [without(group, one.name) for group in groups]
        return extended(others, [one])[1].get(one, "")

    def saved(self, event: AdaptersSaved) -> tuple[AdapterOrder, bool] | None:
        """It was written: what was ordered, and whether that was loading; None if it could not be written."""
        order, load = self._saving.pop(event.id)
        return None if event.trouble else (order, load)

    def apply(self, order: AdapterOrder, groups: Sequence[Group], *, load: bool) -> tuple[Group, ...]:
        """The groups, with an adapter or without it, as it is remembered from now on."""
        if order.name in self._added:
            groups = [without(group, order.name) for group in groups]
        self._added.pop(order.name, None)
        self._idle.pop(order.name, None)
        if load:
            one = self._added[order.name] = Added(order.name, order.model, order.folder)
            groups, _ = extended(groups, [one])
        return tuple(groups)


def answer(event: AdaptersSaved, done: tuple[AdapterOrder, bool] | None) -> Iterator[Action]:
    """The answer to the broker, and a line for people."""
    yield AnswerOrder(event.id, event.trouble)
    if done is None:
        yield Announce("launcher", event.trouble, "error")
    else:
        order, load = done
        yield Announce(f"adapter {order.name}", f"loaded for {order.model}" if load else "unloaded")
