"""What every engine on a real model does alike; what is one engine's alone is tested beside that engine."""

import json
import shutil
import threading

import pytest
import torch
from peft import PeftModel

import enginekit
from enginekit import PATIENCE, drain, ids, of, text, until
from loopmux.errors import (
    AdapterNotFoundError,
    BadRequestError,
    ConfigError,
    ContextLengthError,
    EngineError,
    LoopmuxError,
    ModelNotFoundError,
)
from loopmux.messages import ModelSpec, Sampling, WorkerSpec
from loopmux.wire import new_id, pack_tokens
from loopmux_worker.driver import Driver
from loopmux_worker.engine import open_engine
from loopmux_worker.engine.base import Failed, Finished, Key, Produced

PROMPT = list(range(40, 60))
END = 266


ADAPTERS = ("red", "blue")


@pytest.fixture(scope="module", params=["plain", "slots"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def engine(tiny_model, kind, device):
    models = (ModelSpec("base"), *(ModelSpec(n, adapter_dir=str(tiny_model.adapters[n])) for n in ADAPTERS))
    others = set(threading.enumerate())
    phases = []
    spec = WorkerSpec(
        "w", "", models, str(tiny_model.base), dtype="float32", torch_threads=1, engine=kind, device=device
    )
    made = open_engine(spec, lambda phase, detail: phases.append((phase, detail)))
    assert phases[0][0] == "loading"
    assert phases[-1][0] == "warming"
    yield made
    made.close()
    assert "generate" not in {thread.name for thread in set(threading.enumerate()) - others}


@pytest.fixture(scope="module")
def reference(tiny_model, device):
    return tiny_model.model().to(device)


def with_adapter(tiny_model, name, device):
    """PEFT's own model with one adapter."""
    return PeftModel.from_pretrained(tiny_model.model(), tiny_model.adapters[name]).eval().to(device)


def job(model="base", **more):
    return enginekit.job(None if {"prompt", "messages", "prompt_token_ids"} & set(more) else PROMPT, model, **more)


def answer(engine, one):
    engine.submit(one)
    outputs = drain(engine)
    assert isinstance(outputs[-1], Finished), outputs[-1]
    return outputs


def by_hand(model, count, prompt=PROMPT):
    """Greedy decoding without a cache and without ``generate()``."""
    sequence = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([sequence], device=model.device)).logits[0, -1]
            sequence.append(int(logits.argmax()))
            if sequence[-1] == END:
                break
    return sequence[len(prompt) :]


def test_greedy_equals_decoding_by_hand_and_generate(engine, reference):
    outputs = answer(engine, job(max_new_tokens=40))
    assert ids(outputs) == by_hand(reference, 40)
    prompt = torch.tensor([PROMPT], device=reference.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 264}
    theirs = reference.generate(prompt, max_new_tokens=40, **options)
    assert ids(outputs) == theirs[0, len(PROMPT) :].tolist()
    assert outputs[-1].usage.prompt_tokens == len(PROMPT)
    assert outputs[-1].usage.completion_tokens == outputs[-1].total == len(ids(outputs))
    timing = outputs[-1].timing
    assert timing.queued >= 0
    assert timing.prefill > 0
    assert timing.queued + timing.prefill == pytest.approx(timing.first_token)
    assert timing.first_token + timing.per_token * (len(ids(outputs)) - 1) == pytest.approx(timing.total, abs=0.1)


def test_the_text_is_the_decode_of_the_tokens(engine, tiny_model):
    outputs = answer(engine, job(max_new_tokens=60, sampling=Sampling(temperature=1.5, seed=4), ignore_eos=True))
    assert text(outputs) == tiny_model.tokenizer.decode(ids(outputs), skip_special_tokens=True)
    assert [o.position for o in outputs[:-1]] == list(range(60))
    assert outputs[-1].reason == "length"


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_equal_peft_itself(engine, tiny_model, device, name):
    expected = by_hand(with_adapter(tiny_model, name, device), 30)
    assert ids(answer(engine, job(name, max_new_tokens=30))) == expected
    assert ids(answer(engine, job("base", adapter=name, max_new_tokens=30))) == expected
    assert expected != ids(answer(engine, job("base", max_new_tokens=30)))


def test_adapters_that_only_peft_can_apply_get_the_plain_engine(tiny_model, device):
    names = ("dora", "red", "saved")
    models = tuple(ModelSpec(n, adapter_dir=str(tiny_model.adapters[n])) for n in names)
    for name, model in zip(names, models, strict=True):
        if name != "red":
            with pytest.raises(ConfigError, match=f"found slots, but adapter {name}: "):
                enginekit.opened(tiny_model.base, model, device=device)
    engine = enginekit.opened(tiny_model.base, *models, engine="auto", device=device)
    try:
        assert engine.describe().engine == "plain"
        for name in (*names, *reversed(names)):  # each behind each other: none may leave anything behind
            expected = by_hand(with_adapter(tiny_model, name, device), 30)
            assert ids(answer(engine, job(name, max_new_tokens=30))) == expected
    finally:
        engine.close()


def test_alternating_adapters_never_leak(engine, tiny_model, reference):
    names = ("base", *ADAPTERS)
    alone = {name: ids(answer(engine, job(name, max_new_tokens=12))) for name in names}
    assert alone["base"] == by_hand(reference, 12)
    jobs = [(name, job(name, max_new_tokens=12)) for name in (*names, *reversed(names), *names)]
    for _, one in jobs:
        engine.submit(one)
    outputs = drain(engine)
    for name, one in jobs:
        assert ids(of(one, outputs)) == alone[name]


def test_end_tokens_end_and_have_no_text(engine, reference):
    biased = Sampling(temperature=0, logit_bias={str(END): 1000.0})
    outputs = answer(engine, job(sampling=biased))
    assert (ids(outputs), text(outputs), outputs[-1].reason) == ([END], "", "stop")
    outputs = answer(engine, job(sampling=biased, ignore_eos=True, max_new_tokens=3))
    assert (ids(outputs), text(outputs), outputs[-1].reason) == ([END] * 3, "", "length")


def test_stop_token_ids(engine):
    free = ids(answer(engine, job(max_new_tokens=20, ignore_eos=True)))
    outputs = answer(engine, job(max_new_tokens=20, ignore_eos=True, stop_token_ids=(free[5],)))
    assert ids(outputs) == free[: free.index(free[5]) + 1]
    assert outputs[-1].reason == "stop"


def test_a_stop_token_that_the_model_does_not_have_is_refused(engine, reference):
    head = reference.get_output_embeddings().out_features
    with pytest.raises(BadRequestError) as caught:
        engine.submit(job(stop_token_ids=(3, head)))
    assert f"stop_token_ids[1]: found {head}, this model produces ids from 0 to {head - 1}" in str(caught.value)
    assert engine.due() is None


def test_stop_strings_across_token_borders(engine, tiny_model):
    sampling = Sampling(temperature=0, logit_bias={str(i): 1000.0 for i in tiny_model.tokenizer.encode("ab")})
    whole = text(answer(engine, job(sampling=sampling, max_new_tokens=20)))
    stop = whole[7:11]
    outputs = answer(engine, job(sampling=sampling, max_new_tokens=20, stop=(stop,)))
    assert text(outputs) == whole[: whole.index(stop)]
    assert outputs[-1].reason == "stop"
    assert all(o.ids for o in outputs[:-1])


def test_a_seed_makes_a_result_and_a_resumed_one_continues_it(engine):
    sampling = Sampling(temperature=1.2, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.2, seed=11)
    whole = answer(engine, job(sampling=sampling, max_new_tokens=30, ignore_eos=True, logprobs=2))
    assert ids(answer(engine, job(sampling=sampling, max_new_tokens=30, ignore_eos=True))) == ids(whole)
    other = Sampling(temperature=1.2, seed=12)
    assert ids(answer(engine, job(sampling=other, max_new_tokens=30, ignore_eos=True))) != ids(whole)
    for cut in (1, 13, 29):
        prefix = tuple(ids(whole)[:cut])
        rest = answer(engine, job(sampling=sampling, max_new_tokens=30, ignore_eos=True, prefix=prefix, logprobs=2))
        assert ids(rest) == ids(whole)[cut:]
        assert rest[0].position == cut
        assert text(rest) == text(whole[cut:])
        assert rest[-1].total == 30
        assert rest[0].logprobs[0].logprob == pytest.approx(whole[cut].logprobs[0].logprob, abs=1e-4)


def test_draws_are_the_same_alone_in_a_batch_of_16_and_resumed(engine):
    """In float32, where another batch rounds so little otherwise that no draw changes sides."""
    kinds = ({}, {"top_k": 20}, {"top_p": 0.8, "repetition_penalty": 1.2}, {"min_p": 0.02, "presence_penalty": 0.5})
    wanted, cut = 16, 6

    def one(i, prefix=()):
        sampling = Sampling(temperature=0.5 + i / 8, seed=i, **kinds[i % len(kinds)])
        prompt = pack_tokens([(7 * n * n + i) % 250 for n in range(5 + 3 * i)])
        name = ("base", *ADAPTERS)[i % 3]
        return job(
            name, prompt_token_ids=prompt, sampling=sampling, max_new_tokens=wanted, ignore_eos=True, prefix=prefix
        )

    alone = [ids(answer(engine, one(i))) for i in range(16)]
    assert len({tuple(tokens) for tokens in alone}) == 16
    assert enginekit.run(engine, [one(i) for i in range(16)])[0] == alone
    resumed = enginekit.run(engine, [one(i, tuple(alone[i][:cut])) for i in range(16)], every=1)[0]
    assert resumed == [tokens[cut:] for tokens in alone]


def test_a_deterministic_request_is_the_same_to_the_last_bit(engine):
    """Alone, beside others, behind a prefix of its output, and where others have computed its beginning."""
    prompt = pack_tokens([(5 * n * n + 7) % 250 for n in range(150)])

    def one(i, prefix=()):
        sampling = Sampling(temperature=1.1, seed=i)
        name = ("base", *ADAPTERS)[i % 3]
        more = {"max_new_tokens": 24, "ignore_eos": True, "logprobs": 3, "deterministic": True}
        return job(name, prompt_token_ids=prompt, sampling=sampling, prefix=prefix, **more)

    def seen(jobs, every=0, beside=()):
        outputs = enginekit.play(engine, [*beside, *jobs], every)
        return [[(o.ids, o.logprobs) for o in of(one, outputs) if isinstance(o, Produced)] for one in jobs]

    alone = [seen([one(i)])[0] for i in range(3)]
    assert [len(tokens) for tokens in alone] == [24] * 3
    answer(engine, job(prompt_token_ids=prompt, max_new_tokens=8, session="s"))  # which leaves state of that prompt
    beside = [job(prompt=None, prompt_token_ids=pack_tokens(range(n, 4 * n)), max_new_tokens=40) for n in (5, 40, 60)]
    assert seen([one(i) for i in range(3)], every=2, beside=beside) == alone
    cut = 9
    prefixes = [tuple(ids for (ids,), _ in tokens[:cut]) for tokens in alone]
    assert seen([one(i, prefixes[i]) for i in range(3)], every=1) == [tokens[cut:] for tokens in alone]


def test_a_prefix_of_another_vocabulary_is_refused(engine):
    with pytest.raises(BadRequestError, match="found token 1000000 in what this request is to go on behind"):
        engine.submit(job(prefix=(70, 10**6)))
    assert engine.due() is None


def test_a_prefix_that_holds_the_end_only_ends(engine):
    (end,) = answer(engine, job(prefix=(70, END)))
    assert (end.total, end.reason) == (2, "stop")
    (end,) = answer(engine, job(prefix=(70, 71), max_new_tokens=2))
    assert (end.total, end.reason) == (2, "length")


def test_without_a_seed_the_request_id_decides(engine):
    key = Key(new_id(), 1)
    warm = {"sampling": Sampling(temperature=2.0), "max_new_tokens": 20, "ignore_eos": True}
    first = ids(answer(engine, job(key=key, **warm)))
    assert ids(answer(engine, job(key=Key(key.request, 2), **warm))) == first
    assert ids(answer(engine, job(**warm))) != first


def test_log_probabilities_come_with_their_tokens(engine, reference):
    outputs = answer(engine, job(max_new_tokens=3, logprobs=3, ignore_eos=True))
    with torch.inference_mode():
        expected = torch.log_softmax(
            reference(torch.tensor([PROMPT], device=reference.device)).logits[0, -1].float(), 0
        )
    first = outputs[0].logprobs[0]
    assert first.token == outputs[0].ids[0] == first.top[0][0]
    assert first.logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert len(first.top) == 3


def test_cancel_stops_between_tokens_and_the_next_request_runs(engine):
    long = job(max_new_tokens=200, ignore_eos=True)
    waiting = job(max_new_tokens=2, ignore_eos=True)
    engine.submit(long)
    engine.submit(waiting)
    assert engine.load().running + engine.load().queued == 2
    seen = []
    while len(ids(of(long, seen))) < 3:
        seen += engine.step()
    usage = engine.cancel(long.key)
    assert usage.completion_tokens == len(ids(of(long, seen))) < 200
    assert usage.prompt_tokens == len(PROMPT)
    rest = drain(engine)
    assert {o.key for o in rest} <= {waiting.key}
    assert ids(of(waiting, seen + rest)) == ids(answer(engine, job(max_new_tokens=2, ignore_eos=True)))
    assert engine.cancel(long.key) is None


def test_progress_moves_with_every_token(engine):
    before = engine.load().progress
    answer(engine, job(max_new_tokens=5, ignore_eos=True))
    assert engine.load().progress - before >= 5


def test_the_context_bounds_prompt_and_answer(engine):
    outputs = answer(engine, job(prompt_token_ids=pack_tokens([50] * 250), max_new_tokens=100, ignore_eos=True))
    assert (outputs[-1].total, outputs[-1].reason) == (6, "length")
    with pytest.raises(ContextLengthError, match=r"prompt has 256 tokens.*holds 256.*100 new"):
        engine.submit(job(prompt_token_ids=pack_tokens([50] * 256), max_new_tokens=100))


@pytest.mark.parametrize(
    ("bad", "error", "reason"),
    [
        (job("nobody"), ModelNotFoundError, "nobody"),
        (job(adapter="green"), AdapterNotFoundError, "green"),
        (job(sampling=Sampling(top_p=1.5)), BadRequestError, "top_p"),
        (job(sampling=Sampling(logit_bias={"9999": 1.0})), BadRequestError, "9999"),
        (job(prompt_token_ids=pack_tokens([5000])), BadRequestError, "5000"),
        (job(messages=({"role": "root", "content": "x"},)), BadRequestError, "root"),
        (job(prompt="x", template_kwargs={"chat_template": "x"}), BadRequestError, "chat_template"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_requests_leave_the_engine_as_it_was(engine, bad, error, reason):
    with pytest.raises(error, match=reason):
        engine.submit(bad)
    assert engine.due() is None


def test_a_failing_forward_fails_its_request_alone(engine, device, monkeypatch):
    if device == "cuda":
        pytest.skip("on a GPU an index out of range ends every use of it by this process")
    loaded = engine._models.loaded
    monkeypatch.setattr(loaded, "vocabulary", 10**6)  # so that an id without a row reaches the model
    engine.submit(job(prompt_token_ids=pack_tokens([99999])))
    (failed,) = drain(engine)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, EngineError)
    monkeypatch.undo()
    assert len(ids(answer(engine, job(max_new_tokens=2, ignore_eos=True)))) == 2


def test_a_tokenizer_that_panics_costs_its_request_alone(tiny_model, kind, device, tmp_path):
    """What Rust code panics with is no Exception."""
    folder = shutil.copytree(tiny_model.base, tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    strip = {"type": "Strip", "content": "a", "start": 1, "stop": 1}  # which a text of one "a" is too short for
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], strip]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (token,) = tiny_model.tokenizer.encode("a")
    engine = enginekit.opened(folder, engine=kind, device=device)
    try:
        fine = job(max_new_tokens=8, ignore_eos=True, sampling=Sampling(logit_bias={str(token): -1000.0}, seed=1))
        alone = ids(answer(engine, fine))
        panics = job(sampling=Sampling(temperature=0, logit_bias={str(token): 1000.0}))
        outputs = enginekit.play(engine, [panics, fine])
        (failed,) = of(panics, outputs)
        assert isinstance(failed, Failed)
        assert "PanicException" in failed.error.message
        assert ids(of(fine, outputs)) == alone
        with pytest.raises(EngineError, match="PanicException"):
            engine.prepare(job(prefix=(token,)))
    finally:
        engine.close()


TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},)


@pytest.mark.parametrize(
    ("tools", "choice", "parsed"), [(TOOLS, "auto", True), (TOOLS, "none", False), ((), "auto", False)]
)
def test_calls_are_parsed_where_tools_are_given(engine, tiny_model, tools, choice, parsed):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    written = (*tiny_model.tokenizer.encode(call), END)

    def outputs_behind(count):
        """What the engine makes of the token behind a prefix of the written ones; a bias dictates it."""
        dictated = Sampling(temperature=0, logit_bias={str(written[count]): 1000.0})
        messages = ({"role": "user", "content": "hi"},)
        options = {"messages": messages, "tools": tools, "tool_choice": choice, "sampling": dictated}
        return answer(engine, job(prefix=written[:count], max_new_tokens=count + 1, **options))

    def calls(outputs):
        return [(c.name, c.arguments) for o in outputs if isinstance(o, Produced) for c in o.calls]

    assert calls(outputs_behind(len(written) - 2)) == ([("add", {"a": 1})] if parsed else [])
    end = outputs_behind(len(written) - 1)
    assert calls(end) == []  # it was complete within the prefix: the lost attempt has sent it
    assert end[-1].reason == ("tool_calls" if parsed else "stop")


def test_adapters_come_and_go_at_run_time(engine, tiny_model):
    before = {name: ids(answer(engine, job(name, max_new_tokens=8))) for name in ("base", "red", "blue")}
    served = engine.load_adapter("again", str(tiny_model.adapters["red"]))
    assert served.adapter == "again"
    assert ids(answer(engine, job("again", max_new_tokens=8))) == before["red"]
    assert engine.load_adapter("again", str(tiny_model.adapters["red"])) == served  # the same: nothing to do
    for name, content in (("again", "blue"), ("base", "red")):
        with pytest.raises(BadRequestError, match="with other contents, is served already"):
            engine.load_adapter(name, str(tiny_model.adapters[content]))
    engine.unload_adapter("again")
    with pytest.raises(LoopmuxError):
        engine.submit(job("again"))
    with pytest.raises(AdapterNotFoundError, match="again"):
        engine.unload_adapter("again")
    assert {name: ids(answer(engine, job(name, max_new_tokens=8))) for name in before} == before


@pytest.fixture
def again(engine, tiny_model):
    """The name of one more adapter, that of red, which a test may unload."""
    engine.load_adapter("again", str(tiny_model.adapters["red"]))
    yield "again"
    if "again" in engine.describe().adapters:
        engine.unload_adapter("again")
    drain(engine)
    gone(engine)


def gone(engine):
    until(lambda: not engine.describe().report["unloading"], "unloading")


def some_steps(engine, one):
    """Run until a job has a few tokens."""
    outputs = []
    while len(ids(of(one, outputs))) < 3:
        outputs += engine.step()
    return outputs


def test_the_files_of_an_adapter_may_be_written_again_while_it_is_served(engine, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model.adapters["red"], tmp_path / "red")
    engine.load_adapter("mine", str(folder))
    before = ids(answer(engine, job("mine", max_new_tokens=30)))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert ids(answer(engine, job("mine", max_new_tokens=30))) == before
    engine.unload_adapter("mine")


def test_the_files_of_a_base_may_be_written_again_while_it_is_served(tiny_model, kind, device, tmp_path):
    """In place: cut to nothing, then filled with zeros."""
    folder = shutil.copytree(tiny_model.base, tmp_path / "base")
    engine = enginekit.opened(folder, engine=kind, device=device)
    try:
        before = ids(answer(engine, job(max_new_tokens=30)))
        weights = folder / "model.safetensors"
        weights.write_bytes(bytes(weights.stat().st_size))
        assert ids(answer(engine, job(max_new_tokens=30))) == before
    finally:
        engine.close()


def test_an_adapter_in_use_goes_when_its_last_request_has_ended(engine, tiny_model, again):
    alone = {name: ids(answer(engine, job(name, max_new_tokens=30, ignore_eos=True))) for name in ("red", "blue")}
    jobs = [job(name, max_new_tokens=30, ignore_eos=True) for name in (again, "blue", again)]
    for one in jobs:
        engine.submit(one)
    outputs = some_steps(engine, jobs[0])
    engine.unload_adapter(again)
    described = engine.describe()
    assert described.adapters == ADAPTERS
    assert again not in {model.id for model in described.models}
    assert described.report["unloading"] == [again]
    for refused in (job(again), job("base", adapter=again), job(again, adapter="blue")):
        with pytest.raises(AdapterNotFoundError, match=r"'again' is being unloaded: .*use another one \(red, blue\)"):
            engine.submit(refused)
    with pytest.raises(AdapterNotFoundError, match="'again' is being unloaded"):
        engine.unload_adapter(again)
    with pytest.raises(BadRequestError, match="'again': one of that name is being unloaded") as caught:
        engine.load_adapter(again, str(tiny_model.adapters["blue"]))
    assert caught.value.retryable
    outputs += drain(engine)
    assert [ids(of(one, outputs)) for one in jobs] == [alone[name] for name in ("red", "blue", "red")]
    gone(engine)
    assert again not in engine.describe().report["adapters"]
    engine.load_adapter(again, str(tiny_model.adapters["blue"]))
    assert ids(answer(engine, job(again, max_new_tokens=30, ignore_eos=True))) == alone["blue"]


def test_an_adapter_whose_last_request_is_cancelled_goes_with_it(engine, again):
    jobs = [job(again, max_new_tokens=200, ignore_eos=True) for _ in range(2)]
    for one in jobs:
        engine.submit(one)
    some_steps(engine, jobs[0])
    engine.unload_adapter(again)
    engine.cancel(jobs[1].key)
    assert engine.describe().report["unloading"] == [again]
    engine.cancel(jobs[0].key)
    gone(engine)
    assert engine.due() is None
    with pytest.raises(ModelNotFoundError):
        engine.submit(job(again))


def test_an_engine_that_is_closed_while_an_adapter_is_being_unloaded_ends(tiny_model, kind, device):
    model = ModelSpec("red", adapter_dir=str(tiny_model.adapters["red"]))
    one = enginekit.opened(tiny_model.base, model, engine=kind, device=device)
    running = job("red", max_new_tokens=200, ignore_eos=True)
    one.submit(running)
    some_steps(one, running)
    one.unload_adapter("red")
    driver = Driver(one, lambda: None)
    driver.start()
    assert driver.stop(PATIENCE)
    assert driver.died is None


def test_description(engine, kind, reference):
    described = engine.describe()
    assert described.engine == kind
    assert described.slots == 1 if kind == "plain" else described.slots > 1
    assert described.adapters == ADAPTERS
    assert len({m.fingerprint for m in described.models}) == 3
    assert described.report["dtype"] == "float32"
    assert described.report["why"]
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    assert (described.report["parameters"], described.report["weights_bytes"]) == (parameters, 4 * parameters)
    if kind == "slots":
        config = reference.config
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        assert described.report["kv_bytes"] == described.report["kv_rows"] * described.report["kv_context"] * token


def test_what_was_chosen_and_what_it_takes_is_said_while_it_opens(tiny_model, kind):
    said = []
    settings = {"engine": "auto" if kind == "slots" else "plain", "slots": 3, "kv_cache_gib": 2**-10, "device": "cpu"}
    spec = WorkerSpec("w", "", (ModelSpec("base"),), str(tiny_model.base), dtype="float32", torch_threads=2, **settings)
    made = open_engine(spec, lambda _, detail: said.append(detail))
    report = made.describe().report
    made.close()
    assert f"{kind} engine: {report['why']}" in said
    assert report["threads"] == 2  # where the engine computes; here it is one
    if kind == "slots":
        taken = f"{report['kv_bytes'] / 2**20:.0f} MiB of attention state ({report['kv_rows']} rows of 256 tokens)"
        assert f"{taken} for 3 requests at once" in said
        assert report["kv_bytes"] <= 2**20


def test_deterministic_only_in_float32(engine, tiny_model, kind, device):
    answer(engine, job(deterministic=True, max_new_tokens=2))
    half = enginekit.opened(tiny_model.base, dtype="bfloat16", engine=kind, device=device)
    try:
        assert half.describe().report["dtype"] == "bfloat16"
        with pytest.raises(BadRequestError, match="runs in bfloat16"):
            half.submit(job(deterministic=True))
        assert len(ids(answer(half, job(max_new_tokens=3, ignore_eos=True)))) == 3
    finally:
        half.close()
