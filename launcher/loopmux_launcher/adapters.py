"""Adapters that were loaded at run time, as the launcher remembers them: workers that it starts have them, too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from loopmux_launcher.groups import Group


@dataclass(frozen=True, slots=True)
class Added:
    """An adapter that was loaded for a model: it is served as ``name`` beside it. ``folder`` is absolute."""

    name: str
    model: str
    folder: str


def extended(groups: Iterable[Group], added: Iterable[Added]) -> tuple[tuple[Group, ...], dict[Added, str]]:
    """Groups whose workers are started with the adapters that were added.

    Returns:
        The groups, and those adapters whose model is not there any more, or whose name a model has, with that reason.
    """
    found, left_out = tuple(groups), dict[Added, str]()
    for one in added:
        at = next((i for i, group in enumerate(found) if one.model in group.model_ids), None)
        if at is None:
            left_out[one] = f"its model {one.model} is not in the configuration"
        elif any(one.name in group.model_ids for group in found):
            left_out[one] = "a model of the configuration has its name"
        else:
            found = (*found[:at], _with(found[at], one), *found[at + 1 :])
    return found, left_out


def _with(group: Group, one: Added) -> Group:
    """The adapter is asked as the model is that it was loaded for."""
    like = next(model for model in group.spec.models if model.id == one.model)
    more = replace(like, id=one.name, adapter_dir=one.folder)
    return replace(group, spec=replace(group.spec, models=(*group.spec.models, more)))


def without(group: Group, name: str) -> Group:
    """A group whose workers are started without an adapter."""
    models = tuple(model for model in group.spec.models if model.id != name)
    return replace(group, spec=replace(group.spec, models=models))
