import json
import re
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from loopmux.errors import AdapterNotFoundError, ConfigError
from loopmux.messages import Generate, ModelSpec, Run, Sampling, WorkerSpec
from loopmux.modelfolders import adapter_folder
from loopmux.weightfiles import model_weights, tensors
from loopmux.wire import new_id
from loopmux_worker.engine import fingerprints, loading, memory, open_engine, opening
from loopmux_worker.engine.adapters import Adapters
from loopmux_worker.engine.base import Job, Key, Produced
from loopmux_worker.engine.slots.lora import MixedAdapters
from tinymodel import write_adapter, write_base, write_tokenizer


def spec(base, *models, **options):
    return WorkerSpec("w", "", models or (ModelSpec("m"),), str(base), torch_threads=1, **options)


def opened(given):
    return open_engine(given, lambda *_: None)


def refusal(given):
    with pytest.raises(ConfigError) as caught:
        opened(given).close()
    return caught.value.message


def greedy(engine, model="m", prompt="hello"):
    key = Key(new_id(), 1)
    engine.submit(Job(key, Run(model), Generate(prompt=prompt, max_new_tokens=12, sampling=Sampling(temperature=0))))
    ids = []
    while engine.due() is not None:
        ids += [i for output in engine.step() if isinstance(output, Produced) for i in output.ids]
    return ids


def answers(given, model="m"):
    engine = opened(given)
    try:
        return greedy(engine, model)
    finally:
        engine.close()


@pytest.fixture
def base(tiny_model, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_model.base, tmp_path / "base")


@pytest.fixture
def red(tiny_model, tmp_path):
    return shutil.copytree(tiny_model.adapters["red"], tmp_path / "red")


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# --- folders that load ------------------------------------------------------------------------------------------------


def test_a_checkpoint_folder_without_an_adapter_stands_for_its_parent(tiny_model, red):
    (red / "checkpoint-30").mkdir()
    (red / "checkpoint-30" / "trainer_state.json").write_text("{}")
    assert adapter_folder(str(red / "checkpoint-30")) == red
    found = answers(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(red / "checkpoint-30"))))
    assert found == answers(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(red))))


def test_a_checkpoint_folder_with_an_adapter_is_used_itself(red, tmp_path):
    inner = shutil.copytree(red, red / "checkpoint-7")
    assert adapter_folder(str(inner)) == inner


def test_a_merged_model_is_loaded_as_a_model(tiny_model, tmp_path):
    merged = PeftModel.from_pretrained(tiny_model.model(), tiny_model.adapters["red"]).merge_and_unload()
    folder = shutil.copytree(tiny_model.base, tmp_path / "merged")
    (folder / "model.safetensors").unlink()
    weights = {name: tensor.clone() for name, tensor in merged.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    as_adapter = spec(tiny_model.base, ModelSpec("m", adapter_dir=str(folder)))
    assert answers(as_adapter) == answers(
        spec(tiny_model.base, ModelSpec("m", adapter_dir=str(tiny_model.adapters["red"])))
    )
    engine = opened(as_adapter)
    try:
        assert engine.describe().adapters == ()
        assert engine.describe().models[0].adapter is None
        with pytest.raises(AdapterNotFoundError):
            engine.submit(Job(Key(new_id(), 1), Run("m", "other"), Generate(prompt="x")))
    finally:
        engine.close()
    assert "cannot share" in refusal(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(folder)), ModelSpec("n")))


def test_the_adapters_tokenizer_goes_first_and_borrows_a_template(tiny_model, red):
    write_tokenizer(red, template=None)
    engine = opened(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(red))))
    try:
        assert engine._models.served["m"].tokenizer.name_or_path == str(red)
        assert "the base's is used" in engine.describe().report["notes"][0]
        assert greedy(engine)
        engine.load_adapter("again", str(red))
        assert len(engine.describe().report["notes"]) == 2
        engine.unload_adapter("again")
        assert len(engine.describe().report["notes"]) == 1, "what went is no longer spoken of"
    finally:
        engine.close()


def test_an_adapters_tokenizer_says_what_ends_its_own_outputs_alone(tiny_model, red):
    write_tokenizer(red)
    change(red / "tokenizer_config.json", eos_token="<pad>")
    engine = opened(spec(tiny_model.base, ModelSpec("base"), ModelSpec("m", adapter_dir=str(red))))
    padding = Sampling(temperature=0, logit_bias={"264": 1000.0})
    try:
        for model, reason in (("m", "stop"), ("base", "length")):
            engine.submit(Job(Key(new_id(), 1), Run(model), Generate(prompt="x", max_new_tokens=3, sampling=padding)))
            outputs = []
            while engine.due() is not None:
                outputs += engine.step()
            assert outputs[-1].reason == reason
    finally:
        engine.close()


def test_an_adapter_that_names_another_base_is_served_with_a_note_and_a_warning(tiny_model, red):
    change(red / "adapter_config.json", base_model_name_or_path="org/another")
    good = ModelSpec("blue", adapter_dir=str(tiny_model.adapters["blue"]))
    with capture_logs() as logged:
        engine = opened(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(red)), good))
    try:
        [note] = engine.describe().report["notes"]
        assert note.startswith(f"m: {red}/adapter_config.json names the base 'org/another'")
        assert str(tiny_model.base) in note
        assert [(line["event"], line["model"], line["log_level"]) for line in logged] == [
            ("adapter of another base", "m", "warning")
        ]
        assert greedy(engine)
    finally:
        engine.close()


def test_a_model_without_a_template_gets_a_plain_format_and_a_note(base):
    (base / "chat_template.jinja").unlink()
    engine = opened(spec(base))
    try:
        assert "no chat template" in engine.describe().report["notes"][0]
        assert greedy(engine)
    finally:
        engine.close()


def test_fingerprints_name_the_content(tiny_model, base, red):
    def fingerprint(given):
        engine = opened(given)
        engine.close()
        return engine.describe().models[0].fingerprint

    model = ModelSpec("m", adapter_dir=str(red))
    first = fingerprint(spec(base, model))
    assert fingerprint(spec(tiny_model.base, ModelSpec("other", adapter_dir=str(tiny_model.adapters["red"])))) == first
    assert fingerprint(spec(base, model, dtype="bfloat16")) != first
    weights = load_file(red / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, red / "adapter_model.safetensors", metadata={"format": "pt"})
    assert fingerprint(spec(base, model)) != first


def test_what_ends_an_answer_and_what_computes_it_are_content_too(base):
    found = [fingerprints.of(base)]
    change(base / "generation_config.json", eos_token_id=5)
    found.append(fingerprints.of(base))
    (base / "modeling_own.py").write_text("")
    found.append(fingerprints.of(base))
    assert len(set(found)) == 3


def test_dtype_auto_is_the_checkpoints(tmp_path):
    write_base(tmp_path / "half", dtype=torch.bfloat16)
    engine = opened(spec(tmp_path / "half"))
    try:
        assert engine.describe().report["dtype"] == "bfloat16"
    finally:
        engine.close()


def test_half_precision_adapters_stay_half(tiny_model):
    model = tiny_model.model().to(torch.bfloat16)
    Adapters(model).load("red", str(tiny_model.adapters["red"]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("store", [Adapters, MixedAdapters])
def test_an_adapter_on_the_output_head_may_bring_a_copy_of_the_base(tiny_model, tmp_path, store):
    """PEFT saves one, and puts it in the base's place when it loads it."""
    folder = write_adapter(tiny_model.base, tmp_path / "head", seed=1, target_modules=["lm_head", "q_proj"])
    ids = torch.tensor([[5, 6, 7]])
    expected = PeftModel.from_pretrained(tiny_model.model(), folder)(ids).logits
    weights = load_file(folder / "adapter_model.safetensors")
    [copy] = [name for name in weights if ".base_layer." in name]
    save_file(weights | {copy: 2 * weights[copy]}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model = tiny_model.model()
    bare, adapters = model(ids).logits, store(model)
    adapters.load("head", str(folder))
    torch.testing.assert_close(computed(adapters, model, "head", ids), expected)
    assert torch.equal(computed(adapters, model, None, ids), bare)


def computed(adapters, model, name, ids):
    """Logits with an adapter of either store."""
    if isinstance(adapters, MixedAdapters):
        adapters.use([(name, ids.shape[1])])
        return model(ids).logits
    with adapters.using(name):
        return model(ids).logits


def test_pickled_weights_load_where_they_are_allowed(tiny_model, base, red):
    expected = answers(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(tiny_model.adapters["red"]))))
    for folder, old, new in [(base, "model", "pytorch_model"), (red, "adapter_model", "adapter_model")]:
        torch.save(load_file(folder / f"{old}.safetensors"), folder / f"{new}.bin")
        (folder / f"{old}.safetensors").unlink()
    model = ModelSpec("m", adapter_dir=str(red))
    assert answers(spec(base, model, allow_pickle_weights=True)) == expected
    assert "allow_pickle_weights" in refusal(spec(base, model))
    assert "allow_pickle_weights" in refusal(spec(tiny_model.base, model))


def test_the_last_adapter_can_go_and_another_come(tiny_model):
    model = tiny_model.model()
    adapters = Adapters(model)
    ids = torch.tensor([[5, 6, 7]])
    bare = model(ids).logits
    adapters.load("red", str(tiny_model.adapters["red"]))
    with adapters.using("red"):
        red = model(ids).logits
    adapters.unload("red")
    with adapters.using(None):
        assert torch.equal(model(ids).logits, bare)
    adapters.load("blue", str(tiny_model.adapters["blue"]))
    adapters.load("red", str(tiny_model.adapters["red"]))
    with adapters.using("red"):
        assert torch.equal(model(ids).logits, red)
    with adapters.using(None):
        assert torch.equal(model(ids).logits, bare)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_missing_folders(tmp_path, tiny_model):
    assert "found no such folder, expected one, or a hub id" in refusal(spec(tmp_path / "nowhere"))
    assert "base_model is missing" in refusal(WorkerSpec("w", "", (ModelSpec("m"),)))
    (tmp_path / "empty").mkdir()
    assert f"found no config.json in {tmp_path}/empty (it is empty)" in refusal(spec(tmp_path / "empty"))
    assert f"no directory {tmp_path}/no" in refusal(
        spec(tiny_model.base, ModelSpec("m", adapter_dir=str(tmp_path / "no")))
    )
    message = refusal(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(tmp_path / "empty"))))
    assert f"no adapter_config.json in {tmp_path}/empty" in message


def test_a_hub_name_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(spec("nobody/no-such-model"))
    assert "the hub does not give it" in message
    assert message.endswith("download it where there is a network: hf download nobody/no-such-model")


def test_missing_and_cut_weights(base):
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert f"of {len(whole) - 1000} bytes, expected {len(whole)} bytes, as its header says" in refusal(spec(base))
    weights.write_bytes(whole[:5])
    assert "cut off in its header" in refusal(spec(base))
    weights.write_bytes(b"\x10" + bytes(7) + b"not json........")
    assert "no safetensors file" in refusal(spec(base))
    weights.unlink()
    assert f"no model.safetensors in {base} (it holds" in refusal(spec(base))


def test_missing_shards(base):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"1 of 2 weight files missing in {base}, expected model-2.safetensors there" in refusal(spec(base))


def test_weights_of_another_configuration(base):
    change(base / "config.json", num_hidden_layers=3)
    assert "missing" in refusal(spec(base))


def test_weights_that_the_model_has_no_place_for_are_noted(base):
    path = base / "model.safetensors"
    more = {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(2)}
    save_file(load_file(path) | more, path, metadata={"format": "pt"})
    engine = opened(spec(base))
    try:
        [note] = engine.describe().report["notes"]
    finally:
        engine.close()
    assert note.startswith(
        "2 weights of its files have no place in this model and are not used, the first is model.layers.0"
    )


def test_weights_of_another_size(base):
    hidden = json.loads((base / "config.json").read_text())["intermediate_size"]
    change(base / "config.json", intermediate_size=2 * hidden)
    message = refusal(spec(base))
    assert "mismatched" in message
    assert str(hidden) in message
    assert str(2 * hidden) in message


def test_not_a_number_in_weights(base, red, tiny_model):
    for folder, name in [(base, "model"), (red, "adapter_model")]:
        weights = load_file(folder / f"{name}.safetensors")
        key = sorted(weights)[0]
        weights[key][0, 0] = float("nan")
        save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})
    assert "holds NaN" in refusal(spec(base))
    assert "holds NaN" in refusal(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(red))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_numbers_of_any_width_are_looked_at(dtype):
    numbers = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    assert loading.is_finite(numbers.to(dtype))
    numbers[1, 0] = float("nan")
    assert not loading.is_finite(numbers.to(dtype))


def test_half_written_adapters(tiny_model, red):
    model = ModelSpec("m", adapter_dir=str(red))
    weights = red / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "copy or save it again" in refusal(spec(tiny_model.base, model))
    weights.unlink()
    assert "no adapter_model.safetensors in" in refusal(spec(tiny_model.base, model))
    (red / "adapter_config.json").write_text('{"peft_type": "LORA", ')
    assert "adapter_config.json, which cannot be read" in refusal(spec(tiny_model.base, model))


def test_an_adapter_with_missing_or_extra_tensors(tiny_model, red):
    model = ModelSpec("m", adapter_dir=str(red))
    path = red / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name}, path, metadata={"format": "pt"})
    message = refusal(spec(tiny_model.base, model))
    assert f"{name} is missing, expected shape {tuple(weights[name].shape)}" in message
    save_file(weights | {name.replace("layers.0", "layers.9"): weights[name].clone()}, path, metadata={"format": "pt"})
    assert "has no place in the base model" in refusal(spec(tiny_model.base, model))


def test_an_adapter_of_another_base(tiny_model, tmp_path):
    write_base(tmp_path / "wide", hidden=64)
    wide = write_adapter(tmp_path / "wide", tmp_path / "adapter", seed=1)
    message = refusal(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(wide))))
    assert "has shape (4, 128), expected (4, 64)" in message or "has shape (4, 64), expected (4, 32)" in message
    assert "another base model" in message
    change(wide / "adapter_config.json", target_modules=["query_key_value"])
    assert "does not fit the base model" in refusal(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(wide))))


def test_a_refused_adapter_leaves_the_others_as_they_were(tiny_model, red):
    engine = opened(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(tiny_model.adapters["red"]))))
    try:
        before = greedy(engine)
        path = red / "adapter_model.safetensors"
        weights = load_file(path)
        save_file({k: v[:, :1].contiguous() for k, v in weights.items()}, path, metadata={"format": "pt"})
        with pytest.raises(ConfigError):
            engine.load_adapter("bad", str(red))
        assert greedy(engine) == before
        assert engine.describe().adapters == ("m",)
    finally:
        engine.close()


def test_other_kinds_of_adapters(tiny_model, red):
    change(red / "adapter_config.json", peft_type="PREFIX_TUNING")
    assert "PREFIX_TUNING" in refusal(spec(tiny_model.base, ModelSpec("m", adapter_dir=str(red))))


def test_quantisation_without_bitsandbytes(tiny_model):
    message = refusal(spec(tiny_model.base, use_4bit=True))
    assert "use_4bit: this environment has no bitsandbytes" in message
    assert "use_4bit: false" in message
    assert "at most one" in refusal(spec(tiny_model.base, use_4bit=True, use_8bit=True))


def test_code_from_a_checkpoint_is_not_run(base):
    (base / "modeling_evil.py").write_text("raise SystemExit('this code ran')")
    change(base / "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert "trust_remote_code" in refusal(spec(base))


def test_more_weights_than_memory(tiny_model, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1024)
    assert "MiB and cpu has 0 MiB free" in refusal(spec(tiny_model.base))


def test_memory_is_counted_in_the_dtype_that_is_asked_for(tiny_model):
    (path,) = model_weights(tiny_model.base, pickle=False)
    elements = sum(tensor.elements for tensor in tensors(path).values())
    assert memory.needed([path], 2) == 2 * elements
    assert memory.needed([path], None) == path.stat().st_size
    assert memory.available() > 2**20


def test_a_newer_rope_under_an_older_transformers(base, monkeypatch):
    change(base / "config.json", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    monkeypatch.setattr(loading.transformers, "__version__", "4.57.6")
    assert "rope_parameters" in refusal(spec(base))
    change(base / "config.json", rope_theta=500000.0)
    loading.check_environment(spec(base), base)
    monkeypatch.undo()
    loading.check_environment(spec(base), base)


def test_devices(tiny_model):
    assert "expected auto, cpu" in refusal(spec(tiny_model.base, device="gpu"))
    if not torch.cuda.is_available():
        assert "this machine and this torch have cpu" in refusal(spec(tiny_model.base, device="cuda:3"))
        assert loading.choose_device("auto").type in ("cpu", "mps")


def test_context_beyond_the_models_own(tiny_model):
    assert "context: found 4096, the model was made for at most 256" in refusal(spec(tiny_model.base, context=4096))


def test_a_tokenizer_of_another_model(base):
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    more = [{**tokenizer["added_tokens"][-1], "id": 271 + i, "content": f"<extra{i}>"} for i in range(20)]
    tokenizer["added_tokens"] += more
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "belongs to another model" in refusal(spec(base))


def test_a_tokenizer_that_cannot_be_loaded(base):
    (base / "tokenizer.json").write_text("{}")
    message = refusal(spec(base))
    assert f"transformers {transformers.__version__} cannot load its tokenizer" in message


def test_a_chat_template_that_is_no_template(base):
    (base / "chat_template.jinja").write_text("{% for message in messages %}\n{{ message['content'] }}\n{% endfr %}")
    message = refusal(spec(base))
    assert re.search(r"its chat template is no Jinja template \(line 3: .*endfr.*copy", message), message
    assert str(base) in message


def test_a_weight_file_without_tensors_is_refused_before_anything_is_made_up(base, tmp_path):
    shutil.copytree(base, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError, match=r"model.safetensors, which holds no tensors, .*copy or save it again"):
        opened(spec(tmp_path / "m"))


@pytest.mark.parametrize(("module", "name"), [(loading, "_load_model"), (opening, "pack")], ids=["loaded", "packed"])
def test_a_model_that_is_written_while_it_is_loaded_is_refused(base, tmp_path, monkeypatch, module, name):
    """Else its fingerprint would be that of files which were not loaded, or not packed."""
    whole = getattr(module, name)

    def replacing(*given):
        done = whole(*given)
        shutil.copy(base / "model.safetensors", tmp_path / "other")
        (tmp_path / "other").replace(base / "model.safetensors")
        return done

    monkeypatch.setattr(module, name, replacing)
    assert "model.safetensors changed while it was loaded, expected files that nobody" in refusal(spec(base))
