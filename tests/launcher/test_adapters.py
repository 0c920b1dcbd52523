"""Adapters that were loaded at run time, as the launcher remembers them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.plankit import make
from loopmux.codec import pack, unpack
from loopmux.errors import ConfigError
from loopmux.messages import AdapterOrder, Catalogue, Demand, Done, ModelSpec, Register, Welcome, WorkerSpec
from loopmux.wire import VERSION, VERSIONS, Header, Kind, Message
from loopmux_launcher import adapterstore
from loopmux_launcher.adapters import Added, extended
from loopmux_launcher.events import (
    Action,
    AdapterOrdered,
    AdaptersSaved,
    Announce,
    AnswerOrder,
    Began,
    BrokerWelcomed,
    ConfigurationChanged,
    DemandReported,
    ModelLeftOut,
    ProcessExited,
    ProcessReported,
    ReportPhase,
    SaveAdapters,
    StartWorker,
    TimerFired,
)
from loopmux_launcher.groups import Group
from loopmux_launcher.link import Link
from loopmux_launcher.plan import Plan

ID, NEXT = b"o" * 16, b"p" * 16
LOUD = Added("loud", "m", "/adapters/loud")
ORDER = AdapterOrder("m", "loud", "/adapters/loud")
TYPES = (ModelSpec("m", None, "base", "be brief"), ModelSpec("n"))
GROUP = Group("m", None, WorkerSpec("m", "ipc:///x", TYPES, engine="echo"), 2, 100.0)


def begun(*added: Added) -> Plan:
    groups, idle = extended([GROUP], added)
    core = Plan(groups, with_broker=False, added=added, idle=idle)
    core.handle(Began(), 0.0)
    for name in ("m-1", "m-2"):
        core.handle(ProcessReported(name, "ready"), 1.0)
    return core


def loaded(core: Plan, id_: bytes = ID) -> list[Action]:
    core.handle(AdapterOrdered(id_, ORDER, load=True), 2.0)
    return core.handle(AdaptersSaved(id_), 2.0)


def told(actions: list[Action]) -> dict[str, Catalogue]:
    return {a.catalogue.model: a.catalogue for a in actions if isinstance(a, ReportPhase)}


def restarted(core: Plan, name: str) -> tuple[ModelSpec, ...]:
    """What a worker that died is started with."""
    core.handle(ProcessExited(name, -9), 3.0)
    actions = core.handle(TimerFired(), 100.0)
    [start] = [a for a in actions if isinstance(a, StartWorker)]
    return start.spec.models


# --- the core ---------------------------------------------------------------------------------------------------------


def test_it_is_written_down_then_answered_declared_and_part_of_every_start() -> None:
    core = begun()
    [save] = core.handle(AdapterOrdered(ID, ORDER, load=True), 2.0)
    assert save == SaveAdapters(ID, (LOUD,))
    assert core.handle(AdapterOrdered(ID, ORDER, load=True), 2.0) == []  # said again meanwhile
    actions = core.handle(AdaptersSaved(ID), 2.0)
    assert [type(action) for action in actions] == [ReportPhase, AnswerOrder, Announce]  # the broker goes by it
    assert told(actions) == {"loud": Catalogue("loud", "ready", workers=2, onto="m", folder="/adapters/loud")}
    assert restarted(core, "m-1") == (*TYPES, ModelSpec("loud", "/adapters/loud", "base", "be brief"))
    assert core.handle(AdapterOrdered(NEXT, ORDER, load=True), 4.0)[0] == AnswerOrder(NEXT)  # nothing new to write
    assert "loud" in told(core.handle(BrokerWelcomed(), 5.0))


def test_what_cannot_be_written_is_not_remembered() -> None:
    core = begun()
    core.handle(AdapterOrdered(ID, ORDER, load=True), 2.0)
    actions = core.handle(AdaptersSaved(ID, "the disk is full"), 2.0)
    assert actions[0] == AnswerOrder(ID, "the disk is full")
    assert told(actions) == {}
    assert restarted(core, "m-1") == TYPES


def test_another_folder_takes_the_place_of_the_former() -> None:
    core = begun(LOUD)
    other = replace(ORDER, folder="/adapters/louder")
    assert core.handle(AdapterOrdered(ID, other, load=True), 2.0) == [
        SaveAdapters(ID, (Added("loud", "m", "/adapters/louder"),))
    ]
    assert told(core.handle(AdaptersSaved(ID), 2.0))["loud"].folder == "/adapters/louder"
    assert [m.adapter_dir for m in restarted(core, "m-2") if m.id == "loud"] == ["/adapters/louder"]


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (AdapterOrder("x", "loud", "/a"), "its model x is not in the configuration"),
        (AdapterOrder("m", "n", "/a"), "a model of the configuration has its name"),
    ],
)
def test_what_cannot_be_remembered(order: AdapterOrder, why: str) -> None:
    assert begun().handle(AdapterOrdered(ID, order, load=True), 2.0) == [AnswerOrder(ID, why)]


def test_of_several_groups_each_has_what_is_for_its_models_and_none_is_lost() -> None:
    adapters = Added("x", "a", "/x"), Added("c", "b", "/c"), Added("y", "c", "/y"), Added("z", "y", "/z")
    groups, left_out = extended([make("a"), make("b"), make("c")], adapters)
    assert [group.model_ids for group in groups] == [("a", "x"), ("b",), ("c", "y", "z")]
    assert left_out == {adapters[1]: "a model of the configuration has its name"}


def test_it_is_forgotten_and_taken_out_of_the_catalogue() -> None:
    core = begun()
    loaded(core)
    assert core.handle(AdapterOrdered(NEXT, AdapterOrder("m", "loud"), load=False), 3.0) == [SaveAdapters(NEXT, ())]
    actions = core.handle(AdaptersSaved(NEXT), 3.0)
    assert AnswerOrder(NEXT) in actions
    assert told(actions) == {"loud": Catalogue("loud", "idle", removed=True)}
    assert restarted(core, "m-1") == TYPES
    assert core.handle(AdapterOrdered(ID, AdapterOrder("m", "loud"), load=False), 4.0) == [AnswerOrder(ID)]


def test_one_that_was_left_out_at_a_start_is_served_once_it_was_loaded() -> None:
    groups, _ = extended([GROUP], [LOUD])
    core = Plan(groups, with_broker=False, added=[LOUD])
    core.handle(Began(), 0.0)
    for name in ("m-1", "m-2"):
        core.handle(ModelLeftOut(name, "loud", "there is no such folder"), 1.0)
        core.handle(ProcessReported(name, "ready"), 1.0)
    other = replace(ORDER, folder="/adapters/found")
    core.handle(AdapterOrdered(ID, other, load=True), 2.0)
    assert told(core.handle(AdaptersSaved(ID), 2.0))["loud"].phase == "ready"


def test_what_has_no_model_any_more_is_kept_for_when_it_has() -> None:
    gone, taken = Added("quiet", "former", "/adapters/quiet"), Added("n", "m", "/adapters/n")
    core = begun(LOUD, gone, taken)
    assert restarted(core, "m-1")[-1].id == "loud"
    assert told(core.handle(BrokerWelcomed(), 5.0))["n"].onto is None
    [save] = core.handle(AdapterOrdered(ID, AdapterOrder("m", "loud"), load=False), 6.0)
    assert save == SaveAdapters(ID, (gone, taken))


def reloaded(core: Plan, *groups: Group) -> list[Action]:
    return core.handle(ConfigurationChanged(groups), 10.0)


def test_a_configuration_that_is_read_again_keeps_them() -> None:
    core = begun()
    loaded(core)
    actions = reloaded(core, GROUP)
    assert [type(action) for action in actions] == [Announce]  # nothing is restarted, or taken back
    assert restarted(core, "m-1")[-1] == ModelSpec("loud", "/adapters/loud", "base", "be brief")


def test_one_whose_model_is_taken_out_is_served_again_when_it_is_back() -> None:
    core = begun(LOUD)
    other = Group("o", None, WorkerSpec("o", "ipc:///x", (ModelSpec("o"),), engine="echo"), 1, 100.0)
    actions = reloaded(core, other)
    warned = [a for a in actions if isinstance(a, Announce) and a.level == "warning"]
    assert warned == [
        Announce(
            "adapter loud",
            "loaded at run time, is not served any more: its model m is not in the configuration",
            "warning",
        )
    ]
    assert told(actions)["loud"] == Catalogue("loud", "idle", removed=True)
    assert not [a for a in reloaded(core, other) if isinstance(a, Announce) and a.level == "warning"]  # said once
    [save] = core.handle(AdapterOrdered(ID, AdapterOrder("o", "new", "/a"), load=True), 11.0)
    assert save == SaveAdapters(ID, (LOUD, Added("new", "o", "/a")))
    core.handle(AdaptersSaved(ID), 11.0)
    back = told(reloaded(core, GROUP, other))
    assert (back["loud"].onto, back["loud"].folder) == ("m", "/adapters/loud")


def test_one_whose_name_a_model_of_the_configuration_gets_gives_way_to_it() -> None:
    core = begun(LOUD)
    named = replace(GROUP, spec=replace(GROUP.spec, models=(*TYPES, ModelSpec("loud", "/configured"))))
    assert told(reloaded(core, named))["loud"].onto is None
    [start] = [a for a in core.handle(ProcessExited("m-1", 0), 11.0) if isinstance(a, StartWorker)]
    assert start.spec.models == (*TYPES, ModelSpec("loud", "/configured"))


def test_one_of_a_model_on_demand_is_asked_for_as_that_is() -> None:
    core = Plan([replace(GROUP, fewest=0, most=1)], with_broker=False)
    core.handle(Began(), 0.0)
    core.handle(DemandReported(Demand({"m": 1})), 0.5)
    core.handle(ProcessReported("m-1", "ready"), 1.0)
    loaded(core)
    core.handle(ProcessExited("m-1", 0), 3.0)
    actions = core.handle(DemandReported(Demand({"loud": 1})), 200.0)
    actions += core.handle(TimerFired(), 300.0)
    [start] = [a for a in actions if isinstance(a, StartWorker)]
    assert start.spec.models[-1].id == "loud"
    [loud] = [one for one in core.catalogue(300.0) if one.model == "loud"]
    assert loud.scales


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "adapters" / "stack.json"
    assert adapterstore.read(file) == ()
    adapterstore.write(file, [LOUD])
    assert adapterstore.read(file) == (LOUD,)
    assert [path.name for path in file.parent.iterdir()] == ["stack.json"]


@pytest.mark.parametrize(
    "text", ["", "[", '{"name": "x"}', '[{"name": "x"}]', '[{"name": 1, "model": "", "folder": ""}]']
)
def test_a_damaged_file_is_refused_with_its_name_and_what_to_do(tmp_path: Path, text: str) -> None:
    file = tmp_path / "stack.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"stack\.json: found what is no list .* remove it and load them again"):
        adapterstore.read(file)


def test_a_write_that_fails_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stack.json"
    adapterstore.write(file, [LOUD])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        adapterstore.write(file, [])
    assert adapterstore.read(file) == (LOUD,)
    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]


# --- the wire ---------------------------------------------------------------------------------------------------------


def test_orders_come_over_the_link_and_are_answered() -> None:
    link = Link(Register("launcher", "launcher@host", bytes(16), VERSIONS))
    link.received(Message(Header(Kind.WELCOME), pack(Welcome(VERSION, b"e" * 8, 1.0, 1 << 20, 1024))), 0.0)
    for kind in (Kind.LOAD, Kind.UNLOAD):
        ordered = link.received(Message(Header(kind, ID), pack(ORDER)), 1.0)
        assert ordered == AdapterOrdered(ID, ORDER, kind is Kind.LOAD)
    [done] = link.answer(ID, "")
    assert (done.kind, done.header.request, unpack(Done, done.body)) == (Kind.DONE, ID, Done())
    [failed] = link.answer(ID, "the disk is full")
    failure = unpack(Done, failed.body).failure
    assert failure is not None
    assert failure.message == "the disk is full"
    [long] = link.answer(ID, "/folder" * 1000)
    unpack(Done, long.body)  # the broker would take nothing longer
    link.lost()
    assert link.answer(ID, "") == []  # it asks again
