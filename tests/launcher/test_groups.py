from __future__ import annotations

from typing import Any

import pytest

from loopmux.codec import build, pack
from loopmux.messages import ModelSpec, Register, ServedModel
from loopmux.wire import ROUTE_LIMIT
from loopmux_launcher.config import Model
from loopmux_launcher.groups import MODELS_PER_WORKER, group
from loopmux_launcher.schema import ModelEntry

ENDPOINT = "ipc:///x.work"


def model(
    name: str, *, base: str | None = "/base", adapter: str | None = None, processes: int = 1, **entry: Any
) -> Model:
    environment = None if entry.get("engine") == "echo" else entry.pop("environment", "default")
    return Model(name, build(ModelEntry, entry, strict=True), environment, base, adapter, processes)


def test_models_on_one_base_share_processes_and_each_brings_its_adapter() -> None:
    (found,) = group(
        [
            model("default", processes=2, system_prompt="Hi."),
            model("tools", adapter="/tools"),
            model("plain", model_type="base"),
        ],
        ENDPOINT,
        4,
    )
    assert found.worker_names() == ("default-1", "default-2")
    assert found.spec.models == (
        ModelSpec("default", None, "instruct", "Hi."),
        ModelSpec("tools", "/tools"),
        ModelSpec("plain", None, "base"),
    )
    assert (found.spec.base_model, found.spec.endpoint) == ("/base", ENDPOINT)


@pytest.mark.parametrize(
    "other",
    [
        {"base": "/other"},
        {"environment": "second"},
        {"use_4bit": True},
        {"use_8bit": True},
        {"dtype": "float32"},
        {"device": "cuda:1"},
        {"slots": 2},
        {"context": 128},
        {"kv_cache_gib": 2.0},
        {"torch_threads": 2},
        {"engine": "plain"},
        {"trust_remote_code": True},
        {"allow_pickle_weights": True},
    ],
)
def test_what_a_process_can_have_only_once_keeps_models_apart(other: dict[str, Any]) -> None:
    assert len(group([model("a"), model("b", **other)], ENDPOINT, 4)) == 2
    assert len(group([model("a", **other), model("b", **other)], ENDPOINT, 4)) == 1


def test_auto_is_the_same_as_nothing() -> None:
    (found,) = group([model("a"), model("b", slots="auto", kv_cache_gib="auto", torch_threads="auto")], ENDPOINT, 1)
    assert (found.spec.slots, found.spec.kv_cache_gib, found.spec.torch_threads) == (None, None, 1)


def test_the_cores_are_shared_between_the_processes_that_compute() -> None:
    groups = group([model("a", processes=2), model("b", base="/b"), model("e", engine="echo")], ENDPOINT, 8)
    assert [g.spec.torch_threads for g in groups] == [2, 2, None]
    assert group([model("a", processes=5)], ENDPOINT, 2)[0].spec.torch_threads == 1
    assert group([model("a", torch_threads=7)], ENDPOINT, 2)[0].spec.torch_threads == 7


def test_echo_settings_keep_models_apart_and_arrive() -> None:
    fast, slow = group([model("a", engine="echo"), model("b", engine="echo", echo={"rate": 5})], ENDPOINT, 2)
    assert (fast.spec.echo, slow.spec.echo, slow.environment) == ({}, {"rate": 5.0}, None)


def test_the_longest_start_timeout_counts() -> None:
    (found,) = group([model("a", start_timeout=5.0), model("b")], ENDPOINT, 2)
    assert found.start_timeout == 1800


def test_names_are_fit_for_files_and_unlike_each_other() -> None:
    groups = group([model("a/b", base="/1"), model("a b", base="/2"), model("é", base="/3")], ENDPOINT, 2)
    assert [g.name for g in groups] == ["a-b", "a-b.2", "model"]


def test_a_worker_can_announce_all_its_models() -> None:
    models = [model(f"a-model-of-a-team-{n:03}", adapter=f"/adapters/{n}") for n in range(60)]
    groups = group(models, ENDPOINT, 2)
    assert [len(g.model_ids) for g in groups] == [MODELS_PER_WORKER, MODELS_PER_WORKER, 60 - 2 * MODELS_PER_WORKER]
    served = tuple(ServedModel(m, "f" * 64, m) for m in groups[0].model_ids)
    register = Register("worker", "w" * 40, bytes(16), (1,), "h" * 64, served, tuple(groups[0].model_ids))
    assert len(pack(register)) < ROUTE_LIMIT
