"""From a specification to a model in memory: weights, tokenizers, end tokens, context.

Whatever would be served wrong is refused, with what was found, what was expected and what to do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from loopmux.errors import ConfigError, LoopmuxError
from loopmux.messages import ModelSpec, WorkerSpec
from loopmux.modelfolders import adapter_folder
from loopmux.weightfiles import MODEL_CONFIG, model_weights, read_json
from loopmux_worker.causes import panics_as_errors
from loopmux_worker.engine import fingerprints, memory, specfolders
from loopmux_worker.engine.templates import check_template, has_template

Progress = Callable[[str, str], None]
"""Told what is being done: a phase (loading, warming) and a line for people."""

_OWN_FIRST_RELEASE = Version("5.0")
"""From here on transformers reads ``rope_parameters``; before, it ignored them and computed other positions."""


@dataclass(slots=True)
class Loaded:
    """A model in memory.

    Attributes:
        model: the transformers model; adapters are put into it by ``adapters``.
        ends: token ids that end an output, whichever model's.
        context: tokens of prompt and answer together.
        vocabulary: rows of the embedding: prompt ids are below.
        head: width of the logits.
        fingerprint: of the base's files, dtype and quantisation.
        files: their state before they were read.
        parameters: how many the base has.
        weights_bytes: that they took when they were loaded.
        threads: torch's, for one operation; whichever thread computes has to say so to torch.
        notes: what somebody who wonders about answers should know.
    """

    model: Any
    ends: frozenset[int]
    context: int
    vocabulary: int
    head: int
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    folder: Path
    files: fingerprints.State
    parameters: int
    weights_bytes: int
    threads: int
    notes: list[str] = field(default_factory=list)

    def ends_with(self, tokenizer: Any) -> frozenset[int]:
        """Token ids that end an output read with a tokenizer: its own, and those of the base."""
        return self.ends | _ids(tokenizer.eos_token_id)

    def leave_files(self) -> None:
        """Copy what is still mapped from the files: whoever writes to them from now on changes no answer.

        transformers maps the weights of a model on a CPU. Written again in place they would be others, and a file that
        is cut short would end this process (SIGBUS). Packing copies most of them, so this comes after it.

        Raises:
            ConfigError: a file has changed since they were first read.
        """
        for tensor in chain(self.model.parameters(), self.model.buffers()):
            plain = type(tensor) in (nn.Parameter, torch.Tensor)  # quantised ones were made from what is in the files
            if plain and tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        fingerprints.check_unchanged(self.folder, self.files)


def load(spec: WorkerSpec, progress: Progress) -> Loaded:
    """Load the base model; ``Loaded.leave_files`` completes it.

    Raises:
        ConfigError: something in the folders, the specification or this environment does not fit; it says what.
    """
    if spec.torch_threads is not None:
        torch.set_num_threads(spec.torch_threads)
    folder = specfolders.base_folder(spec)
    check_environment(spec, folder)
    device = choose_device(spec.device)
    weights = model_weights(folder, pickle=spec.allow_pickle_weights)
    _check_memory(spec, weights, device)
    progress("loading", f"weights of {folder.name} ({sum(p.stat().st_size for p in weights) / 2**20:.0f} MiB)")
    files = fingerprints.state(folder)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="fingerprint") as pool:
        digest = pool.submit(fingerprints.of, folder)
        model, notes = _load_model(spec, folder, device)
        return _loaded(spec, folder, files, model, notes, digest)


def _loaded(
    spec: WorkerSpec, folder: Path, files: fingerprints.State, model: Any, notes: list[str], digest: Future[str]
) -> Loaded:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ends = _ids(getattr(model.generation_config, "eos_token_id", None))
    _neutral_generation(model)
    quantised = "4bit" if spec.use_4bit else "8bit" if spec.use_8bit else "none"
    parts = {"base": digest.result(), "dtype": str(model.dtype), "quantisation": quantised}
    return Loaded(
        model=model,
        ends=ends,
        context=_context(spec, model),
        vocabulary=vocabulary,
        head=_head_width(model, vocabulary),
        device=model.device,
        dtype=model.dtype,
        fingerprint=fingerprints.combined(parts),
        folder=folder,
        files=files,
        parameters=sum(p.numel() for p in model.parameters()),
        weights_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        threads=torch.get_num_threads(),
        notes=notes,
    )


def check_environment(spec: WorkerSpec, folder: Path) -> None:
    """Refuse what this environment cannot serve right.

    Raises:
        ConfigError: quantisation without bitsandbytes, remote code without permission, a configuration file that this
            transformers would misread.
    """
    config = read_json(folder / MODEL_CONFIG)
    if spec.use_4bit and spec.use_8bit:
        raise ConfigError("use_4bit and use_8bit are both set, expected at most one")
    if (spec.use_4bit or spec.use_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        wanted = "use_4bit" if spec.use_4bit else "use_8bit"
        raise ConfigError(
            f"{wanted}: this environment has no bitsandbytes: add it to the environment's requirements, or set "
            f"{wanted}: false"
        )
    if "auto_map" in config and not spec.trust_remote_code and config.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"{folder}: its config.json names code of its own (auto_map), which is not run: set trust_remote_code: "
            "true if you trust its source"
        )
    _check_rope(config, folder)


def _check_rope(config: dict[str, Any], folder: Path) -> None:
    """An older transformers ignores ``rope_parameters``: then the old keys must say the same."""
    if Version(transformers.__version__) >= _OWN_FIRST_RELEASE:
        return
    for part in (config, config.get("text_config") or {}):
        rope = part.get("rope_parameters")
        if not isinstance(rope, dict):
            continue
        theta = rope.get("rope_theta", 10000.0)
        scaled = rope.get("rope_type", "default") != "default"
        if float(part.get("rope_theta", 10000.0)) != float(theta) or (scaled and not part.get("rope_scaling")):
            raise ConfigError(
                f"{folder}/config.json says rope_parameters {rope}, which transformers {transformers.__version__} does "
                "not read: it would compute other positions and answer wrong. Use transformers 5 or later for it"
            )


def choose_device(name: str) -> torch.device:
    """The device for a name; ``auto`` takes the first accelerator there is.

    Raises:
        ConfigError: it is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda:0" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: found {name!r}, expected auto, cpu, cuda, cuda:N or mps") from None
    there = {"cpu": True, "cuda": cuda, "mps": mps}.get(device.type, False)
    if not there or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        have = [
            "cpu",
            *(f"cuda:{i}" for i in range(torch.cuda.device_count() if cuda else 0)),
            *(["mps"] if mps else []),
        ]
        raise ConfigError(f"device: found {name!r}, this machine and this torch have {', '.join(have)}")
    return device


def _check_memory(spec: WorkerSpec, weights: list[Path], device: torch.device) -> None:
    if spec.use_4bit or spec.use_8bit:
        return  # what quantised weights take is known once they are loaded
    width = None if spec.dtype == "auto" else torch.empty(0, dtype=getattr(torch, spec.dtype)).element_size()
    needed = memory.needed(weights, width)
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available()
    if available is not None and needed > available:
        raise ConfigError(
            f"the weights take {needed / 2**20:.0f} MiB and {device} has {available / 2**20:.0f} MiB free: stop "
            "other workers, choose a smaller dtype, or a smaller model"
        )


def _load_model(spec: WorkerSpec, folder: Path, device: torch.device) -> tuple[Any, list[str]]:
    """The model, and what is worth a note about it."""
    options: dict[str, Any] = {
        "dtype": "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype),
        "trust_remote_code": spec.trust_remote_code,
        "use_safetensors": None if spec.allow_pickle_weights else True,
        "local_files_only": True,
        "ignore_mismatched_sizes": True,  # they are refused below, with both shapes
    }
    if device.type != "cpu":
        options["device_map"] = {"": device}
    if spec.use_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    elif spec.use_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
        model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except Exception as error:
        raise ConfigError(
            f"{folder}: transformers {transformers.__version__} cannot load it: {type(error).__name__}: {error}"
        ) from error
    _check_loading(folder, info)
    _check_numbers(folder, model)
    model.eval()
    return model, _unused(info)


def _check_loading(folder: Path, info: Any) -> None:
    """Weights that are missing would be made up at random, and answer like it."""
    for kind in ("missing_keys", "mismatched_keys"):
        found = sorted(map(str, info.get(kind) or ()))
        if found:
            raise ConfigError(
                f"{folder}: {len(found)} weights are {kind.removesuffix('_keys')}, the first is {found[0]}: "
                "config.json and weights do not belong together"
            )


def _unused(info: Any) -> list[str]:
    """A note about weights that the model has no place for: without one that belongs to it, it answers otherwise."""
    found = sorted(map(str, info.get("unexpected_keys") or ()))
    if not found:
        return []
    return [
        f"{len(found)} weights of its files have no place in this model and are not used, the first is {found[0]}: "
        "unless only training needs them, config.json is of another model"
    ]


def _check_numbers(folder: Path, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not is_finite(parameter):
            raise ConfigError(f"{folder}: the weight {name} holds NaN or infinite values: the checkpoint is damaged")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite; takes no memory of the tensor's size, but for numbers of 8 bits."""
    wide = tensor if tensor.element_size() > 1 else tensor.bfloat16()  # which ``aminmax`` does not take
    low, high = torch.aminmax(wide.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def tokenizer_of(model: ModelSpec, loaded: Loaded, spec: WorkerSpec) -> tuple[Any, list[str]]:
    """The adapter's own tokenizer if it has one, else the base's; and what is worth a note about it.

    Raises:
        ConfigError: there is none that can be loaded, or it is of another model.
    """
    base, notes = loaded.folder, []
    own = adapter_folder(model.adapter_dir) if model.adapter_dir else base
    tokenizer = read_tokenizer(own if _has_tokenizer(own) else base, spec)
    if len(tokenizer) > loaded.vocabulary:
        raise ConfigError(
            f"model {model.id!r}: its tokenizer has {len(tokenizer)} tokens, the model's embedding {loaded.vocabulary} "
            "rows: it belongs to another model"
        )
    if own != base and _has_tokenizer(own) and not has_template(tokenizer) and _has_tokenizer(base):
        tokenizer.chat_template = read_tokenizer(base, spec).chat_template
        notes.append(f"{model.id}: the adapter's tokenizer has no chat template, the base's is used")
    if has_template(tokenizer):
        check_template(tokenizer, own if _has_tokenizer(own) else base)
    elif model.model_type == "instruct":
        notes.append(f"{model.id}: no chat template, a plain 'User: … Assistant:' format is used")
    return tokenizer, notes


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder brings a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def read_tokenizer(folder: Path, spec: WorkerSpec) -> Any:
    """A tokenizer from a folder.

    Raises:
        ConfigError: there is none that this transformers can load.
    """
    try:
        with panics_as_errors():
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
            )
    except Exception as error:
        raise ConfigError(
            f"{folder}: transformers {transformers.__version__} cannot load its tokenizer ({type(error).__name__}: "
            f"{error}): copy it again, or use the release of transformers that saved it"
        ) from error


def _ids(given: Any) -> frozenset[int]:
    """End tokens as they are given: several, one, or none. Chat models name only one of theirs in either place."""
    found = given if isinstance(given, (list, tuple)) else [given]
    return frozenset(int(token) for token in found if token is not None)


def _head_width(model: Any, vocabulary: int) -> int:
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", vocabulary))


def _neutral_generation(model: Any) -> None:
    """Sampling is ours: what a checkpoint recommends (temperature, penalties) must not apply on top of it."""
    model.generation_config = transformers.GenerationConfig()


def _context(spec: WorkerSpec, model: Any) -> int:
    text = model.config.get_text_config()
    own = next(
        (n for k in ("max_position_embeddings", "n_positions", "max_seq_len") if (n := getattr(text, k, None))), None
    )
    if spec.context is None:
        return int(own or 2**31)
    if own is not None and spec.context > own:
        raise ConfigError(f"context: found {spec.context}, the model was made for at most {own}")
    return spec.context


def as_config_error(error: Exception) -> LoopmuxError:
    """An error of loading as one of ours."""
    return error if isinstance(error, LoopmuxError) else ConfigError(f"{type(error).__name__}: {error}")
