"""The launcher's core as stories: events in, actions out."""

from __future__ import annotations

from dataclasses import replace

from launcher.plankit import lines, make, of, plan, ready, told
from loopmux.cadence import LEAVE_PATIENTLY
from loopmux.codec import pack
from loopmux.messages import Catalogue
from loopmux.wire import ROUTE_LIMIT
from loopmux_launcher.backoff import CRASHES
from loopmux_launcher.events import (
    Action,
    Announce,
    Began,
    BrokerWelcomed,
    BuildEnvironment,
    ConfigurationChanged,
    EnvironmentFailed,
    EnvironmentProgressed,
    EnvironmentReady,
    Finish,
    KillProcess,
    ModelLeftOut,
    ProcessExited,
    ProcessReported,
    ReportPhase,
    StartBroker,
    StartWorker,
    StopBuild,
    StopProcess,
    StopRequested,
    TimerFired,
)
from loopmux_launcher.lifecycle import STOP_GRACE
from loopmux_launcher.plan import Plan

# --- starting ---------------------------------------------------------------------------------------------------------


def test_a_model_is_built_loaded_warmed_and_ready_and_the_broker_hears_of_it() -> None:
    core = plan(make("m", environment="e", processes=2))
    begun = core.handle(Began(), 0.0)
    assert of(BuildEnvironment, begun) == [BuildEnvironment("e")]
    assert of(StartWorker, begun) == []
    assert told(begun)["m"].phase == "building"
    assert told(core.handle(EnvironmentProgressed("e", "collecting torch"), 1.0))["m"].detail == "collecting torch"

    started = core.handle(EnvironmentReady("e", "/e/bin/python", "torch 2"), 2.0)
    assert [(a.name, a.python, a.spec.name) for a in of(StartWorker, started)] == [
        ("m-1", "/e/bin/python", "m-1"),
        ("m-2", "/e/bin/python", "m-2"),
    ]
    assert told(started)["m"].phase == "loading"
    warming = core.handle(ProcessReported("m-1", "warming", "one token"), 3.0)
    assert told(warming)["m"] == Catalogue("m", "warming", 0.0, "one token")
    assert of(Announce, warming) == [Announce("m-1", "warming one token", "progress")]
    first = ready(core, "m-1", now=4.0)
    assert told(first)["m"] == Catalogue("m", "ready", 0.0, "", 1)
    assert of(Announce, first) == [Announce("m-1", "ready in 2.0 s")]
    assert lines(first, "ready") == []  # but not every process of it
    second = ready(core, "m-2", now=5.0)
    assert told(second)["m"].workers == 2


def test_the_ready_line_comes_once_when_every_required_model_is() -> None:
    core = plan(make("a"), make("b"), make("lazy", processes=0, most=1))
    core.handle(Began(), 0.0)
    assert lines(ready(core, "a-1"), "ready") == []
    (line,) = lines(ready(core, "b-1", now=3.0), "ready")
    assert line.split() == ["ready", "after", "3.0", "s:", "a,", "b;", "on", "demand", "lazy"]
    core.handle(ProcessExited("a-1", -9), 4.0)
    core.handle(TimerFired(), 5.0)
    assert lines(ready(core, "a-1", now=6.0), "ready") == []


def test_what_always_runs_and_is_not_started_yet_is_waited_for() -> None:
    core = plan(make("a"), make("b", environment="e"))
    core.handle(Began(), 0.0)
    assert lines(ready(core, "a-1"), "ready") == []
    core.handle(EnvironmentReady("e", "/e", ""), 2.0)
    assert lines(ready(core, "b-1", now=3.0), "ready") == ["ready after 3.0 s: a, b"]


def test_nothing_is_called_ready_without_the_broker_or_with_no_model() -> None:
    core = plan(make("m"), make("lazy", processes=0, most=1), with_broker=True)
    core.handle(Began(), 0.0)
    ready(core, "broker")
    core.handle(ProcessExited("broker", -9), 1.0)
    assert lines(ready(core, "m-1"), "ready") == []
    core.handle(TimerFired(), 1.0)
    assert lines(ready(core, "broker", now=2.0), "ready") == ["ready after 2.0 s: m; on demand lazy"]
    core = plan(make("m"), make("lazy", processes=0, most=1))
    core.handle(Began(), 0.0)
    failed = core.handle(ProcessExited("m-1", 78), 1.0)
    assert (lines(failed, "ready"), of(Finish, failed)) == ([], [])  # though the other one may be asked for


def test_the_broker_goes_first_when_it_is_ours() -> None:
    core = plan(make("m"), with_broker=True)
    begun = core.handle(Began(), 0.0)
    assert of(StartBroker, begun) == [StartBroker()]
    assert of(StartWorker, begun) == []
    assert told(begun)["m"] == Catalogue("m", "queued", 0.0)
    assert [a.name for a in of(StartWorker, ready(core, "broker"))] == ["m-1"]


def test_models_of_one_group_are_reported_each() -> None:
    core = plan(make("g", models=["a", "b"]))
    assert set(told(core.handle(Began(), 0.0))) == {"a", "b"}


def test_a_new_broker_is_told_everything_with_the_time_in_the_phase() -> None:
    core = plan(make("a"), make("b"))
    core.handle(Began(), 0.0)
    ready(core, "a-1", now=2.0)
    assert told(core.handle(BrokerWelcomed(), 12.0)) == {
        "a": Catalogue("a", "ready", 10.0, "", 1),
        "b": Catalogue("b", "loading", 12.0),
    }


def test_nothing_is_reported_that_has_not_changed() -> None:
    core = plan(make("m"))
    core.handle(Began(), 0.0)
    core.handle(ProcessReported("m-1", "loading", "x"), 1.0)
    assert told(core.handle(ProcessReported("m-1", "loading", "x"), 2.0)) == {}


# --- failing ----------------------------------------------------------------------------------------------------------


def test_a_crashed_worker_starts_again_after_a_delay_with_its_last_words_told() -> None:
    core = plan(make("m", processes=2))
    core.handle(Began(), 0.0)
    ready(core, "m-1", "m-2")
    crashed = core.handle(ProcessExited("m-1", -11, ("boom",), draw=0.0), 10.0)
    assert of(StartWorker, crashed) == []
    assert told(crashed)["m"] == Catalogue("m", "ready", 9.0, "", 1)  # the other one serves
    (warning,) = lines(crashed, "warning")
    assert "SIGSEGV" in warning
    assert "boom" in warning
    due = core.next_timer()
    assert due == 10.25
    assert core.handle(TimerFired(), 10.2) == []
    assert [a.name for a in of(StartWorker, core.handle(TimerFired(), due))] == ["m-1"]


def test_a_crash_loop_is_parked_with_its_reason_and_the_rest_goes_on() -> None:
    core = plan(make("bad"), make("good"))
    core.handle(Began(), 0.0)
    ready(core, "good-1")
    now, last = 1.0, []
    for n in range(CRASHES):
        now += 1
        last = core.handle(ProcessExited("bad-1", 1, (f"try {n}",), draw=0.0), now)
        if (due := core.next_timer()) is not None and n < CRASHES - 1:
            now = due
            assert of(StartWorker, core.handle(TimerFired(), now))
    entry = told(last)["bad"]
    assert entry.phase == "failed"
    assert "5 times in 60 s" in entry.detail
    assert "try 4" in entry.detail
    assert core.next_timer() is None
    assert "good" in lines(last, "ready")[0]
    assert "without bad" in lines(last, "ready")[0]


def test_bad_configuration_is_not_tried_again() -> None:
    core = plan(make("m"), make("other"))
    core.handle(Began(), 0.0)
    failed = core.handle(ProcessReported("m-1", "failed", "the adapter is for another base"), 1.0)
    assert of(StopProcess, failed) == []  # it leaves by itself, with the exit code that says why
    assert core.next_timer() == 1.0 + STOP_GRACE  # or else it is killed
    ended = core.handle(ProcessExited("m-1", 78), 1.1)
    assert told(ended)["m"].phase == "failed"
    assert "the adapter is for another base" in told(ended)["m"].detail
    core.handle(TimerFired(), 1e6)
    assert core.workers["m-1"].state.value == "parked"


def test_why_a_process_failed_is_said_once() -> None:
    core = plan(make("m", processes=2))
    core.handle(Began(), 0.0)
    reason, repeated = "out of memory", ("loopmux-worker: error: out of memory",)
    said = []
    for name in ("m-1", "m-2"):
        core.handle(ProcessReported(name, "failed", reason), 1.0)
        said.append(core.handle(ProcessExited(name, 78, repeated), 1.1))
    assert lines(said[0], "error") == [reason]
    assert lines(said[1], "error")[0] == "failed for the same reason as m-1"
    assert told(said[1])["m"].detail == "m-1: out of memory"


def test_the_end_of_the_output_is_told_where_the_process_gave_no_reason() -> None:
    core = plan(make("m"))
    core.handle(Began(), 0.0)
    [said] = lines(core.handle(ProcessExited("m-1", 78, ("last words",)), 1.1), "error")[:1]
    assert said == "it ended with exit code 78\n    last words"


def left_out(core: Plan, name: str, model: str, reason: str = "wrong shapes") -> list[Action]:
    return core.handle(ModelLeftOut(name, model, reason), 0.5)


def test_a_worker_that_left_a_model_out_serves_the_others_and_is_left_alone() -> None:
    core = plan(make("g", models=["a", "bad", "b"]))
    core.handle(Began(), 0.0)
    assert lines(left_out(core, "g-1", "bad"), "error") == ["goes on without bad, which failed: wrong shapes"]
    actions = ready(core, "g-1")
    assert told(actions) == {
        "a": Catalogue("a", "ready", 0.0, "", 1),
        "b": Catalogue("b", "ready", 0.0, "", 1),
        "bad": Catalogue("bad", "failed", 0.0, "wrong shapes"),
    }
    [line] = lines(actions, "ready")
    assert "a, b; without bad, which failed" in line
    assert of(StopProcess, actions) == of(KillProcess, actions) == of(StartWorker, actions) == []
    assert core.next_timer() is None


def test_a_model_left_out_by_all_processes_is_told_once() -> None:
    core = plan(make("g", models=["a", "bad"], processes=2))
    core.handle(Began(), 0.0)
    assert lines(left_out(core, "g-1", "bad"), "error")
    assert told(ready(core, "g-1"))["a"].phase == "ready"
    assert core.catalogue(1.0)[1].phase == "loading"  # the other process may still have it
    assert lines(left_out(core, "g-2", "bad"), "error") == []
    assert told(ready(core, "g-2"))["bad"].phase == "failed"


def test_what_is_said_of_a_model_once_is_said_again_when_it_was_gone_meanwhile() -> None:
    with_it, without_it = make("g", models=["a", "bad"]), make("g", models=["a"])
    core = plan(with_it)
    core.handle(Began(), 0.0)
    assert lines(left_out(core, "g-1", "bad"), "error")
    for now, group in ((1.0, without_it), (2.0, with_it)):
        core.handle(ConfigurationChanged((group,)), now)
        assert of(StartWorker, core.handle(ProcessExited("g-1", 0), now))
    assert lines(left_out(core, "g-1", "bad"), "error")


def test_a_restarted_worker_tries_again_what_it_left_out() -> None:
    core = plan(make("g", models=["a", "bad"]))
    core.handle(Began(), 0.0)
    left_out(core, "g-1", "bad")
    ready(core, "g-1")
    assert told(core.handle(ProcessExited("g-1", -9), 10.0))["bad"].phase == "loading"
    due = core.next_timer()
    assert due is not None
    core.handle(TimerFired(), due)
    assert told(ready(core, "g-1", now=12.0))["bad"] == Catalogue("bad", "ready", 0.0, "", 1)


def test_a_worker_that_is_being_stopped_has_no_word_about_models_any_more() -> None:
    core = plan(make("g", models=["a", "bad"]))
    core.handle(Began(), 0.0)
    core.handle(StopRequested(), 0.1)
    assert left_out(core, "g-1", "bad") == []


def test_a_start_that_takes_too_long_is_ended_killed_if_need_be_and_tried_again() -> None:
    core = plan(make("m", timeout=30.0))
    core.handle(Began(), 0.0)
    assert core.next_timer() == 30.0
    assert of(StopProcess, core.handle(TimerFired(), 30.0)) == [StopProcess("m-1")]
    assert of(KillProcess, core.handle(TimerFired(), 30.0 + STOP_GRACE)) == [KillProcess("m-1")]
    ended = core.handle(ProcessExited("m-1", -9), 36.0)
    assert "not ready after 30 s" in lines(ended, "warning")[0]
    due = core.next_timer()
    assert due is not None
    assert of(StartWorker, core.handle(TimerFired(), due))


def test_a_word_of_a_process_that_is_being_ended_changes_nothing() -> None:
    core = plan(make("m", timeout=30.0))
    core.handle(Began(), 0.0)
    core.handle(TimerFired(), 30.0)
    assert told(ready(core, "m-1", now=31.0)) == {}


def test_an_environment_that_fails_takes_its_models_and_no_others() -> None:
    core = plan(make("a", environment="x"), make("b", environment="y"), make("e"))
    core.handle(Began(), 0.0)
    failed = core.handle(EnvironmentFailed("x", "no such package"), 1.0)
    assert told(failed) == {"a": Catalogue("a", "failed", 0.0, "no such package")}
    assert "no such package" in lines(failed, "error")[0]
    assert of(StartWorker, core.handle(EnvironmentReady("y", "/y", ""), 2.0))
    assert of(Finish, ready(core, "e-1", "b-1")) == []


def test_when_nothing_is_left_to_serve_the_launcher_ends_with_a_failure() -> None:
    core = plan(make("a", environment="x"), with_broker=True)
    core.handle(Began(), 0.0)
    ready(core, "broker")
    failed = core.handle(EnvironmentFailed("x", "no"), 1.0)
    assert told(failed)["a"].phase == "failed"
    assert of(StopProcess, failed) == [StopProcess("broker")]
    assert of(Finish, core.handle(ProcessExited("broker", 0), 2.0)) == [Finish(1)]


def test_a_broker_that_cannot_start_ends_everything_with_its_exit_code() -> None:
    core = plan(make("m"), with_broker=True)
    core.handle(Began(), 0.0)
    ended = core.handle(ProcessExited("broker", 78, ("the path is taken",)), 0.2)
    assert "the path is taken" in lines(ended, "error")[0]
    assert of(Finish, ended) == [Finish(78)]
    assert of(StartWorker, ended) == []


def test_a_broker_that_dies_later_is_restarted_and_workers_are_left_alone() -> None:
    core = plan(make("m"), with_broker=True)
    core.handle(Began(), 0.0)
    ready(core, "broker", "m-1")
    died = core.handle(ProcessExited("broker", -9), 10.0)
    assert of(StopProcess, died) == of(KillProcess, died) == []
    assert core.next_timer() == 10.0  # at once: everybody waits for it
    assert of(StartBroker, core.handle(TimerFired(), 10.0)) == [StartBroker()]


def test_a_broker_that_its_own_parent_has_replaced_is_spoken_of_and_left_alone() -> None:
    core = plan(make("m"), with_broker=True)
    core.handle(Began(), 0.0)
    ready(core, "broker", "m-1")
    told_so = core.handle(ProcessReported("broker", "replaced", "ended by SIGSEGV"), 10.0)
    assert told_so == [Announce("broker", "ended by SIGSEGV", "warning")]
    assert ready(core, "broker", now=10.1) == []


def test_a_long_reason_fits_into_a_message() -> None:
    core = plan(make("m", environment="x"), make("e"))
    core.handle(Began(), 0.0)
    entry = told(core.handle(EnvironmentFailed("x", "first " + "é" * 9000 + " last"), 1.0))["m"]
    assert len(pack(replace(entry, onto="m" * 300, folder="/" + "f" * 1999))) < ROUTE_LIMIT  # of an adapter
    assert entry.detail.startswith("first")
    assert entry.detail.endswith("last")


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_stopping_ends_workers_then_the_broker_then_us() -> None:
    core = plan(make("m", processes=2), with_broker=True)
    core.handle(Began(), 0.0)
    ready(core, "broker", "m-1", "m-2")
    stopping = core.handle(StopRequested(), 10.0)
    assert of(StopProcess, stopping) == [StopProcess("m-1"), StopProcess("m-2")]
    assert of(ReportPhase, stopping) == []
    assert of(StopProcess, core.handle(ProcessExited("m-1", 0), 10.1)) == []
    last = core.handle(ProcessExited("m-2", 0), 10.2)
    assert (of(StopProcess, last), of(Finish, last)) == ([StopProcess("broker")], [])
    assert of(Finish, core.handle(ProcessExited("broker", 0), 10.3)) == [Finish(0)]


def test_who_does_not_stop_is_killed() -> None:
    core = plan(make("m"), with_broker=True)
    core.handle(Began(), 0.0)
    ready(core, "broker", "m-1")
    core.handle(StopRequested(), 10.0)
    assert core.next_timer() == 10.0 + STOP_GRACE
    assert of(KillProcess, core.handle(TimerFired(), 15.0)) == [KillProcess("m-1")]
    core.handle(ProcessExited("m-1", -9), 15.1)
    assert of(KillProcess, core.handle(TimerFired(), 20.1)) == [KillProcess("broker")]
    assert of(Finish, core.handle(ProcessExited("broker", -9), 20.2)) == [Finish(0)]


def test_a_second_request_stops_at_once() -> None:
    core = plan(make("m"))
    core.handle(Began(), 0.0)
    core.handle(StopRequested(), 10.0)
    assert of(KillProcess, core.handle(StopRequested(at_once=True), 10.1)) == [KillProcess("m-1")]
    assert of(Finish, core.handle(ProcessExited("m-1", -9), 10.2)) == [Finish(0)]


def test_stopping_ends_a_build_and_starts_nothing_after_it() -> None:
    core = plan(make("m", environment="e"))
    core.handle(Began(), 0.0)
    assert of(StopBuild, core.handle(StopRequested(), 1.0)) == [StopBuild("e")]
    ended = core.handle(EnvironmentReady("e", "/e", ""), 2.0)  # it was done just then
    assert of(StartWorker, ended) == []
    assert of(Finish, ended) == [Finish(0)]


def test_stopping_while_a_restart_is_waited_for() -> None:
    core = plan(make("m"))
    core.handle(Began(), 0.0)
    ready(core, "m-1")
    core.handle(ProcessExited("m-1", 1), 5.0)
    assert of(Finish, core.handle(StopRequested(), 5.1)) == [Finish(0)]
    assert core.next_timer() is None


def test_ctrl_c_gives_what_runs_the_time_to_end_and_a_second_one_none() -> None:
    core = plan(make("m"), make("loads"))
    core.handle(Began(), 0.0)
    ready(core, "m-1")
    stopping = core.handle(StopRequested(patiently=True), 10.0)
    assert lines(stopping, "info") == ["stopping, what runs has 120 s to end; once more to stop at once"]
    assert of(StopProcess, stopping) == [StopProcess("m-1", patiently=True), StopProcess("loads-1")]
    core.handle(ProcessExited("loads-1", -15), 10.1)
    assert core.next_timer() == 10.0 + LEAVE_PATIENTLY + STOP_GRACE
    assert of(KillProcess, core.handle(StopRequested(at_once=True), 11.0)) == [KillProcess("m-1")]
    assert of(Finish, core.handle(ProcessExited("m-1", -9), 11.1)) == [Finish(0)]


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_was_told_to_leave_is_no_crashed_one_however_often() -> None:
    core = plan(make("m"))
    core.handle(Began(), 0.0)
    for n in range(CRASHES + 1):
        ready(core, "m-1", now=n + 0.5)
        left = core.handle(ProcessExited("m-1", 0), n + 1.0)
        assert [a.name for a in of(StartWorker, left)] == ["m-1"]
        assert lines(left, "warning") == lines(left, "error") == []


def test_one_that_ends_before_it_was_ready_has_failed_whatever_its_exit_code() -> None:
    core = plan(make("m"))
    core.handle(Began(), 0.0)
    ended = core.handle(ProcessExited("m-1", 0), 1.0)
    assert of(StartWorker, ended) == []
    assert "exit code 0; starts again in" in lines(ended, "warning")[0]


def test_a_broker_that_somebody_ended_is_started_again() -> None:
    core = plan(make("m"), with_broker=True)
    core.handle(Began(), 0.0)
    ready(core, "broker", "m-1")
    ended = core.handle(ProcessExited("broker", 0), 5.0)
    assert of(StartBroker, ended) == [StartBroker()]
    assert of(StopProcess, ended) == []
