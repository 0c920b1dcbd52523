"""Models that run when they are asked for, within the memory there is: stories, then random demand."""

from __future__ import annotations

from launcher.plankit import demand, lines, load, make, of, plan, ready, told
from loopmux_launcher.backoff import CRASHES
from loopmux_launcher.events import (
    Announce,
    Began,
    BuildEnvironment,
    ConfigurationChanged,
    EnvironmentReady,
    Finish,
    ProcessExited,
    ProcessReported,
    StartWorker,
    StopProcess,
    StopRequested,
    TimerFired,
)
from loopmux_launcher.groups import Group
from loopmux_launcher.plan import Plan
from loopmux_launcher.scaling import PATIENCE


def lazy(name: str = "m", *, most: int = 1, idle: float = 60.0, memory: float = 0.0, **rest: object) -> Group:
    return make(name, processes=0, most=most, idle_timeout=idle, memory=memory, **rest)  # type: ignore[arg-type]


def begun(*groups: Group, budget: float | None = None) -> Plan:
    core = plan(*groups, budget=budget)
    core.handle(Began(), 0.0)
    return core


def test_a_model_starts_with_its_first_request_and_stops_when_it_is_idle() -> None:
    core = plan(lazy())
    first = core.handle(Began(), 0.0)
    assert of(StartWorker, first) == []
    assert told(first)["m"].phase == "idle"
    assert told(first)["m"].scales
    assert lines(first, "ready") == ["ready after 0.0 s: on demand m"]

    asked = demand(core, m=2, now=5.0)
    assert [a.name for a in of(StartWorker, asked)] == ["m-1"]
    assert told(asked)["m"].phase == "loading"
    core.handle(ProcessReported("m-1", "warming"), 6.0)
    assert told(ready(core, "m-1", now=7.0))["m"].phase == "ready"

    assert demand(core, load("m-1", running=2), now=8.0) == []
    assert demand(core, load("m-1", idle=59.0), now=70.0) == []
    idle = demand(core, load("m-1", idle=60.0), now=71.0)
    assert of(StopProcess, idle) == [StopProcess("m-1")]
    assert "there is not enough to do" in lines(idle, "info")[0]
    assert told(idle)["m"].phase == "idle"
    assert lines(core.handle(ProcessExited("m-1", 0), 71.2), "info") == ["stopped"]
    assert core.next_timer() is None
    assert [a.name for a in of(StartWorker, demand(core, m=1, now=99.0))] == ["m-1"]


def test_who_asks_while_it_stops_has_it_started_again_when_it_is_gone() -> None:
    core = begun(lazy(idle=1.0))
    demand(core, m=1, now=1.0)
    ready(core, "m-1", now=2.0)
    demand(core, load("m-1", idle=1.0), now=3.0)
    again = demand(core, m=1, now=3.1)
    assert of(StartWorker, again) == []
    assert (told(again)["m"].phase, told(again)["m"].detail) == (
        "queued",
        "the process before it is still ending what it runs",
    )
    assert [a.name for a in of(StartWorker, core.handle(ProcessExited("m-1", 0), 3.2))] == ["m-1"]


def test_one_that_somebody_drained_is_started_again_for_who_waits() -> None:
    core = begun(lazy())
    demand(core, m=1, now=1.0)
    ready(core, "m-1", now=2.0)
    left = core.handle(ProcessExited("m-1", 0), 3.0)
    assert of(StartWorker, left) == []
    assert told(left)["m"].phase == "idle"
    assert core.next_timer() is None
    assert [a.name for a in of(StartWorker, demand(core, m=1, now=4.0))] == ["m-1"]


def test_an_environment_is_built_when_the_first_request_needs_it() -> None:
    core = plan(lazy(environment="e"))
    assert of(BuildEnvironment, core.handle(Began(), 0.0)) == []
    asked = demand(core, m=1, now=1.0)
    assert of(BuildEnvironment, asked) == [BuildEnvironment("e")]
    assert told(asked)["m"].phase == "building"
    assert [a.name for a in of(StartWorker, core.handle(EnvironmentReady("e", "/e", ""), 2.0))] == ["m-1"]


def test_more_processes_run_while_requests_wait_and_none_too_many() -> None:
    core = begun(lazy(most=2))
    demand(core, m=9, now=0.0)
    ready(core, "m-1", now=1.0)
    busy = load("m-1", running=4)
    assert of(StartWorker, demand(core, busy, now=2.0, m=5)) == []
    grown = demand(core, busy, now=2.0 + PATIENCE, m=5)
    assert [a.name for a in of(StartWorker, grown)] == ["m-2"]
    ready(core, "m-2", now=5.0)
    for now in range(6, 20):
        assert of(StartWorker, demand(core, busy, load("m-2", running=4), now=float(now), m=5)) == []


def test_what_always_runs_is_neither_stopped_nor_reported_as_scaling() -> None:
    core = begun(make("fixed"))
    ready(core, "fixed-1")
    assert not core.catalogue(1.0)[0].scales
    assert demand(core, load("fixed-1", idle=1e6), now=1e6) == []


def test_a_model_that_cannot_start_is_given_up_with_its_reason_and_does_not_end_the_launcher() -> None:
    core = begun(lazy())
    demand(core, m=1, now=0.0)
    now, last = 0.0, []
    for _ in range(CRASHES):
        last = core.handle(ProcessExited("m-1", 1, ("no such file",), 0.0), now + 0.1)
        now = core.next_timer() or now
        core.handle(TimerFired(), now)
    assert told(last)["m"].phase == "failed"
    assert "no such file" in told(last)["m"].detail
    assert of(Finish, last) == []
    assert of(StartWorker, demand(core, m=1, now=now + 100)) == []  # its requests are refused with that reason


def test_a_request_that_leaves_before_there_is_room_wants_nothing_any_more() -> None:
    core = begun(lazy("a", memory=2.0), lazy("b", memory=2.0), budget=2.0)
    demand(core, a=1, now=0.0)
    assert told(demand(core, a=1, b=1, now=0.5))["b"].phase == "queued"
    assert told(demand(core, a=1, now=1.0))["b"].phase == "idle"


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_least_valuable_idle_process_makes_room_and_who_waits_is_told_for_what() -> None:
    core = begun(*(lazy(name, memory=2.0) for name in "abcd"), budget=6.0)
    demand(core, a=1, b=1, d=1, now=0.0)
    ready(core, "a-1", "b-1", "d-1", now=1.0)
    idle = load("a-1", idle=10.0), load("b-1", idle=50.0), load("d-1", idle=20.0)
    asked = demand(core, *idle, now=100.0, c=1)
    assert of(StopProcess, asked) == [StopProcess("b-1")]
    assert told(asked)["c"].phase == "queued"
    assert told(asked)["c"].detail == "waits for 2 GiB of memory_gib: 6, of which others have: a 2, b 2, d 2"
    assert "makes room for c" in lines(asked, "info")[0]
    assert of(StopProcess, demand(core, idle[0], idle[2], now=100.5, c=1)) == []  # room is on its way
    assert [a.name for a in of(StartWorker, core.handle(ProcessExited("b-1", 0), 101.0))] == ["c-1"]


def test_nobody_is_stopped_who_is_busy_or_about_to_be_or_has_just_come() -> None:
    core = begun(lazy("a", memory=2.0), lazy("b", memory=2.0), make("fixed", memory=2.0), budget=4.0)
    ready(core, "fixed-1")
    demand(core, a=1, now=0.0)
    ready(core, "a-1", now=10.0)
    resting = load("a-1", idle=50.0), load("fixed-1", idle=50.0)
    for seconds, loads, queued in (
        (100.0, (load("a-1", running=1), resting[1]), {"b": 1}),
        (100.0, (load("a-1", idle=0.5), resting[1]), {"b": 1}),
        (100.0, resting, {"b": 1, "a": 1}),
        (19.0, resting, {"b": 1}),  # its start took 10 s
    ):
        assert of(StopProcess, demand(core, *loads, now=seconds, **queued)) == []
        demand(core, *loads, now=seconds)
    assert of(StopProcess, demand(core, *resting, now=200.0, b=1)) == [StopProcess("a-1")]


def test_an_old_report_stops_nobody() -> None:
    core = begun(lazy("a", memory=2.0), lazy("b", memory=2.0), budget=2.0)
    demand(core, a=1, now=0.0)
    ready(core, "a-1", now=1.0)
    demand(core, load("a-1", idle=1.5), b=1, now=3.0)  # it may stay a little longer
    assert of(StopProcess, core.handle(TimerFired(), 60.0)) == []


def test_who_waits_longest_for_memory_has_the_next_room() -> None:
    core = begun(lazy("a", memory=3.0), lazy("large", memory=4.0), lazy("small", memory=1.0), budget=4.0)
    demand(core, a=1, now=0.0)
    ready(core, "a-1", now=1.0)
    busy = load("a-1", running=1)
    demand(core, busy, now=2.0, large=1)
    # there is room for it, but it would keep the other one waiting
    assert of(StartWorker, demand(core, busy, now=3.0, large=1, small=1)) == []
    demand(core, load("a-1", idle=9.0), now=20.0, large=1, small=1)
    assert [a.name for a in of(StartWorker, core.handle(ProcessExited("a-1", 0), 21.0))] == ["large-1"]


def test_a_process_that_crashed_keeps_its_memory_until_it_is_back() -> None:
    core = begun(lazy("a", memory=2.0), lazy("b", memory=2.0), budget=2.0)
    demand(core, a=1, now=0.0)
    ready(core, "a-1", now=1.0)
    core.handle(ProcessExited("a-1", -9), 2.0)
    assert of(StartWorker, demand(core, now=2.1, b=1)) == []
    due = core.next_timer()
    assert due is not None
    assert [a.name for a in of(StartWorker, core.handle(TimerFired(), due))] == ["a-1"]


def test_a_lower_limit_applies_at_once_to_what_does_not_always_run() -> None:
    groups = (
        lazy("busy", most=2, memory=1.0),
        make("fixed", memory=1.0),
        lazy("rests", memory=2.0),
        lazy("loads", memory=1.0),
    )
    core = begun(*groups, budget=6.0)
    ready(core, "fixed-1")
    demand(core, busy=1, now=0.0)
    ready(core, "busy-1", now=1.0)
    loads = load("busy-1", running=4), load("fixed-1", idle=9.0), load("rests-1", idle=9.0), load("busy-2", running=1)
    demand(core, *loads[:1], busy=1, now=2.0)
    demand(core, *loads[:1], busy=1, now=2.0 + PATIENCE)
    ready(core, "busy-2", now=5.0)
    demand(core, rests=1, now=6.0)
    ready(core, "rests-1", now=7.0)
    demand(core, *loads, loads=1, now=8.0)
    assert core.workers["loads-1"].runs
    for budget, gone in ((6.0, []), (5.0, ["loads-1"]), (4.5, ["rests-1"]), (2.0, ["busy-2"]), (1.0, ["busy-1"])):
        actions = core.handle(ConfigurationChanged(groups, budget=budget), 9.0)
        assert of(StopProcess, actions) == [StopProcess(name) for name in gone]
        said = f"number of processes: {gone[0][:-2]}" if gone else "what runs stays as it is"
        assert lines(actions, "info")[-1] == f"configuration read again: {said}"
    for name in ("loads-1", "rests-1", "busy-2", "busy-1"):
        assert of(StartWorker, core.handle(ProcessExited(name, 0), 10.0)) == []
    waits = told(demand(core, load("fixed-1"), busy=1, now=11.0))["busy"]
    assert (waits.phase, waits.detail) == (
        "queued",
        "waits for 1 GiB of memory_gib: 1, of which others have: fixed 1",
    )


def test_of_a_model_those_that_work_stay_under_a_lower_limit_whichever_they_are() -> None:
    group = make("m", processes=1, most=3, memory=1.0)
    core = begun(group, budget=3.0)
    ready(core, "m-1")
    for name, now in (("m-2", 10.0), ("m-3", 20.0)):
        demand(core, load("m-1", running=1), load("m-2", running=1), m=1, now=now)
        demand(core, load("m-1", running=1), load("m-2", running=1), m=1, now=now + PATIENCE)
        ready(core, name, now=now + 5.0)
    demand(core, load("m-1", idle=9.0), load("m-2", running=1), load("m-3", running=1), now=30.0)
    core.handle(ProcessExited("m-2", -9), 31.0)
    for budget, gone in ((2.0, []), (1.0, [StopProcess("m-1")])):
        assert of(StopProcess, core.handle(ConfigurationChanged((group,), budget=budget), 31.1)) == gone
    assert {name: worker.alive for name, worker in core.workers.items()} == {"m-1": False, "m-2": False, "m-3": True}


def test_stopping_stops_what_runs_and_starts_nothing() -> None:
    core = begun(lazy("a"), lazy("b"))
    demand(core, a=1, now=0.0)
    assert of(StopProcess, core.handle(StopRequested(), 1.0)) == [StopProcess("a-1")]
    assert demand(core, now=1.1, b=1) == []
    assert of(Finish, core.handle(ProcessExited("a-1", 0), 1.2)) == [Finish(0)]


def test_what_is_on_demand_is_named_beside_what_is_ready() -> None:
    core = begun(lazy("a"), make("b"))
    assert [a.text for a in of(Announce, ready(core, "b-1", now=2.0)) if a.level == "ready"] == [
        "ready after 2.0 s: b; on demand a"
    ]
