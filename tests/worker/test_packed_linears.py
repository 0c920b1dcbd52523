"""Linear layers with packed weights, against the plain ones."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_worker.engine import open_engine, opening
from loopmux_worker.engine.slots import linears
from loopmux_worker.engine.slots.linears import JoinedLinear, PackedLinear, alike, can_pack, pack

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
needs = {
    dtype: pytest.mark.skipif(not can_pack(dtype), reason=f"this machine or this torch packs no {dtype}")
    for dtype in TOLERANCE
}
DTYPES = [pytest.param(dtype, marks=mark) for dtype, mark in needs.items()]


def llama(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 32), (33, 17), (1, 5), (257, 96)], ids=str)
def test_a_packed_layer_equals_the_plain_one(shape, bias, dtype):
    torch.manual_seed(0)
    out, width = shape
    plain = nn.Linear(width, out, bias=bias, dtype=dtype)
    packed = PackedLinear(plain)
    for rows in (1, 2, 8, 16, 17, 128, 512):
        x = torch.randn(1, rows, width).to(dtype)
        with torch.inference_mode():
            found, expected = packed(x), functional.linear(x, plain.weight, plain.bias)
        assert found.shape == expected.shape
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        onto = torch.randn_like(expected)
        kept = onto.clone()
        with torch.inference_mode():
            both = linears.product(x, packed._packed, packed.bias, onto=onto)
        torch.testing.assert_close(both, expected + kept, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
        assert torch.equal(onto, kept)
    strided = torch.randn(3, 2 * width).to(dtype)[:, ::2]
    with torch.inference_mode():
        torch.testing.assert_close(packed(strided), plain(strided), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
def test_logits_of_a_packed_model(settings, dtype):
    model = llama(dtype, **settings)
    packed = copy.deepcopy(model)
    assert pack(packed) == 2 * 7 + 1
    assert not any(type(module) is nn.Linear for module in packed.modules())
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        found, expected = packed(ids).logits, model(ids).logits
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_layers_that_get_the_same_input_are_one_product(settings, dtype):
    model = llama(dtype, **settings)
    packed = copy.deepcopy(model)
    names = {module: name for name, module in packed.named_modules()}
    found = alike(packed, torch.tensor([[0, 1]]))
    assert [[names[layer].rpartition(".")[2] for layer in group] for group in found] == 2 * [
        ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"],
    ]  # fmt: skip
    assert not any(module._forward_pre_hooks for module in packed.modules())
    assert pack(packed, found) == 2 * 7 + 1
    assert sum(type(module) is JoinedLinear for module in packed.modules()) == 2 * 5
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        for _ in range(2):
            got, expected = packed(ids).logits, model(ids).logits
            scale = float(expected.abs().max())
            torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype])


@needs[torch.float32]
def test_a_part_is_of_the_input_that_it_is_called_with_in_any_order():
    torch.manual_seed(0)
    plain = [nn.Linear(8, size) for size in (3, 5, 2)]
    model = nn.ModuleList(copy.deepcopy(plain))
    pack(model, [tuple(model)])
    one, other = torch.randn(2, 4, 8)
    with torch.inference_mode():
        for places in ((0, 1, 2), (2, 0), (1, 1, 1), (0,), (2, 1, 0)):
            for x in (one, other, one.clone()):
                for place in places:
                    torch.testing.assert_close(model[place](x), plain[place](x))


@needs[torch.float32]
def test_plain_weights_go_and_a_tied_embedding_keeps_its_own():
    model = llama(tie_word_embeddings=True)
    gone = [
        weakref.ref(layer.weight) for layer in (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj)
    ]
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()
    pack(model, alike(model, torch.tensor([[0, 1]])))
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert torch.equal(model.get_input_embeddings().weight, before)


@needs[torch.float32]
def test_what_is_no_plain_layer_stays():
    class Own(nn.Linear):
        pass

    hooked, twice = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({
        "own": Own(4, 4), "hooked": hooked, "elsewhere": nn.Linear(4, 4, device="meta"),
        "wide": nn.Linear(4, 4, dtype=torch.float64), "a": twice, "b": nn.Sequential(twice),
    })  # fmt: skip
    assert pack(model) == 1
    assert isinstance(model["a"], PackedLinear)
    assert model["a"] is model["b"][0]
    assert {name for name in ("own", "hooked", "elsewhere", "wide") if type(model[name]) is PackedLinear} == set()


def test_a_torch_without_these_operators_packs_nothing(monkeypatch):
    def missing(weight):
        raise AttributeError("no such operator")

    monkeypatch.setattr(linears, "packed", missing)
    assert pack(llama()) == 0


@needs[torch.float32]
@pytest.mark.parametrize("damage", [False, True], ids=["right", "wrong"])
def test_a_packed_model_has_to_give_the_logits_of_the_plain_one(tiny_model, monkeypatch, damage):
    """Its own forward would prove nothing: it is packed just the same."""
    whole = opening.pack

    def damaged(model, together):
        count = whole(model, together)
        layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
        layer.bias = 3 * torch.ones(layer.out_features)
        return count

    if damage:
        monkeypatch.setattr(opening, "pack", damaged)
    spec = WorkerSpec("w", "", (ModelSpec("m"),), str(tiny_model.base), dtype="float32", torch_threads=1)
    engine = open_engine(spec, lambda *_: None)
    described = engine.describe()
    kinds = {type(module) for module in engine.model.modules()}
    engine.close()
    assert described.engine == "slots"
    assert (PackedLinear in kinds, nn.Linear in kinds) == (not damage, damage)
    notes = [note for note in described.report["notes"] if "not packed" in note]
    assert bool(notes) == damage
    assert not damage or "gives other logits" in notes[0]
