"""An adapter that cannot be loaded is left out with its reason; its base and the adapters beside it are served."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopmux.codec import pack, unpack
from loopmux.errors import BadRequestError, ConfigError, ModelNotFoundError
from loopmux.messages import Generate, LeftOut, ModelSpec, Register, Run, Sampling, ServedModel, WorkerSpec
from loopmux.wire import ROUTE_LIMIT, new_id
from loopmux_worker.engine import adapterfiles, open_engine
from loopmux_worker.engine.adapters import Adapters
from loopmux_worker.engine.base import Description, Job, Key, Produced
from loopmux_worker.server import registration
from tinymodel import write_adapter


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def cut_tensors(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    narrow = {name: tensor[:, :1].contiguous() for name, tensor in weights.items()}
    save_file(narrow, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def tear_header(folder):
    """The file is as long as its header says; only who reads the header with its types finds it damaged."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"'))


def tear_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def damage_tokenizer(folder):
    """Its library panics over this, with what is no Exception."""
    damage = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}
    content = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(content | damage))


def remove_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def configure(**entries):
    return lambda folder: change(folder / "adapter_config.json", **entries)


def weigh(change):
    """Damage by changing one tensor, as a tool would that saves whatever it has."""

    def damage(folder):
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        name = sorted(weights)[-1]
        save_file(weights | {name: change(weights[name])}, path, metadata={"format": "pt"})

    return damage


NOT_SCALES = "expected a number between -65536 and 65536"
BREAKS = {
    "another base": (cut_tensors, "has shape (4, 1), expected (4, 32)"),
    "another rank": (configure(r=3), "has shape (4, 32), expected (3, 32)"),
    "no rank": (configure(r=0), "r: found 0, expected a whole number from 1: set what"),
    "a negative rank": (configure(r=-4), "r: found -4, expected a whole number from 1"),
    "a rank in words": (configure(r="4"), "r: found '4', expected a whole number from 1"),
    "a layer without rank": (
        configure(rank_pattern={"layers.1.self_attn.q_proj": 0}),
        "rank_pattern['layers.1.self_attn.q_proj']: found 0, expected a whole number from 1",
    ),
    "ranks for no layers": (configure(rank_pattern=[4]), "rank_pattern: found [4], expected names of layers"),
    "a scaling that is no number": (configure(lora_alpha=float("nan")), f"lora_alpha: found nan, {NOT_SCALES}"),
    "an infinite scaling": (configure(lora_alpha=float("-inf")), f"lora_alpha: found -inf, {NOT_SCALES}"),
    "an absurd scaling": (configure(lora_alpha=1e30), f"lora_alpha: found 1e+30, {NOT_SCALES}"),
    "a scaling in words": (configure(lora_alpha="8"), f"lora_alpha: found '8', {NOT_SCALES}"),
    "an absurd scaling of a layer": (
        configure(alpha_pattern={"q_proj": float("nan")}),
        f"alpha_pattern['q_proj']: found nan, {NOT_SCALES}",
    ),
    "whole numbers": (weigh(lambda t: t.to(torch.int8)), "holds int8, expected one of float32, bfloat16"),
    "bits": (weigh(lambda t: t > 0), "holds bool, expected one of float32, bfloat16"),
    "a type that means nothing by itself": (
        weigh(lambda t: t.to(torch.float8_e4m3fn)),
        "holds float8_e4m3fn, expected",
    ),
    "no numbers": (weigh(lambda t: t * float("nan")), "holds NaN or infinite values"),
    "infinite numbers": (weigh(lambda t: t / 0), "holds NaN or infinite values"),
    "numbers that the base has no room for": (
        weigh(lambda t: t.double() * 1e300),
        "is beyond what float32 holds, expected numbers within it",
    ),
    "no such layers": (configure(target_modules=["nope"]), "not found in the base model"),
    "some layers of the wrong kind": (configure(target_modules=["q_proj", "norm"]), "is not supported"),
    "a saved module that is missing": (configure(modules_to_save=["norm"]), "norm.weight is missing"),
    "a changed base": (
        configure(init_lora_weights="pissa"),
        "init_lora_weights: found 'pissa', with which PEFT changes",
    ),
    "a cut base": (configure(kasa_config={"beta": 1e-4}), "kasa_config: found"),
    "changed biases": (configure(bias="lora_only"), "bias: found 'lora_only'"),
    "repeated layers": (configure(layer_replication=[[0, 2], [0, 2]]), "layer_replication: found [[0, 2], [0, 2]]"),
    "what begins within a prompt": (configure(alora_invocation_tokens=[1]), "alora_invocation_tokens: found [1], by"),
    "what asks others": (configure(arrow_config={"top_k": 2}), "arrow_config: found"),
    "another kind": (configure(peft_type="PREFIX_TUNING"), "served are LORA ones"),
    "torn weights": (tear_header, "copy or save it again"),
    "no weights": (remove_weights, "no adapter_model.safetensors in"),
    "a torn tokenizer": (tear_tokenizer, "cannot load its tokenizer"),
    "a damaged tokenizer": (damage_tokenizer, "PanicException"),
    "nothing at all": (shutil.rmtree, "no directory"),
}


UNMIXED = ("a saved module that is missing",)
"""What makes the whole worker choose the plain engine before it is found to be broken."""


def damaged(kind, tiny_model, folder):
    """A copy of an adapter with one of BREAKS."""
    shutil.copytree(tiny_model.adapters["red"], folder)
    BREAKS[kind][0](folder)
    return folder


def opened(tiny_model, *models, **settings):
    spec = WorkerSpec("w", "", models, str(tiny_model.base), torch_threads=1, **settings)
    return open_engine(spec, lambda *_: None)


def greedy(engine, model):
    request = Generate(prompt="hello", max_new_tokens=12, sampling=Sampling(temperature=0))
    engine.submit(Job(Key(new_id(), 1), Run(model), request))
    ids = []
    while engine.due() is not None:
        ids += [i for output in engine.step() if isinstance(output, Produced) for i in output.ids]
    return ids


@pytest.fixture(scope="module")
def undisturbed(tiny_model):
    """What base and blue answer where nothing was ever broken."""
    engine = opened(tiny_model, ModelSpec("base"), ModelSpec("blue", str(tiny_model.adapters["blue"])))
    try:
        return {name: greedy(engine, name) for name in ("base", "blue")}
    finally:
        engine.close()


@pytest.mark.parametrize("first", [True, False], ids=["before the good one", "after it"])
@pytest.mark.parametrize("kind", ["slots", "plain"])
def test_the_others_are_served_as_if_they_had_never_been_there(tiny_model, tmp_path, undisturbed, kind, first):
    """All of them in one worker, which takes a second to open; each has to be told with its own reason."""
    names = [name for name in BREAKS if kind == "plain" or name not in UNMIXED]
    folders = {name: damaged(name, tiny_model, tmp_path / str(i)) for i, name in enumerate(names)}
    bad = [ModelSpec(name, str(folder)) for name, folder in folders.items()]
    good = [ModelSpec("blue", str(tiny_model.adapters["blue"]))]
    engine = opened(tiny_model, ModelSpec("base"), *(bad + good if first else good + bad), engine=kind)
    try:
        described = engine.describe()
        assert described.engine == kind
        assert [m.id for m in described.models] == ["base", "blue"]
        assert described.adapters == ("blue",)
        assert [left.id for left in described.left_out] == names
        for left in described.left_out:
            assert BREAKS[left.id][1] in left.reason, left
            assert str(folders[left.id]) in left.reason, left
        assert {name: greedy(engine, name) for name in ("base", "blue", "base")} == undisturbed
        for name in names:
            with pytest.raises(ModelNotFoundError):
                greedy(engine, name)
        with pytest.raises(ConfigError, match="PanicException"):
            engine.load_adapter("late", str(folders["a damaged tokenizer"]))
    finally:
        engine.close()


def test_one_that_only_peft_could_apply_leaves_the_others_on_the_plain_engine(tiny_model, tmp_path, undisturbed):
    [name] = UNMIXED
    folder = damaged(name, tiny_model, tmp_path / "bad")
    models = (ModelSpec("bad", str(folder)), ModelSpec("blue", str(tiny_model.adapters["blue"])))
    engine = opened(tiny_model, ModelSpec("base"), *models, engine="auto")
    try:
        assert engine.describe().engine == "plain"
        assert [left.id for left in engine.describe().left_out] == ["bad"]
        assert {name: greedy(engine, name) for name in ("base", "blue")} == undisturbed
    finally:
        engine.close()


@pytest.mark.parametrize("name", [name for name in BREAKS if "tokenizer" not in name])
def test_nothing_of_it_stays_in_the_model(tiny_model, tmp_path, name):
    folder = damaged(name, tiny_model, tmp_path / "bad")
    model = tiny_model.model()
    modules, numbers = [name for name, _ in model.named_modules()], model(torch.tensor([[5, 6, 7]])).logits
    adapters = Adapters(model)
    with pytest.raises(ConfigError):
        adapters.load("bad", str(folder))
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, numbers)


def test_an_adapter_that_saves_modules_can_go_and_another_come(tiny_model):
    model = tiny_model.model()
    adapters = Adapters(model)
    adapters.load("saved", str(tiny_model.adapters["saved"]))
    adapters.unload("saved")
    adapters.load("blue", str(tiny_model.adapters["blue"]))
    fresh = tiny_model.model()
    alone = Adapters(fresh)
    alone.load("blue", str(tiny_model.adapters["blue"]))
    with adapters.using("blue"), alone.using("blue"):
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, fresh(torch.tensor([[5, 6, 7]])).logits)


def logits(adapters, model, name=None):
    with adapters.using(name), torch.inference_mode():
        return model(torch.tensor([[5, 6, 7]])).logits


def test_what_peft_cannot_hold_beside_others_is_refused_and_nothing_of_either_stays(tiny_model, tmp_path):
    """It keeps a module of its own around layers that the other one has changed."""
    folder = write_adapter(
        tiny_model.base, tmp_path / "mlp", seed=1, modules_to_save=["mlp"], target_modules=["q_proj"]
    )
    model = tiny_model.model()
    adapters = Adapters(model)
    bare = logits(adapters, model)
    adapters.load("red", str(tiny_model.adapters["red"]))
    red = logits(adapters, model, "red")
    with pytest.raises(ConfigError, match=r"does not take it beside red .KeyError.*serve it by a worker of its own"):
        adapters.load("mlp", str(folder))
    assert torch.equal(logits(adapters, model, "red"), red)
    adapters.unload("red")
    assert torch.equal(logits(adapters, model), bare)
    assert [type(module) for module in model.modules()] == [type(module) for module in tiny_model.model().modules()]


def test_a_worker_with_nothing_but_broken_adapters_fails_with_every_reason(tiny_model, tmp_path):
    one = shutil.copytree(tiny_model.adapters["red"], tmp_path / "one")
    two = shutil.copytree(tiny_model.adapters["red"], tmp_path / "two")
    cut_tensors(one)
    remove_weights(two)
    with pytest.raises(ConfigError) as caught:
        opened(tiny_model, ModelSpec("a", str(one)), ModelSpec("b", str(two)))
    assert caught.value.message.startswith("none of its 2 models can be served: a: ")
    assert "expected (4, 32)" in caught.value.message
    assert "; b: " in caught.value.message
    with pytest.raises(ConfigError) as alone:
        opened(tiny_model, ModelSpec("a", str(one)))
    assert alone.value.message.startswith(str(one))


def test_a_broken_base_fails_whole_whatever_the_adapters_are(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model.base, tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    models = (ModelSpec("base"), ModelSpec("blue", str(tiny_model.adapters["blue"])))
    with pytest.raises(ConfigError, match="cannot load its tokenizer"):
        open_engine(WorkerSpec("w", "", models, str(base), torch_threads=1), lambda *_: None)


def test_once_it_is_mended_it_can_be_loaded_beside_the_others(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model.adapters["red"], tmp_path / "red")
    cut_tensors(folder)
    engine = opened(tiny_model, ModelSpec("base"), ModelSpec("red", str(folder)))
    try:
        assert [one.id for one in engine.describe().left_out] == ["red"]
        shutil.copy(tiny_model.adapters["red"] / "adapter_model.safetensors", folder)
        engine.load_adapter("red", str(folder))
        assert engine.describe().left_out == ()
        assert greedy(engine, "red") != greedy(engine, "base")
        with pytest.raises(BadRequestError, match="served already"):
            engine.load_adapter("red", str(tiny_model.adapters["blue"]))
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["slots", "plain"])
def test_one_that_is_written_while_it_is_loaded_is_refused(tiny_model, tmp_path, undisturbed, monkeypatch, kind):
    """Else its fingerprint would be that of files which were not loaded."""
    folder = shutil.copytree(tiny_model.adapters["red"], tmp_path / "red")
    shutil.copy(tiny_model.adapters["red"] / "adapter_model.safetensors", tmp_path / "other")
    with (tmp_path / "other").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))
    read = adapterfiles._read_weights

    def read_and_replace(path):
        weights = read(path)
        (tmp_path / "other").replace(path)
        return weights

    engine = opened(tiny_model, ModelSpec("base"), engine=kind)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(adapterfiles, "_read_weights", read_and_replace)
            with pytest.raises(ConfigError, match=r"adapter_model.safetensors changed while it was loaded"):
                engine.load_adapter("red", str(folder))
        assert engine.describe().adapters == ()
        assert greedy(engine, "base") == undisturbed["base"]
        engine.load_adapter("red", str(folder))
        assert engine.describe().adapters == ("red",)
    finally:
        engine.close()


# --- what the broker is told ------------------------------------------------------------------------------------------


def registered(left_out, models=1):
    served = tuple(ServedModel(f"model-{i}", "f" * 16) for i in range(models))
    return registration(WorkerSpec("w", "", ()), Description("plain", served, 1, left_out=tuple(left_out)), b"b" * 16)


def test_a_reason_that_fits_is_told_as_it_is():
    [left] = registered([LeftOut("bad", "the reason")]).left_out
    assert left == LeftOut("bad", "the reason")


def test_many_long_reasons_are_shortened_so_that_the_message_fits():
    register = registered([LeftOut(f"bad-{i}", f"found {i} " + "x" * 3000 + " do this") for i in range(20)], models=4)
    assert len(pack(register)) <= ROUTE_LIMIT
    assert unpack(Register, pack(register)) == register
    for i, left in enumerate(register.left_out):
        assert left.reason.startswith(f"found {i} ")
        assert left.reason.endswith("do this")


def test_more_than_a_message_takes_is_refused():
    with pytest.raises(ConfigError, match="spread them over several workers"):
        registered([LeftOut("bad-" + "x" * 100, "reason") for _ in range(60)])
