"""Faults put into the slots engine, on a real model: who fails, who goes on, with the tokens of undisturbed runs."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import asdict
from functools import partial

import pytest
import torch

import enginekit
from enginekit import drain, ids, run
from loopmux.codec import FieldError, build
from loopmux.errors import BadRequestError, ContextLengthError, EngineError
from loopmux.messages import Generate, ModelSpec, Sampling, WorkerSpec
from loopmux.wire import Kind
from loopmux_worker.causes import DeviceLostError, device_lost
from loopmux_worker.driver import Driver
from loopmux_worker.engine.base import Failed, Finished
from loopmux_worker.engine.failures import Failures
from loopmux_worker.events import Submit
from tinymodel import CONTEXT
from workerpeer import PATIENCE, FakeBroker

WANTED = 12
PROMPTS = [[(7 * i * i + 3 * i + 11 * n) % 250 for i in range(20 + 9 * n)] for n in range(4)]
NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
NO_WORKSPACE = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
ASSERTED = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"


job = partial(enginekit.job, max_new_tokens=WANTED, ignore_eos=True)


def opened(tiny_model, **settings):
    return enginekit.opened(tiny_model.base, **({"slots": 4} | settings))


@pytest.fixture(scope="module")
def answers(tiny_model):
    """What an engine that nothing happens to makes of PROMPTS."""
    return run(opened(tiny_model), [job(prompt) for prompt in PROMPTS])[0]


@pytest.fixture(scope="module")
def shared(tiny_model):
    return opened(tiny_model)


@pytest.fixture
def engine(shared):
    """One engine for all faults that it is to survive; each test finds it idle, with nothing kept."""
    sound = shared._forward
    yield shared
    shared._forward = sound
    assert shared.due() is None
    for row in range(len(shared._scheduler.rows)):
        shared._scheduler.rows.drop(row)


class Faulty:
    """A forward that raises where ``when`` says so: before anything was computed, or after it all was."""

    def __init__(self, engine, when, error, late=False):
        self._forward, self._when, self._error, self._late = engine._forward, when, error, late
        self.raised = 0
        engine._forward = self

    def __call__(self, segments, *rest):
        bad = self._when(segments)
        if bad and not self._late:
            self._raise()
        logits = self._forward(segments, *rest)
        if bad:
            self._raise()
        return logits

    def _raise(self):
        self.raised += 1
        raise self._error


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("guilty", range(4))
def test_a_forward_that_one_request_breaks_costs_that_one_alone(engine, answers, guilty, late):
    jobs = [job(prompt) for prompt in PROMPTS]
    Faulty(engine, lambda segments: any(s.key == jobs[guilty].key for s in segments), ValueError("boom"), late)
    tokens, ends = run(engine, jobs)
    assert [isinstance(end, Failed) for end in ends] == [i == guilty for i in range(4)]
    assert "ValueError: boom" in ends[guilty].error.message
    assert isinstance(ends[guilty].error, EngineError)
    assert [t for i, t in enumerate(tokens) if i != guilty] == [a for i, a in enumerate(answers) if i != guilty]
    assert run(engine, [job(PROMPTS[guilty])])[0] == [answers[guilty]], "a new one of the same tokens is none the worse"


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_forward_that_raises_once_costs_nobody_anything(engine, answers, at, late):
    calls = iter(range(1, 1000))
    faulty = Faulty(engine, lambda segments: next(calls) == at and len(segments) > 1, ValueError("boom"), late)
    tokens, ends = run(engine, [job(prompt) for prompt in PROMPTS])
    assert faulty.raised == 1
    assert all(isinstance(end, Finished) for end in ends)
    assert tokens == answers


def test_a_forward_that_always_raises_fails_all_and_the_engine_goes_on(engine, answers):
    sound = engine._forward
    Faulty(engine, lambda _: True, ValueError("boom"))
    tokens, ends = run(engine, [job(prompt) for prompt in PROMPTS])
    assert tokens == [[]] * 4
    assert all(isinstance(end.error, EngineError) for end in ends)
    engine._forward = sound
    assert run(engine, [job(prompt) for prompt in PROMPTS])[0] == answers


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(NO_MEMORY), torch.AcceleratorError(NO_WORKSPACE)], ids=["memory", "workspace"]
)
def test_short_memory_costs_the_youngest_its_row_and_nobody_the_answer(engine, answers, error, late):
    seen = set()

    def more_than_two(segments):
        seen.update(s.key for s in segments)
        return len(segments) > 2

    faulty = Faulty(engine, more_than_two, error, late)
    jobs = [job(prompt) for prompt in PROMPTS]
    tokens, ends = run(engine, jobs)
    assert faulty.raised >= 2
    assert seen == {one.key for one in jobs}
    assert all(isinstance(end, Finished) for end in ends)
    assert tokens == answers


def test_a_request_that_is_too_large_by_itself_fails_with_the_reason(engine, answers):
    large = job(PROMPTS[3])
    Faulty(engine, lambda segments: any(s.key == large.key for s in segments), torch.OutOfMemoryError(NO_MEMORY))
    tokens, ends = run(engine, [job(PROMPTS[0]), large])
    assert (tokens[0], isinstance(ends[1], Failed)) == (answers[0], True)
    assert "out of memory" in ends[1].error.message


@pytest.mark.parametrize("error", [RuntimeError("boom"), torch.OutOfMemoryError(NO_MEMORY)], ids=["error", "memory"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside others", "alone"])
def test_a_copy_that_always_fails_costs_computing_and_nobody_the_answer(engine, answers, monkeypatch, error, beside):
    beginning = PROMPTS[3][:30]
    copies = []

    def fail(given):
        copies.extend(given)
        if given:
            raise error

    monkeypatch.setattr(engine._memory, "copy", fail)
    prompts = [[*beginning, n] for n in range(3)]
    expected = [run(engine, [job(prompt)])[0][0] for prompt in prompts]
    assert len(copies) == 2, "they begin as the first, which was kept"
    for row in range(len(engine._scheduler.rows)):
        engine._scheduler.rows.drop(row)
    run(engine, [job(prompts[0])])
    running = job(PROMPTS[0])
    if beside:
        engine.submit(running)
        outputs = engine.step()
    tokens, ends = run(engine, [job(prompt) for prompt in prompts[1:]])
    assert len(copies) == 4
    assert tokens == expected[1:]
    assert [end.usage.cached_tokens for end in ends] == [0, 0]
    if beside:
        assert outputs
        assert running.key not in engine._tasks


def test_a_copy_on_a_lost_device_ends_the_engine(tiny_model, monkeypatch):
    engine = opened(tiny_model)

    def lose(given):
        if given:
            raise torch.AcceleratorError(ASSERTED)

    monkeypatch.setattr(engine._memory, "copy", lose)
    run(engine, [job(PROMPTS[3])])
    engine.submit(job([*PROMPTS[3][:30], 1]))
    with pytest.raises(DeviceLostError):
        drain(engine)


def test_weights_that_are_no_numbers_fail_their_requests_with_the_reason_and_the_engine_goes_on(
    engine, tiny_model, answers
):
    adapters = engine._models._adapters
    engine.load_adapter("red", str(tiny_model.adapters["red"]))
    pair = next(iter(adapters._mixed.values())).pairs["red"]
    pair.down.fill_(float("nan"))
    jobs = [job(PROMPTS[0]), job(PROMPTS[1], "red"), job(PROMPTS[2])]
    tokens, ends = run(engine, jobs)
    assert isinstance(ends[1].error, EngineError)
    assert "its weights are damaged" in ends[1].error.message
    assert [tokens[0], tokens[2]] == [answers[0], answers[2]]
    engine.unload_adapter("red")
    assert run(engine, [job(PROMPTS[1])])[0] == [answers[1]]


def test_no_numbers_that_are_left_in_a_row_reach_who_gets_it_next(tiny_model, answers):
    """Rows of one call are read as far as the longest: the shorter ones hold what was there before."""
    engine = opened(tiny_model)
    engine.load_adapter("red", str(tiny_model.adapters["red"]))
    next(iter(engine._models._adapters._mixed.values())).pairs["red"].down.fill_(float("nan"))
    cancelled = [job(PROMPTS[3] * 4, "red") for _ in PROMPTS]
    for one in cancelled:
        engine.submit(one)
    engine.step()
    for one in cancelled:
        engine.cancel(one.key)
    assert all(isinstance(end, Failed) for end in run(engine, [job(PROMPTS[3], "red") for _ in PROMPTS])[1])
    tokens, ends = run(engine, [job(prompt) for prompt in PROMPTS])
    assert [isinstance(end, Finished) for end in ends] == [True] * len(PROMPTS)
    assert tokens == answers


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "field"),
    [
        ([1, 2, 9999], {}, BadRequestError, "prompt_token_ids: found 9999"),
        ([], {}, BadRequestError, "prompt_token_ids: expected at least one"),
        ([1] * CONTEXT, {}, ContextLengthError, f"the prompt has {CONTEXT} tokens"),
        ([1], {"max_new_tokens": 0}, BadRequestError, "max_new_tokens: found 0"),
        ([1], {"max_new_tokens": 2**31}, BadRequestError, "max_new_tokens: found 2147483648"),
        ([1], {"sampling": Sampling(temperature=-1)}, BadRequestError, "temperature: found -1"),
        ([1], {"sampling": Sampling(min_p=float("nan"))}, BadRequestError, "min_p: found nan"),
        ([1], {"sampling": Sampling(logit_bias={"x": 1.0})}, BadRequestError, "logit_bias: found the key 'x'"),
        ([1], {"stop": ("",)}, BadRequestError, "stop: found an empty text"),
        ([1], {"logprobs": 99}, BadRequestError, "logprobs: found 99"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_run_is_refused_at_admission_and_nobody_notices(engine, answers, prompt, settings, error, field):
    running = job(PROMPTS[0])
    engine.submit(running)
    outputs = engine.step()
    with pytest.raises(error, match=field):
        engine.submit(job(prompt, **settings))
    outputs += drain(engine)
    assert ids(outputs) == answers[0]


def test_an_unknown_dtype_is_refused_with_what_there_is():
    with pytest.raises(FieldError, match=r"dtype: found 'float8' .*expected one of auto, float32, bfloat16, float16"):
        build(WorkerSpec, {"name": "w", "endpoint": "", "models": [], "dtype": "float8"})


# --- a device that is gone --------------------------------------------------------------------------------------------


def test_what_counts_as_a_lost_device():
    lost = device_lost(torch.AcceleratorError(ASSERTED))
    assert lost.message == (
        "the device is lost to this process, which ends: AcceleratorError: CUDA error: device-side assert triggered"
    )
    outer = RuntimeError("the step failed")
    outer.__cause__ = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert device_lost(outer) is not None
    assert device_lost(RuntimeError("could not create a primitive")) is not None, "oneDNN, which makes no more of them"
    no_descriptor = "could not create a primitive descriptor for the matmul primitive"
    for other in (NO_MEMORY, NO_WORKSPACE, no_descriptor, "CUDA error: invalid configuration argument", "boom"):
        assert device_lost(RuntimeError(other)) is None
    assert device_lost(BadRequestError("tool_choice: found 'illegal memory access'")) is None, "a request's own words"


class Asked:
    """A device that answers as long as ``error`` is None."""

    def __init__(self, error=None):
        self.error, self.times = error, 0

    def __call__(self, device):
        self.times += 1
        if self.error is not None:
            raise self.error


STRANGE = RuntimeError("CUDA error: something that this release has no words for")
GPU = torch.device("cuda")


def fails(failures):
    """How many failures in a row it takes until the device counts as lost; at most 100."""
    for number in range(1, 101):
        try:
            failures.note(STRANGE)
        except DeviceLostError:
            return number
    return None


def test_a_device_on_which_nothing_succeeds_any_more_is_lost_whatever_its_errors_say():
    failures = Failures(GPU, Asked(RuntimeError("no")))
    assert fails(failures) == 3
    with pytest.raises(
        DeviceLostError, match=r"4 steps failed .*no words for\), and so does .* there \(RuntimeError: no"
    ):
        failures.note(STRANGE)
    answering = Asked()
    assert fails(Failures(GPU, answering)) == 64
    assert answering.times == 61
    assert fails(Failures(GPU, Asked(torch.OutOfMemoryError(NO_MEMORY)))) == 64, "that is no loss"
    assert fails(Failures(torch.device("cpu"), Asked(RuntimeError("no")))) is None
    failures = Failures(GPU, Asked(RuntimeError("no")))
    for _ in range(10):
        failures.note(STRANGE)
        failures.note(torch.OutOfMemoryError(NO_MEMORY))
        failures.note(STRANGE)
        failures.succeeded()
    with pytest.raises(DeviceLostError):
        failures.note(torch.AcceleratorError(ASSERTED))


def test_the_device_is_asked_by_computing_something(device):
    failures = Failures(torch.device(device))
    assert failures._asked() is None
    failures._device = torch.device("meta")  # which computes nothing
    assert failures._asked() is not None


@pytest.mark.parametrize("kind", ["slots", "plain"])
def test_a_device_that_fails_in_unknown_words_ends_the_engine_s_thread(tiny_model, kind, monkeypatch):
    engine = opened(tiny_model, engine=kind)

    def lose(*_, **__):
        raise STRANGE

    monkeypatch.setattr(engine._models.loaded.model, "forward", lose)
    engine._failures = Failures(GPU, Asked(RuntimeError("no")))
    driver = Driver(engine, lambda: None)
    for _ in range(3):
        driver.put(Submit(job(PROMPTS[0])))
    driver.start()
    driver._thread.join(PATIENCE)
    assert isinstance(driver.died, DeviceLostError)
    assert "cuda is lost to this process, which ends: 3 steps failed one after the other" in str(driver.died)


@pytest.mark.parametrize("kind", ["slots", "plain"])
def test_a_lost_device_ends_the_engine_s_thread(tiny_model, kind, monkeypatch):
    engine = opened(tiny_model, engine=kind)

    def lose(*_, **__):
        raise torch.AcceleratorError(ASSERTED)

    monkeypatch.setattr(engine._models.loaded.model, "forward", lose)
    woken = []
    driver = Driver(engine, lambda: woken.append(driver.died))
    driver.put(Submit(job(PROMPTS[0])))
    driver.start()
    driver._thread.join(PATIENCE)
    assert isinstance(driver.died, DeviceLostError)
    assert woken[-1] is driver.died


PROGRAM = """
    import sys
    from loopmux_worker.__main__ import main
    from loopmux_worker.causes import device_lost
    from loopmux_worker.engine.echo import EchoEngine

    whole = EchoEngine.submit

    def broken(self, job):
        if job.generate.prompt == "bad":
            self.step = lose
        whole(self, job)

    def lose():
        raise device_lost(RuntimeError("CUDA error: device-side assert triggered"))

    EchoEngine.submit = broken
    sys.exit(main())
"""


def test_a_worker_that_lost_its_device_ends_with_a_line_that_says_so(tmp_path):
    """On the echo engine: the tests above tell what makes this error of what a device says."""
    broker = FakeBroker(f"ipc://{tmp_path}/b")
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(asdict(WorkerSpec("w1", broker.endpoint, (ModelSpec("echo"),), engine="echo"))))
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), "--spec", str(spec)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            broker.welcome()
            broker.run(b"a" * 16, Generate(prompt="good", max_new_tokens=2))
            assert broker.output(b"a" * 16)[1].kind is Kind.END
            broker.run(b"b" * 16, Generate(prompt="bad"))
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            broker.close()
    assert process.returncode == 1
    reason = "the device is lost to this process, which ends: RuntimeError: CUDA error: device-side assert triggered"
    assert json.loads(out.splitlines()[-1]) == {"phase": "failed", "detail": reason}
    assert err.splitlines()[-1] == f"loopmux-worker: error: {reason}"
