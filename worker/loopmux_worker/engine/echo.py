"""The echo engine: a deterministic stream without weights, for tests and load. Imports no torch.

Token i of a request is ``echo_token(request, i)``, whoever runs it, so exactness can be checked from outside. A last
user message that begins with a directive is played as a script instead (see ``script``); the token ids stay the same.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from loopmux.errors import AdapterNotFoundError, BadRequestError, ConfigError, EngineError
from loopmux.messages import Generate, ModelSpec, ServedModel, WorkerSpec
from loopmux.results import FinishReason, ToolCall, Usage
from loopmux.wire import unpack_tokens
from loopmux_worker.engine import admission
from loopmux_worker.engine.base import (
    Description,
    Engine,
    Failed,
    Finished,
    Job,
    Key,
    Load,
    Output,
    Produced,
    taken,
    timing_of,
)
from loopmux_worker.engine.calls import Parser, family_of
from loopmux_worker.engine.script import pieces_of, script_of
from loopmux_worker.engine.text import StopStrings

VOCABULARY = 4096
"""Token ids are below this; each is a word of two syllables."""
_PER_STEP = 8
"""Tokens per request and step where nothing limits the rate: as many as one TOK carries."""
_SLOTS = 64
_FAMILY = family_of("", "hermes")
"""As scripts write calls."""
_CONSONANTS, _VOWELS = "bdfghklmnprstvwz", "aeiu"


def echo_token(request: bytes, position: int) -> int:
    """The token at a position: the first two bytes of BLAKE2b over request id and position (8 bytes, big-endian)."""
    digest = hashlib.blake2b(request + position.to_bytes(8, "big"), digest_size=2).digest()
    return int.from_bytes(digest, "big") % VOCABULARY


def echo_text(token: int) -> str:
    """A token's text: two syllables and a space."""
    high, low = divmod(token, 64)
    return f"{_syllable(high)}{_syllable(low)} "


def _syllable(number: int) -> str:
    return _CONSONANTS[number // 4 % 16] + _VOWELS[number % 4]


@dataclass(frozen=True, slots=True)
class EchoSettings:
    """``WorkerSpec.echo``.

    Attributes:
        rate: tokens per second and request; 0 is as fast as possible.
        tokens: how many tokens an answer has, where ``max_new_tokens`` does not cut it and ``ignore_eos`` is not set.
        first_delay: seconds before a request's first token.
        fail_after: a request fails with EngineError in front of this position; -1 never.
        raise_after: ``step`` raises when a request reaches this position, as an engine with a bug would; -1 never.
    """

    rate: float = 0.0
    tokens: float = 64.0
    first_delay: float = 0.0
    fail_after: float = -1.0
    raise_after: float = -1.0


def read_settings(given: Mapping[str, float]) -> EchoSettings:
    """Check the settings.

    Raises:
        ConfigError: an unknown name, or a value that makes no sense.
    """
    known = [field.name for field in fields(EchoSettings)]
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"echo.{name}: an unknown key, expected one of {', '.join(known)}")
        if value < 0 and not name.endswith("_after"):
            raise ConfigError(f"echo.{name}: found {value}, expected 0 or more")
    return EchoSettings(**given)


@dataclass(slots=True)
class _Running:
    job: Job
    words: list[str] | None  # a script's pieces; None for syllables
    total: int
    reason: FinishReason
    position: int
    next_due: float
    arrived: float
    prompt: int
    stops: StopStrings
    calls: Parser | None
    first: float | None = None


class EchoEngine(Engine):
    """Runs any number of requests side by side, each at its own rate."""

    slow_to_prepare = False

    def __init__(self, spec: WorkerSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = read_settings(spec.echo)
        self._slots = spec.slots or _SLOTS
        self._context = spec.context or 2**31
        self._models = {model.id: model for model in spec.models}
        self._clock = clock
        self._running: dict[Key, _Running] = {}
        self._waiting: list[Finished] = []
        self._progress = self._computed = 0

    def describe(self) -> Description:
        """The models as configured; the fingerprint is the same for all echo engines, since their output is."""
        served = tuple(ServedModel(m.id, "echo", m.id if m.adapter_dir else None) for m in self._models.values())
        adapters = tuple(m.id for m in self._models.values() if m.adapter_dir)
        report: dict[str, Any] = {
            "engine": "echo",
            "why": "configured",
            "rate": self._settings.rate,
            "adapters": dict.fromkeys(adapters, "echo"),
        }
        return Description("echo", served, self._slots, adapters, report)

    def prepare(self, job: Job) -> _Running:
        """Check a request; see ``Engine``."""
        generate = job.generate
        generate.check()
        if admission.asks_guarantee(generate):
            raise BadRequestError(
                "tool_choice, strict, response_format: found one, but an echo cannot be guaranteed to be anything: "
                "leave it out, or ask another model"
            )
        admission.check_stop_tokens(generate, VOCABULARY)
        model = admission.model_of(job.run, self._models)
        admission.adapter_of(job.run, self._models)
        prompt = _prompt_tokens(generate, model)
        limit = admission.room_for(prompt, len(job.prefix), generate.max_new_tokens, self._context)
        script = script_of(generate)
        words = None if script is None else pieces_of(script)
        available = len(words) if words is not None else self._available(generate, limit)
        now = self._clock()
        return _Running(
            job=job,
            words=words,
            total=min(limit, available),
            reason="length" if limit <= available else "stop",
            position=0,
            next_due=now + self._settings.first_delay,
            arrived=now if job.arrived is None else job.arrived,
            prompt=prompt,
            stops=StopStrings(generate.stop),
            calls=_FAMILY.parser(job.key.request, admission.callable_tools(generate)),
        )

    def add(self, prepared: _Running) -> None:
        """Take a request in; see ``Engine``."""
        self._computed += prepared.prompt
        for _ in prepared.job.prefix:
            self._produce(prepared)
        if prepared.position >= prepared.total:
            self._waiting.append(self._finished(prepared))
        else:
            self._running[prepared.job.key] = prepared

    def cancel(self, key: Key) -> Usage | None:
        """Forget a request."""
        running = self._running.pop(key, None)
        return None if running is None else Usage(running.prompt, running.position)

    def step(self) -> list[Output]:
        """Every token that is due."""
        now = self._clock()
        outputs: list[Output] = list(self._waiting)
        self._waiting.clear()
        for running in list(self._running.values()):
            if running.next_due <= now:
                outputs += self._advance(running, now)
        return outputs

    def due(self) -> float | None:
        """Seconds until the next token is due; see ``Engine``."""
        if self._waiting:
            return 0.0
        if not self._running:
            return None
        return max(0.0, min(running.next_due for running in self._running.values()) - self._clock())

    def load(self) -> Load:
        """Load and progress."""
        running = min(len(self._running), self._slots)
        return Load(running, len(self._running) - running, self._progress, computed=self._computed)

    def load_adapter(self, name: str, directory: str, like: str = "") -> ServedModel:
        """Serve one more model id; of the directory only the name matters."""
        if self._models.get(name, ModelSpec(name, directory)).adapter_dir != directory:
            raise taken(name)
        self._models[name] = replace(self._models.get(like, ModelSpec("")), id=name, adapter_dir=directory)
        return ServedModel(name, "echo", name)

    def unload_adapter(self, name: str) -> None:
        """Stop serving a model id that ``load_adapter`` added, or that has an adapter."""
        if name not in self._models or not self._models[name].adapter_dir:
            raise AdapterNotFoundError(f"adapter {name!r} is not loaded")
        del self._models[name]

    def _available(self, generate: Generate, limit: int) -> int:
        return limit if generate.ignore_eos else max(1, int(self._settings.tokens))

    def _advance(self, running: _Running, now: float) -> list[Output]:
        """The tokens of one request that are due, and its end if it is reached."""
        settings, key = self._settings, running.job.key
        running.first = running.first or now
        start, text = running.position, ""
        ids: list[int] = []
        calls: list[ToolCall] = []
        for _ in range(1 if settings.rate else _PER_STEP):
            if running.position == settings.raise_after:
                raise RuntimeError(f"echo.raise_after: position {running.position} was reached")
            if running.position == settings.fail_after:
                del self._running[key]
                error = EngineError(f"echo.fail_after: position {running.position} was reached")
                failed = Failed(key, error, Usage(running.prompt, running.position))
                return [*([Produced(key, start, tuple(ids), text, tuple(calls))] if ids else []), failed]
            token, piece, new = self._produce(running)
            ids.append(token)
            text += piece
            calls += new
            if running.position >= running.total:
                break
        self._progress += len(ids)
        # The next one is due by the clock of the stream, so that a late step does not lower the rate
        running.next_due = now if not settings.rate else max(running.next_due + 1 / settings.rate, now - 1)
        outputs: list[Output] = [Produced(key, start, tuple(ids), text, tuple(calls))]
        if running.position >= running.total:
            del self._running[key]
            outputs.append(self._finished(running))
        return outputs

    def _produce(self, running: _Running) -> tuple[int, str, list[ToolCall]]:
        """The next token with the text and the calls that it completes."""
        position = running.position
        token = echo_token(running.job.key.request, position)
        running.position += 1
        text = echo_text(token) if running.words is None else running.words[position]
        text, stopped = running.stops.push(text)
        if stopped or token in running.job.generate.stop_token_ids:
            running.total, running.reason = running.position, "stop"
        last = running.position >= running.total
        if last and not stopped:
            text += running.stops.flush()
        if running.calls is None:
            return token, text, []
        parsed = running.calls.push(text)
        if not last:
            return token, parsed.text, list(parsed.calls)
        rest = running.calls.flush()
        if running.calls.count and running.reason == "stop":
            running.reason = "tool_calls"
        return token, parsed.text + rest.text, [*parsed.calls, *rest.calls]

    def _finished(self, running: _Running) -> Finished:
        now = self._clock()
        usage = Usage(running.prompt, running.position)
        own = running.position - len(running.job.prefix)
        timing = timing_of(running.arrived, running.arrived, running.first, now, own)
        return Finished(running.job.key, running.position, running.reason, usage, timing)


def _prompt_tokens(generate: Generate, model: ModelSpec) -> int:
    """One token per word of the prompt or the messages."""
    if generate.prompt_token_ids is not None:
        return len(unpack_tokens(generate.prompt_token_ids))
    texts = [generate.prompt or "", model.system_prompt or ""]
    texts += [str(message.get("content") or "") for message in generate.messages or ()]
    return max(1, sum(len(text.split()) for text in texts))
