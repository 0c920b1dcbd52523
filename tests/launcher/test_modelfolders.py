from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.conftest import write_adapter, write_model, write_safetensors
from loopmux_launcher.modelfolders import Adapter, Unusable, adapter, base_model
from loopmux_launcher.reader import load


def refused(check: Callable[[], object]) -> Unusable:
    with pytest.raises(Unusable) as caught:
        check()
    return caught.value


def test_a_directory_is_taken_relative_to_the_file(models: Path) -> None:
    assert base_model("./base", models) == str(models / "base")
    assert base_model(str(models / "base"), Path("/")) == str(models / "base")


def test_a_hub_id_is_taken_as_it_is(models: Path) -> None:
    assert base_model("org/name-7B.v1", models) == "org/name-7B.v1"


def test_an_adapter_that_names_another_base_gets_a_note(models: Path, write: Callable[[str], Path]) -> None:
    file = write("models:\n  a:\n    base_model: base\n    adapter_dir: lora\n")
    described = models / "lora" / "adapter_config.json"
    described.write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    assert load(file).notes == ()
    described.write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/other"}')
    [note] = load(file).notes
    assert note.startswith(f"{file}:4: models.a.adapter_dir: {described} names the base 'org/other'")
    assert f"put on {models / 'base'}" in note


@pytest.mark.parametrize("text", ["gpt2", "a/b/c", "/abs/gone", "./org/name", "org/", "~/gone"])
def test_what_is_neither_directory_nor_hub_id_is_refused(models: Path, text: str) -> None:
    error = refused(lambda: base_model(text, models))
    assert "no directory" in error.found
    assert "hub id" in error.expected


def test_a_slip_in_an_existing_folder_is_no_hub_id(models: Path) -> None:
    write_model(models / "demo" / "base")
    error = refused(lambda: base_model("demo/bsae", models))
    assert "holds base" in error.hint


def test_a_model_without_config_is_refused(models: Path) -> None:
    (models / "base" / "config.json").unlink()
    assert "no config.json" in refused(lambda: base_model("base", models)).found
    assert "adapter_dir" in refused(lambda: base_model("lora", models)).hint


def test_a_file_is_no_model(models: Path) -> None:
    assert "is a file" in refused(lambda: base_model("base/config.json", models)).found


def test_a_model_without_weights_is_refused(models: Path) -> None:
    (models / "base" / "model.safetensors").unlink()
    assert "no weights" in refused(lambda: base_model("base", models)).found


def test_pickle_weights_need_permission(models: Path) -> None:
    (models / "base" / "model.safetensors").rename(models / "base" / "pytorch_model.bin")
    assert "allow_pickle_weights" in refused(lambda: base_model("base", models)).hint
    assert base_model("base", models, pickle=True) == str(models / "base")


@pytest.mark.parametrize("cut", [3, 40, -1])
def test_half_written_weights_are_refused(models: Path, cut: int) -> None:
    for file, check in (
        (models / "base" / "model.safetensors", lambda: base_model("base", models)),
        (models / "lora" / "adapter_model.safetensors", lambda: adapter("lora", models)),
    ):
        file.write_bytes(file.read_bytes()[:cut])
        assert str(file) in refused(check).found


def test_a_missing_shard_is_found(models: Path) -> None:
    base = models / "base"
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors" in refused(lambda: base_model("base", models)).found
    write_safetensors(base / "model-2.safetensors")
    assert base_model("base", models) == str(base)


@pytest.mark.parametrize("gone", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_adapter_is_refused(models: Path, gone: str) -> None:
    (models / "lora" / gone).unlink()
    assert gone in refused(lambda: adapter("lora", models)).found


def test_a_cut_adapter_config_is_refused(models: Path) -> None:
    (models / "lora" / "adapter_config.json").write_text('{"peft')
    assert "cannot be read" in refused(lambda: adapter("lora", models)).found


def test_a_missing_adapter_is_refused_with_what_is_there(models: Path) -> None:
    error = refused(lambda: adapter("lroa", models))
    assert str(models / "lroa") in error.found
    assert "lora" in error.hint


def test_an_empty_checkpoint_stands_for_its_parent(models: Path) -> None:
    (models / "lora" / "checkpoint-40").mkdir()
    assert adapter("lora/checkpoint-40", models) == Adapter(models / "lora")
    write_adapter(models / "lora" / "checkpoint-80")
    assert adapter("lora/checkpoint-80", models) == Adapter(models / "lora" / "checkpoint-80")


def test_a_merged_model_is_loaded_as_a_model(models: Path, write: Callable[[str], Path]) -> None:
    assert adapter("base", models) == Adapter(models / "base", merged=True)
    found = load(write("models: {a: {adapter_dir: base}, b: {base_model: org/name, adapter_dir: base}}"))
    assert {(m.base_model, m.adapter_dir) for m in found.models.values()} == {(str(models / "base"), None)}
    assert any("merged" in note for note in found.notes)


@pytest.mark.parametrize("text", ["~nobody-of-this-name/base", "a\0b"])
def test_a_path_that_means_nothing_is_refused(models: Path, text: str) -> None:
    for check in (base_model, adapter):
        assert refused(lambda c=check: c(text, models)).found == repr(text)
