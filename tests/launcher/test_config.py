from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fakemodels import write_model
from loopmux.errors import ConfigError
from loopmux_launcher import config
from loopmux_launcher.document import InvalidConfiguration, Problem
from loopmux_launcher.reader import load

Write = Callable[[str], Path]


def problems(file: Path) -> list[Problem]:
    with pytest.raises(InvalidConfiguration) as caught:
        load(file)
    assert caught.value.code == "config"
    return list(caught.value.problems)


def only(file: Path) -> Problem:
    (found,) = problems(file)
    assert str(file) in str(found)
    return found


def test_a_file_of_the_replaced_system_loads_unchanged(write: Write, models: Path) -> None:
    found = load(
        write(
            """
models:
  default:
    base_model: ./base
    adapter_dir: lora
    model_type: instruct
    port: 8100
    use_4bit: false
    system_prompt: "Be kind."
  plain: {base_model: base, adapter_dir: null, model_type: base, port: 8101}
"""
        )
    )
    default, plain = found.models.values()
    assert (default.base_model, default.adapter_dir) == (str(models / "base"), str(models / "lora"))
    assert (plain.base_model, plain.adapter_dir, plain.entry.model_type) == (str(models / "base"), None, "base")
    assert default.environment == plain.environment == "default"
    assert found.environments["default"].requirements == config.DEFAULT_REQUIREMENTS
    assert (default.fewest, default.most) == (None, 1)
    assert [n for n in found.notes if "default.port" in n and ":7:" in n and "not used" in n]


def test_engine_keys_and_environments_are_taken_over(write: Write, models: Path) -> None:
    (models / "needs.txt").write_text("torch==2.13.0\n")
    found = load(
        write(
            f"""
environments:
  own: {{path: "{sys.prefix}", variables: {{HF_HUB_OFFLINE: "1"}}}}
  filed:
    {{python: "3.11", requirements: needs.txt, installer: pip, variables: {{A: b}}, index_options: [--no-index]}}
models:
  a: {{base_model: base, environment: own, workers: 3, slots: auto, context: 512, kv_cache_gib: 1, dtype: float32}}
  b: {{base_model: base, environment: filed, use_8bit: true, device: "cuda:1", torch_threads: 2, start_timeout: 9}}
"""
        )
    )
    own, filed = found.environments["own"], found.environments["filed"]
    assert own.path == Path(sys.prefix) / "bin" / "python"
    assert own.variables == {"HF_HUB_OFFLINE": "1"}
    assert (filed.requirements_file, filed.python) == (models / "needs.txt", "3.11")
    assert (filed.installer, filed.variables, filed.index_options) == ("pip", {"A": "b"}, ("--no-index",))
    assert (found.models["a"].fewest, found.models["a"].most, found.models["a"].entry.kv_cache_gib) == (3, 3, 1.0)
    assert found.models["b"].entry.device == "cuda:1"


def test_echo_needs_no_environment(write: Write) -> None:
    found = load(write("models: {echo: {engine: echo, echo: {rate: 10}}}"))
    assert found.environments == {}
    assert found.models["echo"].environment is None


def test_everything_wrong_is_reported_at_once_in_the_order_of_the_file(write: Write) -> None:
    found = problems(
        write(
            """environments:
  default:
    python: 3.11
    requirments: [torch]
models:
  a:
    base_model: base
    wokers: 2
    slots: many
    use_4bit: "yes"
    kv_cache_gib: 0
  b:
    base_model: nowhere/at/all
    environment: defualt
modles: {}
"""
        )
    )
    assert [(p.line, p.where) for p in found] == [
        (3, "environments.default.python"),
        (4, "environments.default.requirments"),
        (8, "models.a.wokers"),
        (9, "models.a.slots"),
        (10, "models.a.use_4bit"),
        (11, "models.a.kv_cache_gib"),
        (13, "models.b.base_model"),
        (14, "models.b.environment"),
        (15, "modles"),
    ]
    text = {p.where: str(p) for p in found}
    assert "3.11 (float)" in text["environments.default.python"]
    assert 'python: "3.11"' in text["environments.default.python"]
    assert "did you mean 'requirements'?" in text["environments.default.requirments"]
    assert "did you mean 'workers'?" in text["models.a.wokers"]
    assert "expected a whole number or one of auto" in text["models.a.slots"]
    assert "'yes' (str), expected true or false" in text["models.a.use_4bit"]
    assert "0 (int), expected more than 0" in text["models.a.kv_cache_gib"] or "0.0" in text["models.a.kv_cache_gib"]
    assert "did you mean 'default'?" in text["models.b.environment"]
    assert "did you mean 'models'?" in text["modles"]


@pytest.mark.parametrize(
    ("entry", "where", "found", "expected"),
    [
        ("{base_model: base, workers: 0}", "workers", "0 (int)", "at least 1"),
        ("{base_model: base, workers: 100000}", "workers", "100000 (int)", "at most 256"),
        ("{base_model: base, min: 1, max: 257}", "max", "257 (int)", "at most 256"),
        ("{base_model: base, workers: true}", "workers", "True (bool)", "a whole number"),
        ("{base_model: base, workers: 1, min: 1}", "min", "beside workers", "min and max"),
        ("{base_model: base, min: 3, max: 2}", "max", "2 (int)", "at least 3"),
        ("{base_model: base, min: -1}", "min", "-1 (int)", "at least 0"),
        ("{base_model: base, dtype: int8}", "dtype", "'int8'", "float32"),
        ("{base_model: base, device: gpu}", "device", "'gpu'", "cuda:N"),
        ("{base_model: base, engine: fast}", "engine", "'fast'", "plain"),
        ("{base_model: base, model_type: chat}", "model_type", "'chat'", "instruct"),
        ("{base_model: base, start_timeout: 0}", "start_timeout", "0", "more than 0"),
        ("{base_model: base, use_4bit: true, use_8bit: true}", "use_8bit", "use_4bit and use_8bit", "one of them"),
        ("{base_model: [base]}", "base_model", "['base'] (list)", "a text"),
        ("{}", "base_model", "nothing", "a model directory"),
        ("[]", "", "[] (list)", "a mapping"),
        ("{engine: echo, echo: {rte: 5}}", "echo.rte", "an unknown key", "rate"),
        ("{engine: echo, echo: {rate: -5}}", "echo.rate", "-5.0 (float)", "at least 0"),
        ("{base_model: base, environment: gone}", "environment", "'gone'", "default"),
    ],
)
def test_a_wrong_model_entry_is_named(write: Write, entry: str, where: str, found: str, expected: str) -> None:
    problem = only(write(f"\nmodels:\n  a: {entry}\n"))
    assert problem.where == f"models.a.{where}".rstrip(".")
    assert problem.line == 3
    assert found in problem.found
    assert expected in problem.expected


@pytest.mark.parametrize(
    ("entry", "where", "found"),
    [
        ("{path: /nowhere}", "path", "no interpreter /nowhere"),
        ('{path: "%s", python: "3.11"}', "python", "python beside path"),
        ("{python: three}", "python", "'three'"),
        ('{python: "9.9"}', "python", "'9.9'"),
        ("{requirements: nothing.txt}", "requirements", "no file"),
        ('{requirements: ["torch=2.13.0"]}', "requirements[0]", "torch=2.13.0"),
        ("{requirements: [1]}", "requirements[0]", "1 (int)"),
        ("{variables: {A: 1}}", "variables.A", "1 (int)"),
        ("{index_options: [https://x.invalid/simple]}", "index_options[0]", "https://x.invalid/simple"),
        ('{index_options: ["--no-index", "--target /"]}', "index_options[1]", "--target /"),
        ('{path: "%s", index_options: ["--no-index"]}', "index_options", "index_options beside path"),
        ("{installer: conda}", "installer", "'conda'"),
    ],
)
def test_a_wrong_environment_is_named(write: Write, entry: str, where: str, found: str) -> None:
    text = entry.replace("%s", sys.prefix)
    problem = only(write(f"models: {{a: {{engine: echo}}}}\nenvironments:\n  own: {text}\n"))
    assert (problem.where, problem.line) == (f"environments.own.{where}", 3)
    assert found in problem.found


def test_a_python_that_is_not_there_is_told_with_those_that_are(write: Write) -> None:
    problem = only(write('models: {a: {engine: echo}}\nenvironments:\n  own: {python: "9.9"}\n'))
    assert "Python 9.9: found only" in problem.hint
    assert platform.python_version() in problem.hint
    assert "on PATH, expected 9.9: install it, or set `python:`" in problem.hint


def test_options_and_paths_among_requirements_are_left_to_pip(write: Write) -> None:
    lines = ["--extra-index-url https://x.invalid/simple", "./here", "pkg @ https://x.invalid/p.whl", "numpy>=2"]
    found = load(write(f"models: {{a: {{engine: echo}}}}\nenvironments: {{own: {{requirements: {lines!r}}}}}"))
    assert found.environments["own"].requirements == tuple(lines)


def test_where_packages_come_from_and_what_installs_them(write: Write, models: Path) -> None:
    options = ["--extra-index-url=https://x.invalid/simple", "-f wheels", "--no-index", "--pre"]
    own = f"{{installer: pip, index_options: {options!r}}}"
    found = load(write(f"models: {{a: {{engine: echo}}}}\nenvironments: {{own: {own}}}")).environments["own"]
    assert (found.installer, found.index_options) == ("pip", tuple(options))
    assert found.lock_file == models / "llm_backends.own.lock"


def test_an_environment_name_that_is_no_folder_name_is_refused(write: Write) -> None:
    assert "../x" in only(write("models: {a: {engine: echo}}\nenvironments: {../x: {}}")).found


@pytest.mark.parametrize("key", ["path", "python", "requirements"])
@pytest.mark.parametrize(("text", "why"), [("~no-such-user/x", "home"), ("x\\0", "null"), ("\\ud800", "utf-8")])
def test_a_path_that_there_cannot_be_is_a_problem_of_the_file(write: Write, key: str, text: str, why: str) -> None:
    problem = only(write(f'models: {{a: {{engine: echo}}}}\nenvironments: {{own: {{{key}: "{text}"}}}}'))
    assert problem.where == f"environments.own.{key}"
    assert why in problem.hint


@pytest.mark.parametrize("variable", ["'A=B': x", "'': x", '"A\\0": x', 'A: "a\\0b"', 'A: "\\ud800"'])
def test_a_variable_that_no_process_can_have_is_a_problem_of_the_file(write: Write, variable: str) -> None:
    text = f"models: {{a: {{engine: echo}}}}\nenvironments: {{own: {{requirements: [x], variables: {{{variable}}}}}}}"
    assert only(write(text)).where.startswith("environments.own.variables")


def test_keys_written_twice_are_refused_with_both_lines(write: Write) -> None:
    problem = only(write("models:\n  a: {engine: echo}\n  b: {engine: echo}\n  a: {engine: echo}\n"))
    assert (problem.line, problem.where) == (4, "models.a")
    assert "first on line 2" in problem.found


def test_a_word_that_yaml_reads_as_something_else_is_explained(write: Write) -> None:
    problem = only(write("models:\n  no: {engine: echo}\n"))
    assert problem.line == 2
    assert "which YAML reads as bool" in problem.found
    assert "quotes" in problem.hint


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        (b"models:\n  a: {engine: echo\n", 3, "expected ',' or '}'"),
        (b"models:\n\ta: 1\n", 2, "cannot start any token"),
        (b"models:\n  a: \xff\n", 2, "invalid start byte"),
        (b"models: !!python/object:os.system {}\n", 1, "could not determine a constructor"),
        (b"", 1, "nothing"),
        (b"[]", 1, "[] (list)"),
        (b"models: {}\n", 1, "no models"),
        (b"models: 3\n", 1, "3 (int)"),
        (b"models:\n  a: {system_prompt: 2026-02-31}\n", 2, "day is out of range"),
        (b"models:\n  a: {workers: !!int many}\n", 2, "invalid literal"),
        (b"models:\n  a: {use_4bit: !!bool maybe}\n", 2, "no bool"),
        (b"models:\n  a: {workers: !!int ''}\n", 2, "no int"),
        (b"models:\n  a: {system_prompt: !!timestamp noon}\n", 2, "no timestamp"),
        (b"models:\n  a: {workers: " + b"9" * 5000 + b"}\n", 2, "exceeds the limit"),
        (b"models: " + b"[" * 3000, 0, "too many others"),
    ],
)
def test_what_is_no_configuration_is_refused(models: Path, content: bytes, line: int, found: str) -> None:
    file = models / "broken.yaml"
    file.write_bytes(content)
    problem = only(file)
    assert problem.line == line
    assert found.lower() in problem.found.lower()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "No such file" in only(tmp_path / "gone.yaml").found
    assert only(Path("/dev/zero")).found == "more than 4 MiB"


def test_how_many_processes_a_model_says_that_it_needs(write: Write) -> None:
    text = """models:
  lazy: {engine: echo, min: 0, idle_timeout: 60}
  wide: {engine: echo, min: 0, max: 3}
  grows: {engine: echo, max: 2}
  plain: {engine: echo}
  fixed: {engine: echo, min: 2, max: 2, idle_timeout: 5}
"""
    found = load(write(text))
    assert {name: (m.fewest, m.most) for name, m in found.models.items()} == {
        "lazy": (0, 1), "wide": (0, 3), "grows": (1, 2), "plain": (None, 1), "fixed": (2, 2)
    }  # fmt: skip
    [note] = found.notes
    assert "fixed.idle_timeout: without effect" in note


@pytest.mark.parametrize(
    ("entry", "where", "found", "expected"),
    [
        ("workers: 2, max: 3", "models.a.max", "max beside workers", "either workers or min and max"),
        ("min: 3, max: 2", "models.a.max", "2 (int)", "at least 3, which is min"),
    ],
)
def test_numbers_of_processes_that_contradict_each_other(
    write: Write, entry: str, where: str, found: str, expected: str
) -> None:
    problem = only(write(f"models: {{a: {{engine: echo, {entry}}}}}"))
    assert (problem.where, problem.found, problem.expected) == (where, found, expected)


def test_a_limit_of_memory_and_what_each_process_takes(write: Write) -> None:
    assert (
        load(write("memory_gib: 3\nmodels: {a: {base_model: base, memory_gib: 2}, e: {engine: echo}}")).memory_gib == 3
    )
    unused = load(write("models: {a: {engine: echo, memory_gib: 2}}"))
    assert unused.memory_gib is None
    assert "a.memory_gib: without effect" in unused.notes[0]


@pytest.mark.parametrize(
    ("text", "where", "expected"),
    [
        ("memory_gib: 3\nmodels: {a: {base_model: base}}", "models.a", "what one process takes"),
        ("memory_gib: 0\nmodels: {a: {engine: echo}}", "memory_gib", "more than 0"),
        ("memory_gib: much\nmodels: {a: {engine: echo}}", "memory_gib", "a number"),
        (
            "memory_gib: 3\nmodels: {a: {engine: echo, workers: 2, memory_gib: 2}}",
            "memory_gib",
            "a memory_gib of 4 or more for all (GiB, of which always run: a 2 × 2)",
        ),
        (
            "memory_gib: 3\nmodels:\n  a: {engine: echo, memory_gib: 2}\n"
            "  b: {engine: echo, min: 0, memory_gib: 2, slots: 2}\n",
            "models.b.memory_gib",
            "a memory_gib of 4 or more for all (GiB, of which always run: a 1 × 2)",
        ),
    ],
)
def test_what_can_never_run_within_the_memory_is_refused(write: Write, text: str, where: str, expected: str) -> None:
    problem = only(write(text))
    assert problem.where == where
    assert expected in problem.expected


def test_anchors_and_merges_work(write: Write) -> None:
    text = "models:\n  a: &x {base_model: base, slots: 4}\n  b: {<<: *x, adapter_dir: lora}\n"
    assert load(write(text)).models["b"].entry.slots == 4


def test_the_file_is_found_in_the_promised_order(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as nowhere:
        config.find()
    assert "--config" in str(nowhere.value)

    def make(file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return file

    user = make(home / "config" / "loopmux" / "llm_backends.yaml")
    assert config.find() == user
    make(tmp_path / "configs" / "llm_backends.yaml")
    assert config.find() == Path("configs/llm_backends.yaml")
    monkeypatch.setenv("LOOPMUX_CONFIG", str(make(tmp_path / "named.yaml")))
    assert config.find() == tmp_path / "named.yaml"
    assert config.find(user) == user
    with pytest.raises(ConfigError, match="--config"):
        config.find(tmp_path / "gone.yaml")
    monkeypatch.setenv("LOOPMUX_CONFIG", str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match="LOOPMUX_CONFIG"):
        config.find()


def test_what_is_found_out_about_a_base_model_is_said_with_its_line(models: Path, write: Write) -> None:
    file = write("models:\n  a:\n    base_model: org/name\n")
    found = load(file)
    assert found.models["a"].base_model == "org/name"
    [note] = found.notes
    assert note.startswith(f"{file}:3: models.a.base_model: no directory {models}/org/name")
    write_model(models / "demo" / "base")
    with pytest.raises(InvalidConfiguration) as caught:
        load(write("models:\n  a:\n    base_model: demoo/base\n"))
    assert f"{file}:3: models.a.base_model: found no directory {models}/demoo/base" in str(caught.value)
    assert f"did you mean {models}/demo/base?" in str(caught.value)


def test_an_adapter_that_names_another_base_gets_a_note(models: Path, write: Write) -> None:
    file = write("models:\n  a:\n    base_model: base\n    adapter_dir: lora\n")
    described = models / "lora" / "adapter_config.json"
    described.write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    assert load(file).notes == ()
    described.write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/other"}')
    [note] = load(file).notes
    assert note.startswith(f"{file}:4: models.a.adapter_dir: {described} names the base 'org/other'")
    assert f"put on {models / 'base'}" in note
    assert only(write("models: {a: {adapter_dir: lora}}")).where == "models.a.base_model"


def test_a_merged_model_is_loaded_as_a_model(models: Path, write: Write) -> None:
    found = load(write("models: {a: {adapter_dir: base}, b: {base_model: org/name, adapter_dir: base}}"))
    assert {(m.base_model, m.adapter_dir) for m in found.models.values()} == {(str(models / "base"), None)}
    assert any("merged" in note for note in found.notes)
