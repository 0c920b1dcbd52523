"""Another configuration while everything runs: only what changed is touched, one process after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.plankit import demand, lines, load, make, of, plan, ready, told
from loopmux.cadence import LEAVE_PATIENTLY
from loopmux_launcher.backoff import CRASHES
from loopmux_launcher.events import (
    Action,
    Announce,
    Began,
    BuildEnvironment,
    ConfigurationChanged,
    ConfigurationRefused,
    EnvironmentFailed,
    EnvironmentReady,
    Event,
    Finish,
    KillProcess,
    ProcessExited,
    ReportPhase,
    StartWorker,
    StopBuild,
    StopProcess,
    StopRequested,
    TimerFired,
)
from loopmux_launcher.groups import Group
from loopmux_launcher.lifecycle import STOP_GRACE
from loopmux_launcher.plan import Plan


def begun(*groups: Group) -> Plan:
    """All that always runs is ready."""
    core = plan(*groups)
    core.handle(Began(), 0.0)
    for group in groups:
        if group.environment:
            core.handle(EnvironmentReady(group.environment, f"/{group.environment}/1", ""), 0.5)
        ready(core, *group.worker_names()[: group.fewest])
    return core


def change(core: Plan, *groups: Group, now: float = 10.0, environments: tuple[str, ...] = (),
           retry: bool = False) -> list[Action]:  # fmt: skip
    return core.handle(ConfigurationChanged(groups, frozenset(environments), None, retry), now)


def started(actions: list[Action]) -> list[str]:
    return [action.name for action in of(StartWorker, actions)]


def stopped(actions: list[Action]) -> list[str]:
    return [action.name for action in of(StopProcess, actions)]


def test_what_did_not_change_is_left_alone() -> None:
    core = begun(make("a"), make("b", processes=2))
    actions = change(core, make("b", processes=2), make("a"))
    assert (started(actions), stopped(actions), told(actions)) == ([], [], {})
    assert lines(actions, "info") == ["configuration read again: what runs stays as it is"]


def test_how_many_processes_there_are_is_a_change_that_is_told() -> None:
    core = begun(make("a", processes=2), make("b"))
    actions = change(core, make("a"), make("b"))
    assert stopped(actions) == ["a-2"]
    assert lines(actions, "info")[-1] == "configuration read again: number of processes: a"


def test_a_model_is_added_and_another_taken_out() -> None:
    core = begun(make("a"), make("b"))
    actions = change(core, make("a"), make("c"))
    assert started(actions) == ["c-1"]
    assert of(StopProcess, actions) == [StopProcess("b-1", patiently=True)]  # nobody else could end what it runs
    assert told(actions)["b"].removed
    assert told(actions)["c"].phase == "loading"
    assert lines(actions, "info")[-1] == "configuration read again: added: c; removed: b"
    assert of(KillProcess, core.handle(TimerFired(), 250.0 + STOP_GRACE)) == [KillProcess("b-1")]
    assert lines(core.handle(ProcessExited("b-1", -9), 256.0), "info") == ["stopped"]
    assert [entry.model for entry in core.catalogue(257.0)] == ["a", "c"]


def test_processes_are_replaced_one_after_the_other_by_the_new_settings() -> None:
    core = begun(make("m", processes=3))
    actions = change(core, make("m", processes=3, slots=7))
    assert lines(actions, "info")[0] == "configuration read again: changed: m"
    for n, name in enumerate(("m-1", "m-2", "m-3")):
        now = 20.0 + 10 * n
        assert (started(actions), stopped(actions)) == ([], [name])
        gone = core.handle(ProcessExited(name, 0), now)
        assert [(a.name, a.spec.slots) for a in of(StartWorker, gone)] == [(name, 7)]
        assert stopped(gone) == []
        actions = ready(core, name, now=now + 5)
    assert (started(actions), stopped(actions)) == ([], [])
    assert core.next_timer() is None


def test_what_runs_on_weights_that_go_is_given_the_time_to_end() -> None:
    core = begun(make("m", processes=2))
    other = make("m", processes=2)
    changed = replace(other, spec=replace(other.spec, base_model="/other"))
    assert of(StopProcess, change(core, changed)) == [StopProcess("m-1", patiently=True)]
    assert core.next_timer() == 10.0 + LEAVE_PATIENTLY + STOP_GRACE
    hurried = core.handle(StopRequested(), 20.0)
    assert of(StopProcess, hurried) == [StopProcess("m-1"), StopProcess("m-2")]
    assert core.next_timer() == 20.0 + STOP_GRACE


def test_what_starts_again_by_the_new_settings_is_of_their_kind() -> None:
    core = begun(make("m"))
    other = make("m")
    change(core, replace(other, spec=replace(other.spec, base_model="/other")))
    core.handle(ProcessExited("m-1", 0), 11.0)
    ready(core, "m-1", now=12.0)
    slots = replace(other, spec=replace(other.spec, base_model="/other", slots=7))
    assert of(StopProcess, change(core, slots, now=13.0)) == [StopProcess("m-1")]


def test_when_the_new_settings_do_not_work_the_rest_goes_on_by_the_old_ones() -> None:
    core = begun(make("m", processes=2))
    assert stopped(change(core, make("m", processes=2, slots=7))) == ["m-1"]
    assert started(core.handle(ProcessExited("m-1", 0), 11.0)) == ["m-1"]
    failed = core.handle(ProcessExited("m-1", 78, ("no such slots",)), 12.0)
    assert stopped(failed) == []
    assert told(failed)["m"].phase == "ready"
    assert "no such slots" in "".join(lines(failed, "error"))
    repaired = change(core, make("m", processes=2), now=20.0)
    assert started(repaired) == ["m-1"]  # it is tried again
    assert stopped(ready(core, "m-1", now=21.0)) == ["m-2"]  # and nobody knows by what the other one runs


def test_a_process_that_still_starts_by_the_old_settings_is_not_waited_for() -> None:
    core = plan(make("m", processes=2))
    core.handle(Began(), 0.0)
    assert stopped(change(core, make("m", processes=2, slots=7), now=1.0)) == ["m-1", "m-2"]


def test_fewer_and_more_processes() -> None:
    core = begun(make("m", processes=2))
    actions = change(core, make("m", processes=1))
    assert (started(actions), stopped(actions)) == ([], ["m-2"])
    # before it has left, it is wanted again
    actions = change(core, make("m", processes=3), now=11.0)
    assert (started(actions), stopped(actions)) == (["m-3"], [])
    assert started(core.handle(ProcessExited("m-2", 0), 12.0)) == ["m-2"]


def test_another_start_timeout_counts_from_the_next_start() -> None:
    core = begun(make("m"))
    assert stopped(change(core, make("m", timeout=7.0))) == []
    core.handle(ProcessExited("m-1", -9), 20.0)
    assert started(core.handle(TimerFired(), 21.0)) == ["m-1"]
    assert core.next_timer() == 28.0


def test_a_model_that_always_ran_goes_on_demand_and_back() -> None:
    core = begun(make("m"))
    change(core, make("m", processes=0, most=1, idle_timeout=5.0))
    assert stopped(demand(core, load("m-1", idle=9.0), now=30.0)) == ["m-1"]
    core.handle(ProcessExited("m-1", 0), 31.0)
    assert started(change(core, make("m"), now=40.0)) == ["m-1"]


def test_what_was_given_up_is_tried_again_when_it_changed_or_somebody_asks() -> None:
    core = begun(make("good"), make("bad"))
    now = 2.0
    for _ in range(1 + CRASHES):  # it was ready once
        core.handle(ProcessExited("bad-1", 1), now)
        now = core.next_timer() or now
        core.handle(TimerFired(), now)
    assert core.workers["bad-1"].state.value == "parked"
    assert started(change(core, make("good"), make("bad"), now=now)) == []
    assert started(change(core, make("good"), make("bad"), now=now, retry=True)) == ["bad-1"]
    core.handle(ProcessExited("bad-1", 78), now + 1)
    assert started(change(core, make("good"), make("bad", slots=7), now=now + 2)) == ["bad-1"]


def test_a_refused_configuration_changes_nothing_and_is_told_until_a_good_one_comes() -> None:
    core = begun(make("m"))
    refused = core.handle(ConfigurationRefused("x.yaml:3: models.m.slots: found 0, expected at least 1"), 10.0)
    assert [type(action) for action in refused] == [Announce]
    assert "found 0, expected at least 1" in lines(refused, "error")[0]
    assert core.note.startswith("configuration: refused, the former one stays in force: x.yaml:3")
    change(core, make("m"))
    assert core.note == ""


# --- environments -----------------------------------------------------------------------------------------------------


def test_a_changed_environment_is_built_beside_and_then_moved_into() -> None:
    core = begun(make("m", environment="e", processes=2))
    actions = change(core, make("m", environment="e", processes=2), environments=("e",))
    assert of(BuildEnvironment, actions) == [BuildEnvironment("e")]
    assert (started(actions), stopped(actions)) == ([], [])
    assert [entry.phase for entry in core.catalogue(11.0)] == ["ready"]
    assert lines(actions, "info") == ["configuration read again: environments changed: e"]
    built = core.handle(EnvironmentReady("e", "/e/2", ""), 60.0)
    assert of(StopProcess, built) == [StopProcess("m-1")]  # what it runs can go on in the other one
    assert lines(built, "info")[0] == "ready in 50.0 s: "
    gone = core.handle(ProcessExited("m-1", 0), 61.0)
    assert [(a.name, a.python) for a in of(StartWorker, gone)] == [("m-1", "/e/2")]
    assert stopped(ready(core, "m-1", now=65.0)) == ["m-2"]
    core.handle(ProcessExited("m-2", 0), 66.0)
    ready(core, "m-2", now=67.0)
    change(core, make("m", environment="e", processes=2), now=70.0, retry=True)
    assert stopped(core.handle(EnvironmentReady("e", "/e/2", ""), 71.0)) == []  # they are in it


def test_what_changed_in_an_environment_is_gone_by_even_where_its_interpreter_stays_the_same() -> None:
    core = begun(make("m", environment="e"))
    change(core, make("m", environment="e"), environments=("e",))  # its variables, say
    assert stopped(core.handle(EnvironmentReady("e", "/e/1", ""), 11.0)) == ["m-1"]
    assert started(core.handle(ProcessExited("m-1", 0), 12.0)) == ["m-1"]


def test_a_build_that_fails_leaves_everything_as_it_was() -> None:
    core = begun(make("m", environment="e"))
    change(core, make("m", environment="e"), environments=("e",))
    failed = core.handle(EnvironmentFailed("e", "no such package"), 20.0)
    assert (started(failed), stopped(failed), told(failed)) == ([], [], {})
    assert "no such package" in lines(failed, "error")[0]
    assert "environment e: cannot be built as it is declared now" in core.note
    core.handle(ProcessExited("m-1", -9), 30.0)
    due = core.next_timer()
    assert due is not None
    assert [a.python for a in of(StartWorker, core.handle(TimerFired(), due))] == ["/e/1"]
    ready(core, "m-1", now=32.0)
    # the network is back
    assert of(BuildEnvironment, change(core, make("m", environment="e"), now=40.0)) == []
    assert of(BuildEnvironment, change(core, make("m", environment="e"), now=41.0, retry=True)) == [
        BuildEnvironment("e")
    ]
    assert stopped(core.handle(EnvironmentReady("e", "/e/2", ""), 50.0)) == ["m-1"]


def test_what_is_said_of_an_environment_that_cannot_be_built_ends_with_what_it_is_about() -> None:
    for group, environments in ((make("m", environment="e"), ("e",)), (make("m"), ())):
        core = begun(make("m", environment="e"))
        change(core, make("m", environment="e"), environments=("e",))
        core.handle(EnvironmentFailed("e", "no such package"), 20.0)
        assert core.note
        change(core, group, now=30.0, environments=environments)
        assert core.note == ""


def test_when_somebody_asks_an_environment_is_looked_at_again_and_another_build_of_it_moved_into() -> None:
    core = begun(make("m", environment="e"))
    assert of(BuildEnvironment, change(core, make("m", environment="e"), retry=True)) == [BuildEnvironment("e")]
    assert [entry.phase for entry in core.catalogue(11.0)] == ["ready"]
    same = core.handle(EnvironmentReady("e", "/e/1", ""), 11.0)
    assert (started(same), stopped(same)) == ([], [])
    change(core, make("m", environment="e"), now=20.0, retry=True)
    assert stopped(core.handle(EnvironmentReady("e", "/e/2", ""), 21.0)) == ["m-1"]
    assert [a.python for a in of(StartWorker, core.handle(ProcessExited("m-1", 0), 22.0))] == ["/e/2"]


def test_who_crashes_before_the_environment_to_come_was_ever_ready_waits_for_it() -> None:
    core = begun(make("m"))
    assert of(BuildEnvironment, change(core, make("m", environment="e"))) == [BuildEnvironment("e")]
    core.handle(ProcessExited("m-1", -9), 11.0)
    woken = core.handle(TimerFired(), 12.0)
    assert (started(woken), told(woken)) == ([], {})
    assert core.next_timer() is None
    [anew] = of(StartWorker, core.handle(EnvironmentReady("e", "/e/1", ""), 13.0))
    assert (anew.name, anew.python) == ("m-1", "/e/1")


def test_who_could_not_look_at_an_environment_once_finds_it_as_it_was_the_next_time() -> None:
    core = begun(make("m", environment="e"))
    change(core, make("m", environment="e"), retry=True)
    core.handle(EnvironmentFailed("e", "no space left"), 11.0)
    assert core.note
    change(core, make("m", environment="e"), now=20.0, retry=True)
    same = core.handle(EnvironmentReady("e", "/e/1", ""), 21.0)
    assert (started(same), stopped(same), core.note) == ([], [], "")


def test_what_was_given_up_in_a_damaged_environment_is_tried_again_in_the_next_build_of_it() -> None:
    core = begun(make("m", environment="e"), make("n"))
    core.handle(ProcessExited("m-1", 78), 5.0)
    asked = change(core, make("m", environment="e"), make("n"), retry=True)
    assert started(asked) == []  # not in the one that was seen to be damaged
    anew = core.handle(EnvironmentReady("e", "/e/2", ""), 21.0)
    assert [(a.name, a.python) for a in of(StartWorker, anew)] == [("m-1", "/e/2")]


@pytest.mark.parametrize("end", [EnvironmentFailed("e", "interrupted"), EnvironmentReady("e", "/e/1", "just then")])
def test_a_build_that_a_change_has_overtaken_is_ended_and_done_anew(end: Event) -> None:
    core = plan(make("m", environment="e"))
    core.handle(Began(), 0.0)
    assert of(StopBuild, change(core, make("m", environment="e"), now=1.0, environments=("e",))) == [StopBuild("e")]
    anew = core.handle(end, 2.0)
    assert of(Announce, anew) == []
    assert of(BuildEnvironment, anew) == [BuildEnvironment("e")]
    assert started(anew) == []
    assert started(core.handle(EnvironmentReady("e", "/e/2", ""), 3.0)) == ["m-1"]


@pytest.mark.parametrize("end", [EnvironmentFailed("e", "interrupted"), EnvironmentReady("e", "/e/1", "just then")])
def test_an_environment_that_nobody_names_any_more_is_forgotten(end: Event) -> None:
    core = plan(make("m", environment="e"), make("n"))
    core.handle(Began(), 0.0)
    ready(core, "n-1")
    assert of(StopBuild, change(core, make("n"), now=1.0)) == [StopBuild("e")]
    assert core.handle(end, 2.0) == []
    assert of(Finish, core.handle(StopRequested(), 3.0)) == []
    assert of(Finish, core.handle(ProcessExited("n-1", 0), 3.1)) == [Finish(0)]


def test_an_environment_that_failed_is_tried_again_when_it_changed() -> None:
    core = plan(make("m", environment="e"), make("n"))
    core.handle(Began(), 0.0)
    core.handle(EnvironmentFailed("e", "no such package"), 1.0)
    actions = change(core, make("m", environment="e"), make("n"), now=2.0, environments=("e",))
    assert of(BuildEnvironment, actions) == [BuildEnvironment("e")]
    assert told(actions)["m"].phase == "building"


def test_what_could_not_be_built_by_a_wrong_file_is_tried_again_by_a_good_one() -> None:
    core = plan(make("m", environment="e"), make("n", environment="used"), make("o", environment="good"))
    core.handle(Began(), 0.0)
    for name in ("used", "good"):
        core.handle(EnvironmentReady(name, f"/{name}/1", ""), 0.5)
    groups = make("m", environment="e"), make("n", environment="used"), make("o", environment="good")
    assert of(BuildEnvironment, change(core, *groups, now=1.0, environments=("used",))) == [BuildEnvironment("used")]
    core.handle(ConfigurationRefused("x.yaml:3: found an unknown key"), 2.0)
    for name in ("e", "used"):
        core.handle(EnvironmentFailed(name, "x.yaml:3: found an unknown key"), 2.5)
    assert of(BuildEnvironment, change(core, *groups, now=3.0)) == [BuildEnvironment("e"), BuildEnvironment("used")]
    for name in ("e", "used"):
        core.handle(EnvironmentFailed(name, "no such package"), 4.0)
    assert of(BuildEnvironment, change(core, *groups, now=5.0)) == []


def test_stopping_in_the_middle_of_it_all() -> None:
    core = begun(make("a"), make("b", processes=2))
    change(core, make("b", processes=2, slots=7))  # a-1 leaves, b-1 is being replaced
    stopping = core.handle(StopRequested(), 11.0)
    assert stopped(stopping) == ["b-2", "a-1"]  # which had been given its time
    assert of(ReportPhase, stopping) == []
    assert change(core, make("c"), now=11.5) == []
    for name in ("a-1", "b-1"):
        assert of(Finish, core.handle(ProcessExited(name, 0), 12.0)) == []
    assert of(Finish, core.handle(ProcessExited("b-2", 0), 12.1)) == [Finish(0)]
