from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from loopmux_launcher import jsonschema, reader, schema

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_shipped_schema_is_up_to_date() -> None:
    shipped = (CONFIGS / "llm_backends.schema.json").read_text()
    assert shipped == jsonschema.text(), "run: loopmux config schema > configs/llm_backends.schema.json"


def test_every_key_is_described() -> None:
    for cls in (schema.EnvironmentEntry, schema.ModelEntry, schema.EchoEntry, schema.FileEntry):
        assert all(len(f.metadata["doc"]) > 10 for f in dataclasses.fields(cls))


def test_the_shipped_configuration_uses_known_keys_only() -> None:
    values = yaml.safe_load((CONFIGS / "llm_backends.yaml").read_text())
    known: dict[str, Any] = jsonschema.generate()["properties"]
    for section, entries in values.items():
        names = known[section]["additionalProperties"]["properties"]
        for entry in entries.values():
            assert set(entry) <= set(names)
    assert list(values["models"]) == ["default", "tools", "shout", "echo"]


def test_the_shipped_adapters_are_on_the_base_they_name() -> None:
    shout = CONFIGS / "demo" / "adapters" / "shout"
    assert json.loads((shout / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert reader.load(CONFIGS / "llm_backends.yaml").notes == ()


def test_commented_keys_of_the_shipped_configuration_exist() -> None:
    fields = {f.name for cls in (schema.EnvironmentEntry, schema.ModelEntry) for f in dataclasses.fields(cls)}
    lines = [line.strip() for line in (CONFIGS / "llm_backends.yaml").read_text().splitlines()]
    offered = [
        line[2:].split(":")[0].strip() for line in lines if line.startswith("# ") and ": " in line and "#" in line[2:]
    ]
    assert offered
    assert set(offered) <= fields | {"existing"}
