"""The attention kernel against a reference in double precision, and what becomes of it where it cannot be had."""

import ctypes
import mmap
import os
import re
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs

from enginekit import job, opened, run
from loopmux.errors import ConfigError
from loopmux_worker import caches
from loopmux_worker.engine.base import Key
from loopmux_worker.engine.slots import compiling, native
from loopmux_worker.engine.slots.attention import KVMemory
from loopmux_worker.engine.slots.native import Kernel, Step
from loopmux_worker.engine.slots.schedule import Segment
from tinymodel import write_base

CONTEXT = 200


class Layer(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.layer_idx = index


FIRST = Segment(Key(bytes(16), 1), 0, 0, 1, True, None)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 128, 130, 200)
KIND = torch.bfloat16, 64, 3
FOUND = native.find(*KIND)
WHY_NOT = FOUND if isinstance(FOUND, str) else ""
there = pytest.mark.skipif(bool(WHY_NOT), reason=f"no kernel here: {WHY_NOT}")


def made(dtype, size, folded, kv_heads=2):
    """A kernel, rows of which nothing but what each length covers is a number, and a step of one token in each."""
    generator = torch.Generator().manual_seed(size + folded)
    rows = len(LENGTHS)
    keys, values = (torch.randn(rows, kv_heads, CONTEXT, size, generator=generator).to(dtype) for _ in range(2))
    query, key, value = (
        torch.randn(1, rows, heads, size, generator=generator).to(dtype).transpose(1, 2)  # as models have them
        for heads in (folded * kv_heads, kv_heads, kv_heads)
    )
    positions = torch.tensor(LENGTHS) - 1
    for row, position in enumerate(positions):
        keys[row, :, position:] = values[row, :, position:] = torch.nan
    kernel = native.find(dtype, size, folded)
    assert isinstance(kernel, Kernel), kernel
    step = Step(torch.arange(rows), positions, torch.arange(rows), 2)
    return kernel, step, [query, key, value, keys, values]


def expected(step, query, keys, values, window):
    """In double precision, from what the rows hold by now."""
    folded = query.shape[1] // keys.shape[1]
    rows = []
    for place, (row, position) in enumerate(zip(step.rows.tolist(), step.positions.tolist(), strict=True)):
        first = 0 if window is None else max(0, position + 1 - window)
        seen, summed = (
            each[row, :, first : position + 1].double().repeat_interleave(folded, 0) for each in (keys, values)
        )
        scores = torch.einsum("hd,hkd->hk", query[0, :, place].double(), seen) * 0.2
        rows.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), summed))
    return torch.stack(rows)


@there
@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
@pytest.mark.parametrize(
    "kind", [KIND, (torch.bfloat16, 128, 8), (torch.float32, 16, 1), (torch.float32, 80, 7), (torch.float32, 256, 12)]
)
def test_it_computes_what_each_token_sees_and_nothing_else(kind, window):
    kernel, step, given = made(*kind)
    query, key, value, keys, values = given
    found = kernel(step, *given, window, 0.2)
    for place, position in enumerate(step.positions):
        assert torch.equal(keys[place, :, position], key[0, :, place])
        assert torch.equal(values[place, :, position], value[0, :, place])
        assert keys[place, :, position + 1 :].isnan().all()
    right = expected(step, query, keys, values, window)
    tolerance = 1e-5 if kind[0] == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)


@there
def test_a_token_gets_the_same_to_the_last_bit_whatever_is_beside_it_and_however_many_threads():
    kernel, step, given = made(*KIND)
    together = kernel(step, *given, None, None)
    query, key, value, keys, values = given
    for place in range(len(LENGTHS)):
        one = slice(place, place + 1)
        alone = Step(step.rows[one], step.positions[one], torch.tensor([0]), 1)
        found = kernel(alone, query[:, :, one], key[:, :, one], value[:, :, one], keys, values, None, None)
        assert torch.equal(found[0], together[place])


@there
def test_nothing_is_read_behind_the_last_row():
    """Where it ends a page begins that must not be touched: a kernel that does ends this process."""
    kernel, length, size = native.find(*KIND), 33, 64
    state = 2 * length * size  # bytes
    held = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    last = 2 * mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(held))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + last), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    keys = torch.frombuffer(held, dtype=torch.bfloat16, count=length * size, offset=last - state)
    keys = keys.view(1, 1, length, size)
    step = Step(torch.tensor([0]), torch.tensor([length - 1]), torch.tensor([0]), 1)
    given = [torch.ones(1, heads, 1, size, dtype=torch.bfloat16) for heads in (3, 1, 1)]
    assert kernel(step, *given, keys, keys, None, None).isfinite().all()


@there
def test_numbers_may_lie_anywhere_in_memory():
    kernel, step, given = made(*KIND)
    right = kernel(step, *given, None, None)
    for turned in (lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), lambda t: torch.cat([t, t], 3)[..., :64]):
        found = kernel(step, *map(turned, given[:3]), *given[3:], None, None)
        assert torch.equal(found, right)


@there
def test_what_is_not_a_number_in_a_row_shows():
    kernel, step, given = made(*KIND)
    given[3][5, 0, 7, 3] = torch.nan
    found = kernel(step, *given, None, None)
    assert found[5, :3].isnan().all()
    assert not found[5, 3:].isnan().any()
    assert not found[torch.arange(len(LENGTHS)) != 5].isnan().any()


@there
def test_scores_of_any_size_come_out_right():
    kernel, step, given = made(*KIND)
    given[0] *= 300
    found = kernel(step, *given, None, 0.2)
    right = expected(step, given[0], given[3], given[4], None)
    torch.testing.assert_close(found.double(), right, rtol=2e-2, atol=2e-2)


@there
def test_it_computes_in_the_threads_of_torch_and_makes_none():
    kernel, step, given = made(*KIND)
    counted = []

    def compute():  # in a thread of its own, which begins without others
        counted.append(len(list(Path("/proc/self/task").iterdir())))
        kernel(step._replace(threads=1), *given, None, None)
        counted.append(len(list(Path("/proc/self/task").iterdir())))
        torch.set_num_threads(2)
        torch.ones(2**22).add_(1)
        counted.append(len(list(Path("/proc/self/task").iterdir())))
        kernel(step, *given, None, None)
        counted.append(len(list(Path("/proc/self/task").iterdir())))

    threads = torch.get_num_threads()
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    torch.set_num_threads(threads)
    before, one, torchs, both = counted
    assert (one, torchs, both) == (before, before + 1, before + 1)


# --- where it cannot be had -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing was compiled, nor was it tried."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget = native.find.cache_clear, compiling.library.cache_clear
    for each in forget:
        each()
    yield tmp_path / "cache" / "loopmux" / "kernels"
    for each in forget:
        each()


def compiler(folder, text):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def give_away(path, patch):
    """Make something another user's; who may not do that becomes another one."""
    if os.getuid() == 0:
        os.chown(path, 4711, -1)
    else:
        patch.setattr("os.getuid", lambda: 4711)


def no_compiler(folder, patch):
    patch.setenv("CC", "/nowhere/cc")
    return "No such file or directory: '/nowhere/cc'"


def broken_compiler(folder, patch):
    patch.setenv("CC", compiler(folder, '[ "$1" = --version ] || { echo "x.c:1: error: boom" >&2; exit 3; }'))
    return r"ends with 3: x\.c:1: error: boom"


def slow_compiler(folder, patch):
    patch.setenv("CC", compiler(folder, "exec sleep 60"))
    patch.setattr(compiling, "_PATIENCE", 0.1)
    return "takes more than 0 s"


def compiler_of_rubbish(folder, patch):
    patch.setenv(
        "CC", compiler(folder, 'for word; do [ "$last" = -o ] && echo rubbish > "$word"; last=$word; done; true')
    )
    return r"attention-\w+\.so cannot be loaded: .*; remove it if"


def file_for_a_folder(folder, patch):
    (folder / "cache").write_text("")
    return "it cannot be compiled: .*Not a directory"


def no_home(folder, patch):
    def home():
        raise RuntimeError("no home")

    patch.delenv("XDG_CACHE_HOME")
    patch.setattr(Path, "home", home)
    return "it cannot be compiled: no home"


def unreadable_command(folder, patch):
    patch.setenv("CC", "cc 'without end")
    return "it cannot be compiled: No closing quotation"


def compiler_of_another_alphabet(folder, patch):
    patch.setenv("CC", compiler(folder, "printf 'error: \\351chec' >&2; exit 1"))
    return "ends with 1: error: .chec"


def folder_of_another(folder, patch):
    (folder / "cache" / "loopmux" / "kernels").mkdir(parents=True)
    give_away(folder / "cache" / "loopmux" / "kernels", patch)
    return r"kernels belongs to user \d+, expected \d+: set \$XDG_CACHE_HOME"


def another_system(folder, patch):
    patch.setattr("sys.platform", "darwin")
    return "found darwin on .*, expected Linux"


def another_openmp(folder, patch):
    addresses = iter((1, 2))
    patch.setattr(compiling, "_address", lambda _: next(addresses))
    return "another OpenMP"


def other_places(folder, patch):
    patch.setattr(native, "library", lambda *_, **__: SimpleNamespace(attention=lambda *_: None))
    return "it stores keys and values elsewhere"


def other_results(folder, patch):
    right = Kernel.__call__
    patch.setattr(Kernel, "__call__", lambda *given: right(*given) + 0.1)
    return "it differs from torch's attention by 0.1"


@pytest.mark.parametrize(
    "trouble",
    [no_compiler, broken_compiler, slow_compiler, compiler_of_rubbish, unreadable_command, compiler_of_another_alphabet,
     file_for_a_folder, folder_of_another, no_home, another_system, another_openmp, other_places, other_results],
)  # fmt: skip
def test_without_it_torch_computes_and_says_why(trouble, fresh, tmp_path, monkeypatch):
    reason = trouble(tmp_path, monkeypatch)
    given = [torch.randn(1, heads, 1, 16) for heads in (4, 2, 2)]
    memory = KVMemory(1, 32, torch.device("cpu"))
    memory.prepare([FIRST])
    with capture_logs() as logs:
        found, _ = memory.attend(Layer(0), *given, None)
        memory.attend(Layer(1), *given, None)
    torch.testing.assert_close(found[0, 0], given[2][0, :, 0].repeat_interleave(2, 0))
    assert re.search(reason, memory.attention)
    assert [line["log_level"] for line in logs] == ["warning"]
    assert f"torch: {logs[0]['reason']}" == memory.attention
    forced = KVMemory(1, 32, torch.device("cpu"), "native")
    forced.prepare([FIRST])
    with pytest.raises(ConfigError, match=f"kernels: found native, but .*{reason}"):
        forced.attend(Layer(0), *given, None)


@there
def test_values_of_fewer_heads_than_the_keys_never_reach_it():
    memory = KVMemory(1, 32, torch.device("cpu"))
    memory.prepare([FIRST])
    memory.attend(Layer(0), *(torch.randn(1, heads, 1, 16) for heads in (4, 2, 1)), None)
    assert memory.attention == "torch: keys, values and queries are not alike"


@there
def test_numbers_that_it_cannot_compute_are_left_to_torch():
    for kind, reason in (
        ((torch.float16, 16, 1), "found torch.float16"),
        ((torch.float32, 24, 1), "heads of 24 numbers"),
    ):
        assert reason in native.find(*kind)


@there
def test_workers_that_make_it_at_once_all_have_it(fresh):
    source, shape = Path(compiling.__file__).with_name("norm.c"), ["-DBF16=1"]
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: compiling._compiled(source, shape), range(4)))
    assert list(fresh.iterdir()) == list(made)
    time = made.pop().stat().st_mtime_ns
    assert compiling._compiled(source, shape).stat().st_mtime_ns == time


@there
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_no_code_of_others_is_loaded(fresh, monkeypatch):
    source = Path(compiling.__file__).with_name("norm.c")
    made = compiling._compiled(source, ["-DBF16=1"])
    right = made.read_bytes()
    made.write_bytes(b"theirs")
    give_away(made, monkeypatch)
    assert compiling._compiled(source, ["-DBF16=1"]) == made
    assert made.read_bytes() == right


def test_nobody_else_can_put_code_where_it_is_loaded_from(fresh):
    fresh.mkdir(parents=True)
    for each in (fresh, fresh.parent):
        each.chmod(0o777)
    caches.folder("kernels")
    assert [stat.S_IMODE(each.stat().st_mode) for each in (fresh, fresh.parent)] == [0o755, 0o755]
    before = os.umask(0)
    try:
        assert stat.S_IMODE(caches.folder("torch").stat().st_mode) == 0o700
    finally:
        os.umask(before)


@there
def test_another_compiler_processor_or_shape_makes_another(fresh, tmp_path, monkeypatch):
    source = Path(compiling.__file__).with_name("norm.c")
    made = [compiling._compiled(source, ["-DBF16=1"]), compiling._compiled(source, ["-DBF16=0"])]
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "_processor", lambda: "flags: fewer")
        made.append(compiling._compiled(source, ["-DBF16=1"]))
    monkeypatch.setenv("CC", compiler(tmp_path, 'if [ "$1" = --version ]; then echo 0; else exec cc "$@"; fi'))
    made.append(compiling._compiled(source, ["-DBF16=1"]))
    assert len(set(made)) == 4


@there
def test_an_engine_says_what_computes_attention_and_answers_the_same_with_it_and_without(tmp_path):
    write_base(tmp_path, hidden=64)
    found = {}
    for kernels in ("torch", "native"):
        engine = opened(tmp_path, kernels=kernels)
        jobs = [job(prompt, max_new_tokens=40) for prompt in ([5, 9, 200, 3], [7] * 30, list(range(70)))]
        found[kernels] = run(engine, jobs)[0]
        assert engine.describe().report["attention"] == {"torch": "torch: configured"}.get(kernels, kernels)
        engine.close()
    assert found["torch"] == found["native"]


@there
def test_an_engine_that_has_to_have_it_does_not_start_without(fresh, tmp_path, monkeypatch):
    write_base(tmp_path, hidden=64)
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(ConfigError, match=r"kernels: found native, but .*/nowhere/cc"):
        opened(tmp_path, engine="auto", kernels="native")
    engine = opened(tmp_path, engine="auto")
    described = engine.describe()
    engine.close()
    assert described.engine == "slots"
    assert re.fullmatch("torch: it cannot be compiled: .*/nowhere/cc'", described.report["attention"])
