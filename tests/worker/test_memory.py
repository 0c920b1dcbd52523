"""Memory that runs out: recognised whatever libraries call it, told in one clear error, not blamed on an adapter."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopmux.errors import ConfigError
from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_worker.causes import ran_out
from loopmux_worker.engine import adapterfiles, memory, open_engine
from loopmux_worker.engine.base import engine_error
from loopmux_worker.engine.echo import EchoEngine
from loopmux_worker.server import Worker
from tightmemory import write_heavy

TESTS = Path(__file__).parents[1]
DEMO = TESTS.parent / "configs" / "demo"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "?"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("could not create a primitive"),  # oneDNN, whose code is made at run time and takes memory, too
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_ran_out_is_recognised_behind_other_errors(error):
    assert ran_out(error) is error
    outer = ConfigError("cannot load it")
    outer.__cause__ = error
    assert ran_out(outer) is error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        OSError(errno.ENOSPC, "full"),
        ConfigError("bad"),
        RuntimeError("could not create a primitive descriptor for the matmul primitive. Run workload with"),
        None,
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert ran_out(error) is None


def test_other_errors_pass_as_they_are():
    with pytest.raises(ValueError, match="no"), memory.explained("it was made", "it"):
        raise ValueError("no")


def test_of_blocks_inside_each_other_the_innermost_tells():
    with pytest.raises(memory.OutOfMemory) as caught:
        with memory.explained("all was made", "all"), memory.explained("a part was made", "a part", "take less"):
            raise MemoryError
    assert caught.value.message.startswith("out of memory while a part was made (MemoryError): found ")
    assert caught.value.message.endswith("expected room for a part; stop other programs, raise the limit, or take less")


def test_a_request_that_runs_out_of_memory_may_be_tried_again():
    error = engine_error("generate()", RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"))
    assert error.retryable
    assert "generate() ran out of memory (RuntimeError: DefaultCPUAllocator: can't allocate memory): send fewer" in str(
        error
    )
    assert not engine_error("generate()", RuntimeError("a bug")).retryable


def test_an_adapter_is_not_left_out_because_memory_ran_out(tiny_model, monkeypatch):
    def load(data):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(adapterfiles, "load", load)
    models = (ModelSpec("base"), ModelSpec("red", str(tiny_model.adapters["red"])))
    with pytest.raises(ConfigError) as caught:
        open_engine(WorkerSpec("w", "", models, str(tiny_model.base), torch_threads=1), lambda *_: None)
    assert "out of memory while the adapter red was loaded (RuntimeError: [enforce fail" in caught.value.message
    assert "serve fewer adapters beside each other" in caught.value.message


def test_a_worker_that_never_ran_can_be_closed(tmp_path):
    spec = WorkerSpec("w", f"ipc://{tmp_path}/b", (ModelSpec("m"),), engine="echo")
    worker = Worker(spec, EchoEngine(spec))
    assert worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts from what /proc tells")
@pytest.mark.parametrize(
    ("stage", "doing", "expected", "instead"),
    [
        ("imported", "/heavy was loaded", "73 MiB of weights beside torch",
         ", raise the limit, or choose a smaller dtype or a smaller model"),
        ("bare", "torch and transformers were imported", "these libraries", ", or raise the limit"),
        ("roomy", "a first token was computed", "1536 MiB of attention state (1024 rows of 1024 tokens)",
         ", raise the limit, or set a smaller kv_cache_gib, slots or context"),
    ],
)  # fmt: skip
def test_a_real_worker_that_runs_out_of_memory_says_so(stage, doing, expected, instead, tmp_path):
    base, models = DEMO / "base", [{"id": "default"}, {"id": "shout", "adapter_dir": str(DEMO / "adapters" / "shout")}]
    if stage == "imported":
        base, models = tmp_path / "heavy", [{"id": "default"}]
        write_heavy(base)
    spec = {"name": "w", "endpoint": f"ipc://{tmp_path}/b", "base_model": str(base), "models": models}
    spec |= {"slots": 256, "kv_cache_gib": 2.0, "torch_threads": 1}
    done = subprocess.run(
        [sys.executable, str(TESTS / "tightmemory.py"), stage, "--spec", "-"],
        input=json.dumps(spec), capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 78, done.stderr
    last = done.stderr.splitlines()[-1]  # before it, the engine's own log tells of the step that failed
    assert re.match(rf"loopmux-worker: error: out of memory while \S*{doing} \(", last), last
    if stage != "roomy":
        assert done.stderr.splitlines() == [last]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["phase"] == "failed"
    assert told["detail"] in last
    assert "MiB for this process (ulimit -v) and " in told["detail"]
    assert f"expected room for {expected}" in told["detail"]
    assert told["detail"].partition("; stop other programs")[2].endswith(instead)
