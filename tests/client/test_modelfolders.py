from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fakemodels import write_adapter, write_model, write_safetensors
from loopmux.modelfolders import Adapter, Base, adapter, base_model, check_model
from loopmux.weightfiles import Unusable


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a model ``base`` and an adapter ``lora``."""
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "lora")
    return tmp_path


def refused(check: Callable[[], object]) -> Unusable:
    with pytest.raises(Unusable) as caught:
        check()
    return caught.value


def checked(text: str, root: Path, *, pickle: bool = False) -> Path:
    """The folder of a base model, looked into."""
    folder = base_model(text, root, {}).folder
    assert folder is not None
    check_model(folder, pickle=pickle)
    return folder


def test_a_directory_is_taken_relative_to_the_file(models: Path) -> None:
    meant = Base(str(models / "base"), models / "base")
    assert base_model("./base", models) == meant
    assert base_model(str(models / "base"), Path("/")) == meant


def test_a_hub_id_is_taken_with_a_note_unless_it_is_in_the_cache(models: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = base_model("org/name-7B.v1", models, {"HF_HUB_CACHE": str(cache)})
    assert found.folder is None
    assert found.name == "org/name-7B.v1"
    assert found.note == (
        f"no directory {models}/org/name-7B.v1, and no org/name-7B.v1 in the hub's cache {cache}: it is taken for a "
        "hub model, and downloaded when its worker starts"
    )
    (cache / "models--org--name-7B.v1").mkdir(parents=True)
    assert base_model("org/name-7B.v1", models, {"HF_HUB_CACHE": str(cache)}) == Base("org/name-7B.v1")


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HOME": "~no-such-user/x"}, "~no-such-user/x/hub"),
        ({}, f"{Path.home()}/.cache/huggingface/hub"),
    ],
)
def test_where_the_hubs_cache_is(models: Path, variables: dict[str, str], where: str) -> None:
    found = base_model("org/name", models, variables)
    assert f"in the hub's cache {where}:" in found.note


def test_a_hub_id_that_cannot_be_downloaded_is_refused(models: Path) -> None:
    error = refused(lambda: base_model("org/name", models, {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/none"}))
    assert "no org/name in the hub's cache /none" in error.found
    assert "HF_HUB_OFFLINE" in error.expected


@pytest.mark.parametrize("text", ["demoo/base", "dmeo/base", "Demo/base", "demoo/bsae"])
def test_a_slip_in_the_first_folder_is_no_hub_id_unless_it_is_one(models: Path, tmp_path: Path, text: str) -> None:
    write_model(models / "demo" / "base")
    variables = {"HF_HUB_CACHE": str(tmp_path / "cache")}
    error = refused(lambda: base_model(text, models, variables))
    assert f"no directory {models}/{text}, and no {text} in the hub's cache" in error.found
    assert error.hint.startswith(f"did you mean {models}/demo/base?")
    (tmp_path / "cache" / f"models--{text.replace('/', '--')}").mkdir(parents=True)
    assert base_model(text, models, variables) == Base(text)


def test_a_slip_in_a_longer_path_gets_a_hint(models: Path) -> None:
    write_model(models / "demo" / "base")
    assert refused(lambda: base_model("./dmo/base", models)).hint == f"did you mean {models}/demo/base?"


@pytest.mark.parametrize("text", ["gpt2", "a/b/c", "/abs/gone", "./org/name", "org/", "~/gone"])
def test_what_is_neither_directory_nor_hub_id_is_refused(models: Path, text: str) -> None:
    error = refused(lambda: base_model(text, models))
    assert "no directory" in error.found
    assert "hub id" in error.expected


def test_a_slip_in_an_existing_folder_is_no_hub_id(models: Path) -> None:
    write_model(models / "demo" / "base")
    error = refused(lambda: base_model("demo/bsae", models))
    assert error.hint.startswith(f"did you mean {models}/demo/base?")
    assert "holds base" in refused(lambda: base_model("demo/something", models)).hint


def test_a_model_without_config_is_refused(models: Path) -> None:
    (models / "base" / "config.json").unlink()
    assert "no config.json" in refused(lambda: checked("base", models)).found
    assert "adapter_dir" in refused(lambda: checked("lora", models)).hint


def test_a_file_is_no_model(models: Path) -> None:
    assert "is a file" in refused(lambda: checked("base/config.json", models)).found


def test_a_model_without_weights_is_refused(models: Path) -> None:
    (models / "base" / "model.safetensors").unlink()
    assert "no model.safetensors in" in refused(lambda: checked("base", models)).found


def test_pickle_weights_need_permission(models: Path) -> None:
    (models / "base" / "model.safetensors").rename(models / "base" / "pytorch_model.bin")
    assert "allow_pickle_weights" in refused(lambda: checked("base", models)).hint
    assert checked("base", models, pickle=True) == models / "base"


@pytest.mark.parametrize("cut", [3, 40, -1])
def test_half_written_weights_are_refused(models: Path, cut: int) -> None:
    for file, check in (
        (models / "base" / "model.safetensors", lambda: checked("base", models)),
        (models / "lora" / "adapter_model.safetensors", lambda: adapter("lora", models, pickle=False)),
    ):
        file.write_bytes(file.read_bytes()[:cut])
        assert str(file) in refused(check).found


def test_a_missing_shard_is_found(models: Path) -> None:
    base = models / "base"
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors" in refused(lambda: checked("base", models)).expected
    write_safetensors(base / "model-2.safetensors")
    assert checked("base", models) == base


@pytest.mark.parametrize("gone", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_adapter_is_refused(models: Path, gone: str) -> None:
    (models / "lora" / gone).unlink()
    assert gone in refused(lambda: adapter("lora", models, pickle=False)).found


def test_a_cut_adapter_config_is_refused(models: Path) -> None:
    (models / "lora" / "adapter_config.json").write_text('{"peft')
    assert "cannot be read" in refused(lambda: adapter("lora", models, pickle=False)).found


def test_a_missing_adapter_is_refused_with_what_is_there(models: Path) -> None:
    error = refused(lambda: adapter("lroa", models, pickle=False))
    assert str(models / "lroa") in error.found
    assert "lora" in error.hint


def test_an_empty_checkpoint_stands_for_its_parent(models: Path) -> None:
    (models / "lora" / "checkpoint-40").mkdir()
    assert adapter("lora/checkpoint-40", models, pickle=False) == Adapter(models / "lora")
    write_adapter(models / "lora" / "checkpoint-80")
    assert adapter("lora/checkpoint-80", models, pickle=False) == Adapter(models / "lora" / "checkpoint-80")


def test_a_merged_model_is_told_from_an_adapter(models: Path) -> None:
    assert adapter("base", models, pickle=False) == Adapter(models / "base", merged=True)


@pytest.mark.parametrize("text", ["~nobody-of-this-name/base", "a\0b"])
def test_a_path_that_means_nothing_is_refused(models: Path, text: str) -> None:
    for check in (lambda: base_model(text, models), lambda: adapter(text, models, pickle=False)):
        assert refused(check).found == repr(text)


def test_a_checkpoint_with_a_whole_model_stands_for_itself(models: Path) -> None:
    folder = write_model(models / "lora" / "checkpoint-9")
    assert adapter("lora/checkpoint-9", models, pickle=False) == Adapter(folder, merged=True)


def test_weights_that_transformers_would_not_look_at_are_none(models: Path) -> None:
    (models / "base" / "model.safetensors").rename(models / "base" / "consolidated.safetensors")
    error = refused(lambda: checked("base", models))
    assert "it holds config.json, consolidated.safetensors" in error.found


def test_a_file_longer_than_its_header_says_is_refused(models: Path) -> None:
    with (models / "base" / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    assert "as its header says" in refused(lambda: checked("base", models)).expected
