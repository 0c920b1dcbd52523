"""RMS norms in C, against the modules that they replace."""

import copy

import pytest
import torch
from structlog.testing import capture_logs
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loopmux_worker.engine.slots import compiling, norms
from loopmux_worker.engine.slots.norms import Norm

try:
    compiling.library("norm.c", BF16=1)
except compiling.Unavailable as error:
    pytest.skip(f"nothing can be compiled here: {error}", allow_module_level=True)


class Parent(nn.Module):
    def __init__(self, *children):
        super().__init__()
        for number, child in enumerate(children):
            setattr(self, f"n{number}", child)


def filled(norm, dtype=torch.float32):
    for parameter in norm.parameters():
        parameter.data = torch.randn_like(parameter)
    return norm.to(dtype).eval()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 768), (1, 4, 3, 64), (2, 33), (1, 600, 96), (0, 32)], ids=str)
def test_a_norm_is_the_one_that_was_there(shape, dtype):
    torch.manual_seed(0)
    plain = filled(LlamaRMSNorm(shape[-1], eps=1e-5), dtype)
    model = Parent(plain)
    assert norms.replace(model) == 1
    assert type(model.n0) is Norm
    for x in (torch.randn(shape), 1e-4 * torch.randn(shape), 1e4 * torch.randn(shape), torch.zeros(shape)):
        given = x.to(dtype)
        found = model.n0(given)
        assert found.shape == given.shape
        assert found.dtype == dtype
        torch.testing.assert_close(found, plain(given), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
        assert torch.equal(given, x.to(dtype))
    turned = torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    torch.testing.assert_close(model.n0(turned), plain(turned), rtol=1e-2, atol=1e-5)


class Centred(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Gated(LlamaRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x)


class Shifted(LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Centred, Gated, Shifted, nn.LayerNorm, nn.RMSNorm])
def test_what_only_looks_alike_stays(kind):
    kept = filled(kind(32))
    model = Parent(kept, nn.Identity())
    assert norms.replace(model) == 0
    assert model.n0 is kept


def test_one_that_carries_a_hook_or_is_of_another_type_stays_and_one_that_two_share_is_replaced_in_both():
    hooked, half, shared = filled(LlamaRMSNorm(32)), filled(LlamaRMSNorm(32), torch.float16), filled(LlamaRMSNorm(32))
    hooked.register_forward_hook(lambda *_: None)
    model = Parent(hooked, half, shared, Parent(shared))
    assert norms.replace(model) == 1
    assert (model.n0, model.n1) == (hooked, half)
    assert model.n2 is model.n3.n0
    assert model.n2.weight is shared.weight


def test_a_model_with_it_can_be_copied():
    """As PEFT's configuration of an adapter is tried on one."""
    model = Parent(filled(LlamaRMSNorm(32)))
    norms.replace(model)
    x = torch.randn(3, 32)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model).n0(x), model.n0(x))


@pytest.mark.parametrize("other", [(16, torch.float32), (32, torch.bfloat16)], ids=str)
def test_numbers_of_another_size_or_type_are_refused(other):
    model = Parent(filled(LlamaRMSNorm(32)))
    norms.replace(model)
    with pytest.raises(TypeError, match=r"expected \(…, 32\) of torch\.float32"):
        model.n0(torch.zeros(3, other[0], dtype=other[1]))


def test_a_weight_that_moves_is_found():
    plain = filled(LlamaRMSNorm(32))
    model = Parent(plain)
    norms.replace(model)
    model.n0.weight.data = 2 * model.n0.weight.data
    x = torch.randn(3, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.n0(x), plain(x))


def test_what_cannot_be_compiled_stays_and_that_is_said(monkeypatch):
    def library(*_, **__):
        raise compiling.Unavailable("no compiler")

    monkeypatch.setattr(norms, "library", library)
    norms._function.cache_clear()
    model = Parent(filled(LlamaRMSNorm(32)))
    with capture_logs() as logs:
        assert norms.replace(model) == 0
    assert type(model.n0) is LlamaRMSNorm
    assert [(line["log_level"], line["reason"]) for line in logs] == [("warning", "no compiler")]
