"""Packed tokens of several adapters in one forward, against PEFT with each of them active alone."""

import functools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from loopmux.errors import AdapterNotFoundError, BadRequestError, ConfigError, EngineError
from loopmux_worker.engine.slots import lora
from loopmux_worker.engine.slots.linears import Joined, alike, pack
from loopmux_worker.engine.slots.lora import LONG, MixedAdapters, MixedLinear, Piece, pieces
from loopmux_worker.engine.slots.pairs import CannotMix, _unlike
from tinymodel import write_base

CLOSE = {
    "cpu": {"rtol": 1e-5, "atol": 1e-5},
    "cuda": {"rtol": 1e-4, "atol": 1e-4},  # the same sums, in an order that depends on how many rows there are
}
REGEX = r".*\.(q_proj|v_proj|down_proj)"
KINDS = {
    "one": {"r": 1, "target_modules": "all-linear"},
    "four": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "sixteen": {"r": 16, "use_rslora": True, "lora_alpha": 5, "target_modules": ["k_proj", "o_proj", "up_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": REGEX,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
        "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 7},
    },
    "patterns and rs": {"r": 3, "use_rslora": True, "target_modules": REGEX, "rank_pattern": {"v_proj": 5}},
    "a layer": {"r": 8, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    "excluding": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
}


def write_qwen(folder):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def write_adapter(base, folder, seed=0, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(opened(base), LoraConfig(**({"lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def opened(base, device="cpu", dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().to(device)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (write_base if request.param == "llama" else write_qwen)(folder)
    return folder


@pytest.fixture(scope="module")
def kinds(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {n: write_adapter(base, root / n, seed, **settings) for seed, (n, settings) in enumerate(KINDS.items(), 1)}


@pytest.fixture
def red(base, tmp_path):
    return write_adapter(base, tmp_path / "red", r=4, target_modules=["q_proj"])


def tokens(count, seed):
    return torch.randint(0, 272, (count,), generator=torch.Generator().manual_seed(seed))


@functools.cache
def alone(base, folder, device, dtype):
    """PEFT with one adapter, or the base."""
    model = opened(base, device, dtype)
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval().to(device) if folder else model


def reference(base, folder, ids, device="cpu", dtype=torch.float32):
    """Logits of one sequence."""
    with torch.inference_mode():
        return alone(base, folder, device, dtype)(ids[None].to(device)).logits[0].cpu()


def check(found, base, folder, ids, device):
    """Ours is as near to the truth as PEFT itself in the same dtype.

    How far two right answers in fp32 lie apart is the processor's matter: this model's attention blows the rounding of
    single tokens up to 1e-4. The truth is PEFT in float64. A wrong scale, row or adapter is off by 1e-2 and more.
    """
    true = reference(base, folder, ids, device, torch.float64)
    ours, theirs = (found - true).abs(), (reference(base, folder, ids, device) - true).abs()
    assert ours.mean() <= 2 * theirs.mean() + 1e-6, (ours.mean(), theirs.mean())
    assert ours.max() <= 1e-3, (ours.max(), theirs.max())


def packed(model, adapters, runs, sequences, **options):
    """Logits per sequence from one forward over all of them, each seeing itself alone."""
    ids = torch.cat(sequences)[None]
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(sequences)])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    sees = (owner[:, None] == owner) & (positions[:, None] >= positions)
    adapters.use(runs, **options)
    with torch.inference_mode():
        mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
        given = [tensor.to(model.device) for tensor in (ids, mask[None, None], positions[None])]
        logits = model(given[0], attention_mask=given[1], position_ids=given[2]).logits[0]
        return logits.cpu().split([len(s) for s in sequences])


def mixed(base, kinds, *place):
    model = opened(base, *place)
    adapters = MixedAdapters(model)
    for name, folder in kinds.items():
        adapters.load(name, folder)
    return model, adapters


@pytest.fixture(scope="module")
def all_kinds(base, kinds, device):
    return mixed(base, kinds, device)


@pytest.mark.parametrize("lengths", [(1,), (7, 3, 1), (LONG + 5, 2, 1, LONG)], ids=str)
def test_every_run_equals_peft_with_its_adapter(base, kinds, all_kinds, lengths, device):
    model, adapters = all_kinds
    names = [*kinds, None, *reversed(kinds), None, None, "four", "four"]
    runs = [(name, lengths[i % len(lengths)]) for i, name in enumerate(names)]
    sequences = [tokens(count, seed) for seed, (_, count) in enumerate(runs)]
    for (name, _), ids, found in zip(runs, sequences, packed(model, adapters, runs, sequences), strict=True):
        check(found, base, kinds[name] if name else None, ids, device)


@pytest.mark.parametrize("name", KINDS)
def test_one_adapter_alone_equals_peft(base, kinds, all_kinds, name, device):
    model, adapters = all_kinds
    ids = tokens(9, 1)
    [found] = packed(model, adapters, [(name, 9)], [ids])
    check(found, base, kinds[name], ids, device)


def test_the_base_among_adapters_is_the_base(base, all_kinds, device):
    model, adapters = all_kinds
    ids = tokens(9, 1)
    [found] = packed(model, adapters, [(None, 9)], [ids])
    plain = opened(base, device)
    assert torch.equal(found, packed(plain, MixedAdapters(plain), [], [ids])[0])


@pytest.mark.parametrize("joining", [False, True])
def test_packed_layers_carry_adapters_too(base, kinds, joining):
    """Also where layers of one input are one product, of which an adapter may target some."""
    names = [*kinds, None, "four"]
    runs = [(name, LONG if name == "patterns" else 3) for name in names]
    sequences = [tokens(count, seed) for seed, (_, count) in enumerate(runs)]
    model = opened(base)
    pack(model, alike(model, tokens(2, 0)[None]) if joining else ())
    bare = packed(model, MixedAdapters(model), [], sequences)
    adapters = MixedAdapters(model)
    for name, folder in kinds.items():
        adapters.load(name, folder)
    joined = [place for place in adapters._mixed if isinstance(place, Joined)]
    assert len(joined) == (4 if joining else 0)
    for name, ids, found in zip(names, sequences, packed(model, adapters, runs, sequences), strict=True):
        check(found, base, kinds[name] if name else None, ids, "cpu")
    for name in kinds:
        adapters.unload(name)
    assert not any(isinstance(module, MixedLinear) for module in model.modules())
    for found, expected in zip(packed(model, adapters, [], sequences), bare, strict=True):
        assert torch.equal(found, expected)


def test_half_precision_stays_half_and_close(base, kinds, device):
    model, adapters = mixed(base, kinds, device, torch.bfloat16)
    assert {p.down.dtype for mixed in adapters._mixed.values() for p in mixed.pairs.values()} == {torch.bfloat16}
    runs, sequences = [("sixteen", 4), ("one", 3)], [tokens(4, 1), tokens(3, 2)]
    for (name, _), ids, found in zip(runs, sequences, packed(model, adapters, runs, sequences), strict=True):
        exact = reference(base, kinds[name], ids, device)
        theirs = (reference(base, kinds[name], ids, device, torch.bfloat16) - exact).abs().mean()
        assert (found - exact).abs().mean() <= 1.5 * theirs


def test_a_dtype_that_cannot_be_packed_is_mixed_all_the_same(base, kinds):
    assert not lora.can_pack(torch.float64)
    model, adapters = mixed(base, kinds, "cpu", torch.float64)
    runs, sequences = [("sixteen", 4), ("one", 3)], [tokens(4, 1), tokens(3, 2)]
    for (name, _), ids, found in zip(runs, sequences, packed(model, adapters, runs, sequences), strict=True):
        expected = reference(base, kinds[name], ids, dtype=torch.float64)
        torch.testing.assert_close(found, expected, **CLOSE["cpu"])


def test_coming_and_going(base, kinds, device):
    model, adapters = mixed(base, {n: kinds[n] for n in ("one", "four", "patterns")}, device)
    sequences = [tokens(4, 1), tokens(2, 2), tokens(3, 3)]
    runs = [("one", 4), (None, 2), ("patterns", 3)]
    before = packed(model, adapters, runs, sequences)
    adapters.unload("four")
    assert list(adapters.loaded) == ["one", "patterns"]
    with pytest.raises(AdapterNotFoundError):
        adapters.use([("four", 1)])
    with pytest.raises(AdapterNotFoundError):
        adapters.unload("four")
    for found, expected in zip(packed(model, adapters, runs, sequences), before, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE[device])
    adapters.load("four", kinds["sixteen"])
    [found] = packed(model, adapters, [("four", 4)], sequences[:1])
    check(found, base, kinds["sixteen"], sequences[0], device)
    for found, expected in zip(packed(model, adapters, runs, sequences), before, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE[device])


def test_the_last_one_leaves_the_model_as_it_was(base, kinds, device):
    fresh = opened(base, device)
    model, adapters = mixed(base, kinds, device)
    adapters.use([("one", 4)])
    for name in kinds:
        adapters.unload(name)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    ids = tokens(4, 1)[None].to(device)
    assert torch.equal(model(ids).logits, fresh(ids).logits)


def test_layers_that_nothing_targets_stay_what_they_are(base, red):
    model, _ = mixed(base, {"red": red})
    layer = model.model.layers[0]
    assert type(layer.mlp.up_proj) is torch.nn.Linear
    assert layer.self_attn.q_proj.in_features == layer.self_attn.q_proj.out_features == 32


@pytest.mark.parametrize("packing", [True, False])
def test_a_neighbour_that_overflows_harms_nobody_else(base, kinds, packing, device, monkeypatch):
    if not packing:
        monkeypatch.setattr(lora, "can_pack", lambda dtype: False)
    model, adapters = mixed(base, {name: kinds[name] for name in ("one", "four")}, device)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 6, 32, device=device)
    adapters.use([("four", 3), (None, 3)])
    before = layer(x)
    layer.mixed.pairs["one"].down.fill_(float("inf"))
    adapters.use([("four", 3), ("one", 2), (None, 1)])
    found = layer(x)
    assert not found[:, 3:5].isfinite().any()
    torch.testing.assert_close(found[:, [0, 1, 2, 5]], before[:, [0, 1, 2, 5]], **CLOSE[device])


def test_without_packing_all_is_the_same(base, kinds, monkeypatch):
    runs, sequences = [("one", 2), ("patterns", 3), (None, 1), ("four", LONG)], [tokens(n, n) for n in (2, 3, 1, LONG)]
    packing = packed(*mixed(base, kinds), runs, sequences)
    monkeypatch.setattr(lora, "can_pack", lambda dtype: False)
    for found, expected in zip(packed(*mixed(base, kinds), runs, sequences), packing, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_who_is_stacked_changes_seldom(base, kinds):
    _, adapters = mixed(base, kinds)
    stacks = []
    for names in [("one", "four"), ("four", "sixteen"), ("one", "sixteen"), ("one",), (None,), ("patterns", "one")]:
        adapters.use([(name, 1) for name in names])
        stacks.append(adapters._stack)
    assert stacks == [("one", "four"), *[("one", "four", "sixteen")] * 4, ("one", "four", "sixteen", "patterns")]
    adapters.unload("four")
    adapters.use([("one", 1), ("a layer", 1)])
    assert adapters._stack == ("one", "sixteen", "patterns", "a layer")
    adapters.use([("one", 1), (None, 1), ("one", 1)])
    assert adapters._stack == ("one",)


def test_a_name_that_is_taken(base, red):
    _, adapters = mixed(base, {"red": red})
    with pytest.raises(BadRequestError, match="loaded already"):
        adapters.load("red", red)


def test_another_number_of_tokens_than_was_said(base, red):
    model, adapters = mixed(base, {"red": red})
    adapters.use([("red", 3)])
    with pytest.raises(EngineError, match="the spans given before have 3 tokens"):
        model(tokens(4, 1)[None])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_the_output_head_with_fewer_rows(base, tmp_path, device):
    folders = {
        "head": write_adapter(base, tmp_path / "head", r=4, target_modules=["lm_head", "q_proj"]),
        "body": write_adapter(base, tmp_path / "body", 1, r=2, target_modules=["q_proj"]),
    }
    model, adapters = mixed(base, folders, device)
    runs, sequences = [("head", 3), ("body", 2), ("head", 1)], [tokens(3, 1), tokens(2, 2), tokens(1, 3)]
    found = packed(model, adapters, runs, sequences)
    for (name, _), ids, logits in zip(runs, sequences, found, strict=True):
        check(logits, base, folders[name], ids, device)
    adapters.use(runs, head=[("head", 1), ("body", 1), ("head", 1)])
    output = model.get_output_embeddings()
    rows = output(torch.ones(1, 3, 32, device=device))[0]
    torch.testing.assert_close(rows[0], rows[2], rtol=0, atol=0)


# --- what cannot be mixed ---------------------------------------------------------------------------------------------


def change(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


CANNOT = {
    "DoRA": ({"use_dora": True}, "DoraLinearVariant"),
    "saved modules": ({"modules_to_save": ["norm"]}, "modules_to_save"),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
    "biases": ({"lora_bias": True}, "lora_bias"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "targets a Embedding"),
    "parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "no plain linear"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.*lora_B.bias", "ignore:.lora_bias")
@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_be_mixed_is_refused_with_the_reason(base, kinds, tmp_path, kind):
    settings, reason = CANNOT[kind]
    folder = write_adapter(base, tmp_path / "bad", **({"r": 4, "target_modules": ["q_proj"]} | settings))
    with pytest.raises(CannotMix, match=reason) as caught:
        unharmed(base, kinds, folder)
    assert str(folder) in caught.value.message


def test_experts_get_tokens_in_an_order_of_their_own():
    experts = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    model = get_peft_model(torch.nn.ModuleDict({"experts": experts}), LoraConfig(target_modules=["0"]))
    layer = model.base_model.model["experts"][0]
    assert "order of their own" in _unlike("layers.1.experts.0", layer)


def test_another_type_of_adapter(base, kinds, red, tmp_path):
    change(tmp_path / "red", peft_type="IA3")
    with pytest.raises(ConfigError, match="served are LORA ones"):
        unharmed(base, kinds, red)


def test_damaged_adapters(base, kinds, red, tmp_path):
    weights = load_file(tmp_path / "red" / "adapter_model.safetensors")
    name = min(weights)
    for damaged, reason in [
        ({n: t for n, t in weights.items() if n != name}, "is missing, expected shape"),
        (weights | {name: weights[name][:, :1].contiguous()}, r"has shape \(4, 1\), expected \(4, 32\)"),
        (weights | {"more": torch.ones(1)}, "has no place in the base model"),
        (weights | {name: weights[name] * float("nan")}, "holds NaN"),
    ]:
        save_file(damaged, tmp_path / "red" / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=reason):
            unharmed(base, kinds, red)
    save_file(weights, tmp_path / "red" / "adapter_model.safetensors", metadata={"format": "pt"})
    change(tmp_path / "red", target_modules=["query_key_value"])
    with pytest.raises(ConfigError, match="does not fit the base model"):
        unharmed(base, kinds, red)
    shutil.rmtree(tmp_path / "red")
    with pytest.raises(ConfigError, match="no directory"):
        unharmed(base, kinds, red)


def unharmed(base, kinds, folder):
    """Load an adapter that fails, beside others and first of all, and see that nothing changed by it."""
    ids = tokens(5, 1)[None]
    for others in ({}, {"four": kinds["four"]}):
        model, adapters = mixed(base, others)
        adapters.use([(name, 5) for name in others])
        before, modules = model(ids).logits, [(n, id(m)) for n, m in model.named_modules()]
        with pytest.raises(ConfigError) as caught:
            adapters.load("bad", folder)
        assert [(n, id(m)) for n, m in model.named_modules()] == modules
        assert torch.equal(model(ids).logits, before)
        assert set(adapters.loaded) == set(others)
    raise caught.value


# --- cutting runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([], []),
        ([(None, 5)], []),
        ([("a", 3)], [Piece(0, (("a", 3),), "a")]),
        ([(None, 2), ("a", 1), ("a", 2), (None, 9)], [Piece(2, (("a", 3),), "a")]),
        ([("a", 1), ("b", 1), (None, 1)], [Piece(0, (("a", 1), ("b", 1)), None)]),
        ([("a", 1), (None, 1), ("a", 1)], [Piece(0, (("a", 1), (None, 1), ("a", 1)), None)]),
        ([("a", 1), ("b", LONG), ("c", 1)],
         [Piece(0, (("a", 1),), "a"), Piece(1, (("b", LONG),), "b"), Piece(LONG + 1, (("c", 1),), "c")]),
        ([("a", 1), (None, LONG), ("c", 1)], [Piece(0, (("a", 1),), "a"), Piece(LONG + 1, (("c", 1),), "c")]),
        ([("a", LONG - 1), ("a", 1)], [Piece(0, (("a", LONG),), "a")]),
    ],
)  # fmt: skip
def test_cutting_runs(runs, expected):
    assert pieces(runs) == expected
