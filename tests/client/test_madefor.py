from __future__ import annotations

from pathlib import Path

import pytest

from loopmux.madefor import other_base


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ("demo/base", "/srv/configs/demo/base"),
        ("/home/her/models/Llama-3", "/srv/models/llama-3"),
        ("/home/her/models/Llama-3/", "meta/Llama-3"),
        ("meta/Llama-3", "/srv/models/Llama-3"),
        ("C:\\models\\Llama-3", "/srv/models/Llama-3"),
        ("/h/.cache/huggingface/hub/models--meta--Llama-3/snapshots/1f3a", "/srv/models/Llama-3"),
        ("meta/Llama-3", "/h/.cache/huggingface/hub/models--meta--Llama-3/snapshots/1f3a"),
        (None, "/srv/models/Llama-3"),
        ("", "/srv/models/Llama-3"),
        (3, "/srv/models/Llama-3"),
    ],
)
def test_the_same_base_under_another_path_or_none_at_all(named: object, base: str, tmp_path: Path) -> None:
    assert other_base(named, base, tmp_path) is None


@pytest.mark.parametrize(
    "named", ["meta/Llama-2", "/srv/models/Llama-2", "Llama-3-Instruct", "/", "Llama\0-3", "\ud800"]
)
def test_another_base_is_named_with_both(named: str, tmp_path: Path) -> None:
    note = other_base(named, "/srv/models/Llama-3", tmp_path)
    assert note is not None
    assert f"{tmp_path}/adapter_config.json names the base {named!r}" in note
    assert "put on /srv/models/Llama-3" in note
    note.encode()  # it can be printed whatever stands there


def test_two_names_of_one_folder_are_the_same_base(tmp_path: Path) -> None:
    (tmp_path / "llama-3").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "current").symlink_to("llama-3")
    there, link, adapter = str(tmp_path / "llama-3"), str(tmp_path / "current"), tmp_path / "adapter"
    assert other_base(link, there, adapter) is None
    assert other_base(there, link, adapter) is None
    assert other_base("../current", there, adapter) is None
    assert other_base("../currant", there, adapter)
