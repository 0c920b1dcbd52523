from __future__ import annotations

from typing import Any

import pytest

from loopmux.codec import build, pack
from loopmux.messages import ModelSpec, Register, ServedModel
from loopmux.wire import ROUTE_LIMIT, VERSIONS
from loopmux_launcher.config import Model
from loopmux_launcher.groups import IDLE_TIMEOUT, MODELS_PER_WORKER, group, succeed
from loopmux_launcher.schema import ModelEntry

ENDPOINT = "ipc:///x.work"


def model(
    name: str,
    *,
    base: str | None = "/base",
    adapter: str | None = None,
    processes: int | None = None,
    most: int = 1,
    **entry: Any,
) -> Model:
    environment = None if entry.get("engine") == "echo" else entry.pop("environment", "default")
    return Model(name, build(ModelEntry, entry, strict=True), environment, base, adapter, processes, most)


def test_models_on_one_base_share_processes_and_each_brings_its_adapter() -> None:
    (found,) = group(
        [
            model("default", processes=2, system_prompt="Hi."),
            model("tools", adapter="/tools", tool_format="envelope"),
            model("plain", model_type="base"),
        ],
        ENDPOINT,
        4,
    )
    assert found.worker_names() == ("default-1", "default-2")
    assert found.spec.models == (
        ModelSpec("default", None, "instruct", "Hi."),
        ModelSpec("tools", "/tools", tool_format="envelope"),
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
        {"kernels": "torch"},
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
    assert found.spec.kernels == "auto"
    (forced,) = group([model("a", kernels="native")], ENDPOINT, 1)
    assert forced.spec.kernels == "native"


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
    register = Register("worker", "w" * 40, bytes(16), VERSIONS, "h" * 64, served, tuple(groups[0].model_ids))
    assert len(pack(register)) < ROUTE_LIMIT


# --- how many ---------------------------------------------------------------------------------------------------------


def test_who_says_how_many_decides_for_those_that_do_not() -> None:
    (found,) = group([model("a", processes=0, most=2), model("b", adapter="/b")], ENDPOINT, 2)
    assert (found.fewest, found.limit, found.scales) == (0, 2, True)
    assert found.worker_names() == ("a-1", "a-2")
    (found,) = group([model("a", processes=0, most=2), model("b", adapter="/b", processes=1)], ENDPOINT, 2)
    assert (found.fewest, found.limit) == (1, 2)
    (found,) = group([model("a"), model("b", adapter="/b")], ENDPOINT, 2)
    assert (found.fewest, found.limit, found.scales) == (1, 1, False)


def test_the_longest_idle_timeout_and_the_most_memory_of_a_group_count() -> None:
    (found,) = group([model("a", idle_timeout=5.0, memory_gib=1.0), model("b", memory_gib=2.0)], ENDPOINT, 2)
    assert (found.idle_timeout, found.memory) == (5.0, 2.0)
    (found,) = group([model("a")], ENDPOINT, 2)
    assert (found.idle_timeout, found.memory) == (IDLE_TIMEOUT, 0.0)


# --- from one configuration to the next -------------------------------------------------------------------------------


def succession(before: list[Model], after: list[Model], cores: int = 8) -> dict[str, tuple[str | None, bool]]:
    """Name of each group to that of its predecessor, and whether its processes may go on."""
    pairs = succeed(group(before, ENDPOINT, cores), group(after, ENDPOINT, cores))
    return {new.name: (old and old.name, old is not None and new.runs_like(old)) for new, old in pairs}


def test_a_group_that_is_told_the_same_goes_on_whatever_else_is_added() -> None:
    """Not even the cores that it would get now that there is another one make it another."""
    assert succession([model("a")], [model("b", base="/b"), model("a")]) == {"a": ("a", True), "b": (None, False)}
    assert succession([model("a")], [model("a", processes=3, most=3, idle_timeout=1.0)]) == {"a": ("a", True)}


def test_a_group_that_is_told_something_else_goes_on_from_the_one_of_its_name() -> None:
    assert succession([model("a")], [model("a", slots=2)]) == {"a": ("a", False)}
    assert succession([model("a")], [model("a"), model("b", adapter="/b")]) == {"a": ("a", False)}
    assert succession([model("a")], [model("a", torch_threads=1)]) == {"a": ("a", False)}


def test_a_group_that_goes_on_keeps_its_name_and_no_other_gets_it() -> None:
    before, after = [model("a")], [model("a", base="/other"), model("b")]
    # what is now called b has another model id, so a process of a cannot go on as one
    assert succession(before, after) == {"a": ("a", False), "b": (None, False)}
    echo = [model("x", engine="echo", slots=1), model("y", engine="echo", slots=2)]
    renamed = succeed(group(echo, ENDPOINT, 1), group(reversed(echo), ENDPOINT, 1))
    assert [(new.name, old and old.name) for new, old in renamed] == [("y", "y"), ("x", "x")]


def test_in_which_order_a_file_has_its_models_is_no_matter() -> None:
    a, b, c = model("a"), model("b", adapter="/b"), model("c", adapter="/c")
    assert succession([a, b], [b, a]) == {"a": ("a", True)}
    assert succession([a, b], [c, a, b]) == {"a": ("a", False)}
    assert succession([a, b], [b]) == {"a": ("a", False)}
    many = [model(f"m{n}", adapter=f"/{n}") for n in range(2 * MODELS_PER_WORKER)]
    second = f"m{MODELS_PER_WORKER}"
    assert succession(many, many[1:]) == {"m0": ("m0", False), second: (second, False)}


@pytest.mark.parametrize(
    ("after", "goes_on"),
    [
        ([model("a", slots=2), model("b", adapter="/b", slots=2)], True),
        ([model("a"), model("b", adapter="/b"), model("c", adapter="/c")], True),
        ([model("a"), model("b", adapter="/else")], False),
        ([model("a")], False),
        ([model("a", dtype="float32"), model("b", adapter="/b", dtype="float32")], False),
        ([model("a", base="/other"), model("b", base="/other", adapter="/b")], False),
    ],
)
def test_what_runs_goes_on_only_where_all_weights_are_there(after: list[Model], goes_on: bool) -> None:
    [before] = group([model("a"), model("b", adapter="/b")], ENDPOINT, 2)
    assert group(after, ENDPOINT, 2)[0].takes_over_from(before) == goes_on
