"""The configuration file as types: one dataclass per mapping, one ``key`` per entry.

What a key means, its bounds and its default stand here once; the checks (``reader``), the JSON schema for editors
(``jsonschema``) and the error messages are all made from it.
"""

# ruff: noqa: RUF009 - `key` only makes a dataclasses.field, mutable defaults go through default_factory

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from loopmux.messages import FEWEST_TOKENS, ToolFormat


def key(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    pattern: str | None = None,
) -> Any:
    """A field with its description and bounds.

    ``minimum`` and ``maximum`` are allowed themselves, ``above`` is not; ``pattern`` matches whole.
    """
    rules = {"doc": doc, "minimum": minimum, "above": above, "maximum": maximum, "pattern": pattern}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=rules)
    return dataclasses.field(default=default, metadata=rules)


MOST_PROCESSES = 256
"""Worker processes of one model: each holds the weights and a few threads of its own, so no host runs more."""


@dataclass(frozen=True, slots=True)
class EnvironmentEntry:
    """A Python environment that workers run in: built from requirements, or an existing one named by its path."""

    python: str | None = key(
        None,
        'Version ("3.11", found on PATH) or path of the interpreter to build with. Default: the launcher\'s version.',
    )
    requirements: tuple[str, ...] | str = key(
        (), "Packages as pip takes them, or the name of a requirements file. What the worker itself needs is added."
    )
    path: str | None = key(
        None, "An existing virtual environment, or its interpreter: probed and used, never modified."
    )
    index_options: tuple[str, ...] = key(
        (),
        'Where packages come from, as lines of a requirements file: "--extra-index-url https://…", "--find-links DIR".',
    )
    installer: Literal["auto", "uv", "pip"] = key("auto", "auto: uv where it is installed, else venv and pip.")
    variables: dict[str, str] = key({}, "Environment variables for the installer and for the workers.")


@dataclass(frozen=True, slots=True)
class EchoEntry:
    """Settings of the echo engine."""

    rate: float | None = key(None, "Tokens per second and request; 0 is as fast as possible.", minimum=0)
    tokens: float | None = key(None, "Tokens per answer, when the request does not end it earlier.", minimum=1)
    first_delay: float | None = key(None, "Seconds before a request's first token.", minimum=0)
    fail_after: float | None = key(None, "For tests: requests fail in front of this token; -1 never.", minimum=-1)
    raise_after: float | None = key(None, "For tests: the engine itself fails at this token; -1 never.", minimum=-1)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model id that clients may name: a base model, with or without an adapter."""

    base_model: str | None = key(None, "Directory (relative to this file) or hub id (org/name).")
    adapter_dir: str | None = key(
        None, "Directory of a LoRA adapter, of a checkpoint-N inside one, or of a merged model."
    )
    model_type: Literal["instruct", "base"] = key("instruct", "instruct: chat template; base: plain text.")
    environment: str | None = key(None, "Name of the environment; `default` unless given.")
    workers: int | None = key(
        None, "Worker processes; 1 unless given. Stands for min and max alike.", minimum=1, maximum=MOST_PROCESSES
    )
    min: int | None = key(
        None,
        "Processes that always run; 0 starts the first one when a request waits for it.",
        minimum=0,
        maximum=MOST_PROCESSES,
    )
    max: int | None = key(
        None, "Most processes; more than min run while requests wait for them.", minimum=1, maximum=MOST_PROCESSES
    )
    idle_timeout: float | None = key(
        None, "Seconds without requests after which a process beyond min stops; 600 unless given.", above=0
    )
    memory_gib: float | None = key(
        None, "Memory that one process takes, GiB; needed where the file has a memory_gib for all.", above=0
    )
    use_4bit: bool = key(False, "Load in 4 bit; needs bitsandbytes in the environment.")
    use_8bit: bool = key(False, "Load in 8 bit; needs bitsandbytes in the environment.")
    system_prompt: str | None = key(None, "System message for requests that bring none.")
    tool_format: ToolFormat = key("auto", "How the model writes tool calls; auto: its chat template tells.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "Number format of the weights.")
    device: str = key("auto", "auto, cpu, mps, cuda or cuda:N.", pattern=r"auto|cpu|mps|cuda(:\d+)?")
    slots: int | Literal["auto"] | None = key(None, "Requests that a process runs at once.", minimum=1)
    context: int | Literal["auto"] | None = key(None, "Tokens of prompt and answer together.", minimum=FEWEST_TOKENS)
    kv_cache_gib: float | Literal["auto"] | None = key(None, "Memory for attention state, GiB.", above=0)
    torch_threads: int | Literal["auto"] | None = key(
        None, "Threads of one process; auto shares the cores between the processes.", minimum=1
    )
    engine: Literal["auto", "slots", "plain", "echo"] = key(
        "auto", "What generates; echo needs no weights and no torch: a deterministic stream for tests and load."
    )
    kernels: Literal["auto", "native", "torch"] = key(
        "auto", "What computes attention on a CPU; auto: our own kernels where they can be compiled, else torch."
    )
    trust_remote_code: bool = key(False, "Run Python code that comes with the model.")
    allow_pickle_weights: bool = key(False, "Accept .bin weights, which can run code when they are loaded.")
    start_timeout: float = key(1800.0, "Seconds until a starting process counts as failed.", above=0)
    port: int | None = key(None, "Not used; accepted from files of the replaced system.")
    echo: EchoEntry | None = key(None, "Settings of the echo engine.")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """The whole file."""

    environments: dict[str, EnvironmentEntry] = key({}, "Python environments by name.")
    models: dict[str, ModelEntry] = key({}, "Models by the id that clients name.")
    memory_gib: float | None = key(
        None, "Memory that all worker processes of this host may take together, GiB; no limit unless given.", above=0
    )
