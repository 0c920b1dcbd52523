"""Memory that runs out: recognised whatever libraries call it, told in one clear error, not blamed on an adapter."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopmux.errors import ConfigError
from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_worker.engine import adapterfiles, memory, open_engine
from loopmux_worker.engine.echo import EchoEngine
from loopmux_worker.server import Worker

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
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_ran_out_is_recognised_behind_other_errors(error):
    assert memory.ran_out(error) is error
    outer = ConfigError("cannot load it")
    outer.__cause__ = error
    assert memory.ran_out(outer) is error


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOSPC, "full"), ConfigError("bad"), None])
def test_other_errors_are_not_taken_for_it(error):
    assert memory.ran_out(error) is None


def test_other_errors_pass_as_they_are():
    with pytest.raises(ValueError, match="no"), memory.explained(WorkerSpec("w", "", ())):
        raise ValueError("no")


def test_an_adapter_is_not_left_out_because_memory_ran_out(tiny_model, monkeypatch):
    def load_file(path):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(adapterfiles, "load_file", load_file)
    models = (ModelSpec("base"), ModelSpec("red", str(tiny_model.adapters["red"])))
    with pytest.raises(ConfigError) as caught:
        open_engine(WorkerSpec("w", "", models, str(tiny_model.base), torch_threads=1), lambda *_: None)
    assert memory.ran_out(caught.value)


def test_a_worker_that_never_ran_can_be_closed(tmp_path):
    spec = WorkerSpec("w", f"ipc://{tmp_path}/b", (ModelSpec("m"),), engine="echo")
    worker = Worker(spec, EchoEngine(spec))
    assert worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts from what /proc tells")
@pytest.mark.parametrize("stage", ["imported", "bare"])
def test_a_real_worker_that_runs_out_of_memory_says_so(stage, tmp_path):
    models = (ModelSpec("default"), ModelSpec("shout", str(DEMO / "adapters" / "shout")))
    spec = {"name": "w", "endpoint": f"ipc://{tmp_path}/b", "base_model": str(DEMO / "base"), "torch_threads": 1}
    spec["models"] = [{"id": m.id, "adapter_dir": m.adapter_dir} for m in models]
    done = subprocess.run(
        [sys.executable, str(TESTS / "tightmemory.py"), stage, "--spec", "-"],
        input=json.dumps(spec), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 78, done.stderr
    assert done.stderr.startswith(f"loopmux-worker: error: out of memory while {DEMO}/base was loaded (")
    assert len(done.stderr.splitlines()) == 1
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["phase"] == "failed"
    assert told["detail"] in done.stderr
    assert "MiB for this process (ulimit -v) and " in told["detail"]
    assert "expected room for 3 MiB of weights beside torch" in told["detail"]
    assert "; stop other workers, raise the limit, or choose a smaller" in told["detail"]
