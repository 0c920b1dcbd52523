"""Attention over rows, layer by layer."""

import resource
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from loopmux_worker.engine.base import Key
from loopmux_worker.engine.slots import native
from loopmux_worker.engine.slots.attention import KVMemory, Unsupported
from loopmux_worker.engine.slots.schedule import Segment

SIZE = 16
FOUND = native.find(torch.float32, SIZE, 2)
KERNELS = ["torch", pytest.param("native", marks=pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND)))]


class Layer(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.layer_idx = index


def segment(row, start, count):
    return Segment(Key(bytes([abs(row)]) * 16, 1), row, start, count, True, None)


def plain(query, key, value, start, window):
    """One sequence's queries from ``start`` on, without rows and without a mask that is shared."""
    places = torch.arange(start, start + query.shape[1])[:, None]
    seen = torch.arange(key.shape[1])
    visible = seen <= places
    if window is not None:
        visible &= seen > places - window
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("window", [None, 5])
def test_layers_of_one_window_that_differ_otherwise_get_masks_of_their_own(window, kernels):
    """Heads for each key head and the type of the numbers are a layer's own, in some models (NAS, mixed precision)."""
    torch.manual_seed(0)
    kinds = [(4, 2, torch.float32), (4, 1, torch.float32), (4, 4, torch.float32), (4, 2, torch.bfloat16)]
    memory = KVMemory(3, 32, torch.device("cpu"), kernels)
    lengths = {0: 12, 1: 10, 2: 9}
    made = {}
    for index, (heads, kv_heads, dtype) in enumerate(kinds):
        for row, length in lengths.items():
            made[index, row] = [torch.randn(n, length, SIZE).to(dtype) for n in (heads, kv_heads, kv_heads)]
    steps = [
        [segment(0, 0, 11), segment(1, 0, 9), segment(2, 0, 4)],
        [segment(0, 11, 1), segment(1, 9, 1), segment(2, 4, 5)],
    ]
    for step in steps:
        memory.prepare(step)
        for index in range(len(kinds)):
            parts = [[tensor[:, s.start : s.start + s.count] for tensor in made[index, s.row]] for s in step]
            packed = [torch.cat(each, 1)[None] for each in zip(*parts, strict=True)]
            found, _ = memory.attend(Layer(index), *packed, None, sliding_window=window)
            expected = []
            for s in step:
                query, key, value = made[index, s.row]
                stop = s.start + s.count
                expected.append(plain(query[:, s.start : stop], key[:, :stop], value[:, :stop], s.start, window))
            tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found[0], torch.cat(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_comes_out_can_be_viewed_whatever_the_step_is_made_of(kernels):
    """Some models (AFMoE) call ``view`` on it."""
    memory = KVMemory(2, 32, torch.device("cpu"), kernels)
    one, both = [segment(0, 0, 9)], [segment(0, 9, 1), segment(1, 0, 10)]
    for step in (one, both, [segment(0, 10, 3)], [segment(0, 13, 1), segment(1, 10, 1)]):
        memory.prepare(step)
        given = [torch.randn(1, heads, sum(s.count for s in step), SIZE) for heads in (4, 2, 2)]
        found, _ = memory.attend(Layer(0), *given, None)
        assert found.shape == (1, given[0].shape[2], 4, SIZE)
        assert found.is_contiguous()


def test_a_mask_that_a_model_makes_is_not_passed_over():
    memory = KVMemory(1, 8, torch.device("cpu"))
    memory.prepare([segment(0, 0, 3)])
    given = torch.randn(1, 1, 3, SIZE)
    with pytest.raises(Unsupported, match=r"a mask of its own, \(1, 1, 3, 3\)"):
        memory.attend(Layer(0), given, given, given, torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize("outside", [(1, 0, 1), (-1, 0, 1), (0, 7, 2), (0, -1, 1)], ids=str)
def test_a_segment_outside_the_rows_is_refused_before_anything_is_written(outside):
    memory = KVMemory(1, 8, torch.device("cpu"))
    with pytest.raises(IndexError, match="outside 1 rows of 8 tokens"):
        memory.prepare([segment(*outside)])


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_call_with_other_tokens_than_the_step_has_is_refused(kernels):
    memory = KVMemory(1, 8, torch.device("cpu"), kernels)
    memory.prepare([segment(0, 0, 3)])
    given = [torch.randn(1, heads, 2, SIZE) for heads in (4, 2, 2)]
    with pytest.raises(Unsupported, match="called with"):
        memory.attend(Layer(0), *given, None)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "other", [(1, SIZE, torch.float32), (2, 2 * SIZE, torch.float32), (2, SIZE, torch.bfloat16)], ids=str
)
def test_a_layer_that_is_called_with_other_heads_than_it_holds_is_refused(other, kernels):
    memory = KVMemory(1, 8, torch.device("cpu"), kernels)
    memory.prepare([segment(0, 0, 1)])
    memory.attend(Layer(0), *[torch.randn(1, heads, 1, SIZE) for heads in (4, 2, 2)], None)
    kv_heads, size, dtype = other
    with pytest.raises(Unsupported, match="layer 0 is called"):
        memory.attend(
            Layer(0), *[torch.randn(1, heads, 1, size, dtype=dtype) for heads in (4, kv_heads, kv_heads)], None
        )


@pytest.mark.skipif(sys.platform != "linux", reason="what a process takes is read from /proc")
def test_rows_take_memory_as_they_are_written():
    memory = KVMemory(64, 2**16, torch.device("cpu"))
    before = resident()
    memory.prepare([segment(5, 0, 3)])
    given = torch.randn(1, 2, 3, SIZE)
    memory.attend(Layer(0), given, given, given, None)
    assert memory.size == 2 * given.element_size() * 64 * 2 * 2**16 * SIZE
    assert resident() - before < 2**26
    keys, values = memory._layers[0]
    assert keys[5, :, :3].equal(given[0])
    assert not values[5, :, 3:].any()
    assert not values[63].any()


def resident():
    """Bytes of memory that this process takes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
