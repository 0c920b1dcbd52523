"""Typed ROUTE and BODY contents of every message, and the launcher's hand-over to a worker.

Classes whose docstring starts with ROUTE are read by the broker and must stay within ``wire.ROUTE_LIMIT`` and
``codec.ROUTE_LIMITS``; those that start with BODY are for the endpoints. Times are seconds and relative: no two
processes share a clock. What is made for every request or chunk is not frozen, here and in ``wire`` and the ``events``
of all parts: it would cost some four times as much to make, and nobody changes one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from loopmux.errors import BadRequestError, ConfigError, LoopmuxError, from_code
from loopmux.results import FinishReason, Timing, TokenLogprob, ToolCall, Usage
from loopmux.wire import CLIENT_BODY_LIMIT

DEFAULT_TIMEOUT = 600.0
"""Total deadline of a request that names none, seconds."""
DEFAULT_MAX_NEW_TOKENS = 256
TOKEN_LIMIT = 2**32
"""Token ids are below: they travel as unsigned 32-bit numbers. Each model's own limit is its vocabulary."""
_DIGITS = len(str(TOKEN_LIMIT))
MOST_STOPS = 256
"""Stop strings of a request: each is looked for behind every token, while all other requests wait."""
MOST_NEW_TOKENS = 2**31 - 1
"""Of one request; no context of a model is longer."""
LONGEST_PROMPT = CLIENT_BODY_LIMIT
"""Characters or token ids of a prompt: each takes a byte of BODY at least."""
PRIORITY_LIMIT = 100
"""Priorities go from -100 to 100: at the broker's 30 s a step, more than an hour's head start is never meant."""

FEWEST_TOKENS = 2
"""Of a context: one of a prompt and one of an answer."""

# --- the connection ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """ROUTE of HELLO: a client introduces itself; ``instance`` (16 bytes) stays the same over its reconnections."""

    versions: tuple[int, ...]
    instance: bytes
    software: str = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """ROUTE of WELCOME: the broker's answer to HELLO and to REGISTER.

    ``epoch`` (8 bytes) is random per broker process: another one means that the broker restarted and knows nothing.
    ``heartbeat`` is the interval in which the peer is expected to say something; after three it counts as gone.
    ``max_body`` is the largest BODY that it may send, bytes.
    """

    version: int
    epoch: bytes
    heartbeat: float
    max_body: int
    window: int
    software: str = ""


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Submit:
    """ROUTE of SUBMIT and ATTACH: what the broker needs to admit, queue and place a request without reading its prompt.

    Attributes:
        timeout: seconds until the deadline, from now.
        prompt_size: characters (or token ids) of the prompt, roughly.
        hashes: of the prompt's beginnings, the longest last: who has the same one has begun alike.
        continues: a later turn of a tool loop; goes before first turns of the same priority.
        wait: queue for a model that is not loaded yet instead of failing at once.
        cancel_on_disconnect: it is not to outlive the loss of its client, not even for the grace time.
        fingerprint: of the weights that ATTACH's tokens came from; it goes on only where they are the same.
    """

    model: str
    adapter: str | None = None
    session: str | None = None
    priority: int = 0
    timeout: float = DEFAULT_TIMEOUT
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    prompt_size: int = 0
    hashes: tuple[bytes, ...] = ()
    continues: bool = False
    wait: bool = True
    deterministic: bool = False
    cancel_on_disconnect: bool = False
    trace: str | None = None
    fingerprint: str | None = None

    def check(self) -> None:
        """Refuse what no broker could place.

        Raises:
            BadRequestError: naming the field, what was found and what was expected.
        """
        if not 0 < self.timeout < math.inf:  # false for NaN
            raise BadRequestError(f"timeout: found {self.timeout}, expected seconds above 0")
        _in_range("priority", self.priority, -PRIORITY_LIMIT, PRIORITY_LIMIT)
        _in_range("max_new_tokens", self.max_new_tokens, 1, MOST_NEW_TOKENS)
        _in_range("prompt_size", self.prompt_size, 0, LONGEST_PROMPT)


@dataclass(slots=True)
class Run:
    """ROUTE of RUN: a submitted request on its way to a worker; TOKENS hold the prefix to resume from.

    ``session`` is the broker's name for a session of one client: other clients' sessions never have it. ``client`` is
    the instance whose request it is: only a broker that was started again asks for it (HELD).
    """

    model: str
    adapter: str | None = None
    session: str | None = None
    timeout: float = DEFAULT_TIMEOUT
    deterministic: bool = False
    trace: str | None = None
    client: bytes = b""


@dataclass(frozen=True, slots=True)
class Held:
    """ROUTE of HELD: a request that a worker still has while it introduces itself, as RUN named it.

    ``epoch`` is that of the broker that last wanted it of this worker (RUN, REPLAY).
    """

    client: bytes
    model: str
    adapter: str | None = None
    epoch: bytes = b""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off.

    ``seed`` None draws a fresh one per request. ``logit_bias`` maps token ids (as text: map keys on the wire are texts)
    to what is added to their logits.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse values outside their range.

        Raises:
            BadRequestError: naming the field, the value and the range.
        """
        _in_range("temperature", self.temperature, 0, 100)
        _in_range("top_p", self.top_p, 0, 1, above_low=True)
        _in_range("top_k", self.top_k, 0, 2**31 - 1)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _in_range("presence_penalty", self.presence_penalty, -100, 100)
        _in_range("frequency_penalty", self.frequency_penalty, -100, 100)
        if self.seed is not None:
            _in_range("seed", self.seed, 0, 2**63 - 1)
        for token, bias in self.logit_bias.items():
            if not token.isdecimal() or len(token) > _DIGITS:
                raise BadRequestError(f"logit_bias: found the key {token[:80]!r}, expected a token id such as '42'")
            _in_range(f"logit_bias[{token}]", bias, -1000, 1000)


@dataclass(frozen=True, slots=True)
class Generate:
    """BODY of SUBMIT and RUN: what to generate. Exactly one of ``prompt``, ``messages``, ``prompt_token_ids`` is set.

    Attributes:
        prompt_token_ids: packed as in ``wire.pack_tokens``.
        messages: role/content maps as chat templates take them; assistant ones may have ``tool_calls``.
        tools: JSON-schema function descriptions.
        logprobs: how many alternatives to report per token; None for no log probabilities at all.
        response_format: a JSON schema the text must follow.
    """

    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    prompt_token_ids: bytes | None = None
    tools: tuple[dict[str, Any], ...] = ()
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    deterministic: bool = False
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    reasoning: bool | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what no engine could run.

        Raises:
            BadRequestError: naming the field, what was found and what was expected.
        """
        given = [n for n in ("prompt", "messages", "prompt_token_ids") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise BadRequestError(f"found {found}, expected exactly one of prompt, messages, prompt_token_ids")
        if self.messages is not None and not self.messages:
            raise BadRequestError("messages: found an empty list, expected at least one message")
        if self.prompt_token_ids is not None and (not self.prompt_token_ids or len(self.prompt_token_ids) % 4):
            raise BadRequestError("prompt_token_ids: expected at least one token id")
        _in_range("max_new_tokens", self.max_new_tokens, 1, MOST_NEW_TOKENS)
        if len(self.stop) > MOST_STOPS:
            raise BadRequestError(f"stop: found {len(self.stop)} texts, expected at most {MOST_STOPS}")
        if any(not s for s in self.stop):
            raise BadRequestError("stop: found an empty text, expected texts of at least one character")
        if self.logprobs is not None:
            _in_range("logprobs", self.logprobs, 0, 20)
        for i, token in enumerate(self.stop_token_ids):
            _in_range(f"stop_token_ids[{i}]", token, 0, TOKEN_LIMIT - 1)
        self.sampling.check()


def _in_range(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    above_low: bool = False,
    error: type[LoopmuxError] = BadRequestError,
) -> None:
    fits = (low < value if above_low else low <= value) and value <= high  # false for NaN
    if not fits:
        bounds = f"above {low} and at most {high}" if above_low else f"from {low} to {high}"
        raise error(f"{name}: found {value}, expected a value {bounds}")


@dataclass(frozen=True, slots=True)
class SessionHint:
    """ROUTE of SESSION: between turns, whether the session comes back, and in how many seconds if the client knows.

    The broker passes it on to the workers that ran the session, under the name of the session that RUN has.
    """

    session: str
    state: Literal["waiting_on_tool", "done"]
    expected: float | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """ROUTE of PHASE: a waiting request learns what its model is doing."""

    phase: str
    position: int = 0
    elapsed: float = 0.0
    detail: str = ""


# --- output -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tok:
    """BODY of TOK: what the tokens of the message mean to a reader; text and reasoning lag behind tokens, never lead.

    ``fingerprint``, with an attempt's first tokens, names the weights that they came from: ATTACH gives it back.
    """

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    fingerprint: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """BODY of END."""

    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    model: str
    worker: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """BODY of ERROR, CANCELLED and EXPIRED: one of ``loopmux.errors`` on its way, by its code."""

    code: str
    message: str
    retryable: bool = False
    model: str | None = None
    worker: str | None = None
    retry_after: float | None = None
    usage: Usage | None = None

    @classmethod
    def of(
        cls, error: LoopmuxError, *, model: str | None = None, worker: str | None = None, usage: Usage | None = None
    ) -> Failure:
        """The error of a request for ``model``, which ``worker`` ran and which took ``usage``, as far as is known."""
        return cls(error.code, error.message, error.retryable, model, worker, error.retry_after, usage)

    def error(self) -> LoopmuxError:
        """The error that it was."""
        return from_code(
            self.code,
            self.message,
            retryable=self.retryable,
            model=self.model,
            worker=self.worker,
            retry_after=self.retry_after,
        )


# --- membership -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model id that a worker answers to: the base alone or the base with one adapter.

    ``fingerprint`` names the content (base, adapter, dtype); a request resumes only where it is equal.
    """

    id: str
    fingerprint: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A model id that a worker was to serve and could not load, while others were; ``reason`` is for people."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Register:
    """ROUTE of REGISTER: a worker or a launcher joins. The BODY is a free report for ``status``.

    Attributes:
        boot: 16 random bytes per process; output is accepted from the registered boot only.
        models: what a worker serves, at most 64; empty for a launcher.
        slots: requests the worker runs at once.
        adapters: names of adapters that a request may ask for on top of a model id.
        left_out: what it was to serve too and cannot, at most 64; reasons are shortened to fit.
        held: requests that it has already: as many HELD follow upon WELCOME.
    """

    role: Literal["worker", "launcher"]
    name: str
    boot: bytes
    versions: tuple[int, ...]
    host: str = ""
    models: tuple[ServedModel, ...] = ()
    adapters: tuple[str, ...] = ()
    slots: int = 0
    engine: str = ""
    pid: int = 0
    software: str = ""
    left_out: tuple[LeftOut, ...] = ()
    held: int = 0

    def fingerprint(self, model: str, adapter: str | None) -> str:
        """What names the weights that a request for a model that is served here, and perhaps an adapter, runs on."""
        served = {one.id: one for one in self.models}
        if model not in served:
            return ""
        own = served[model]
        if adapter is None or adapter == own.adapter:
            return own.fingerprint
        return f"{own.fingerprint}+{served[adapter].fingerprint if adapter in served else adapter}"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """ROUTE of HB. The header's ``seq`` is the progress counter: it moves whenever the engine does.

    Attributes:
        cached_tokens: prompt tokens since the start whose attention state was reused.
        computed_tokens: prompt tokens since the start that were computed; one that was computed again counts again.
        note: of a launcher: what people should know of it, such as a configuration that it refused.
    """

    running: int = 0
    queued: int = 0
    tokens_per_second: float = 0.0
    cached_tokens: int = 0
    computed_tokens: int = 0
    note: str = ""


ModelPhase = Literal["idle", "queued", "building", "loading", "warming", "ready", "failed"]
"""What a model's launcher is doing for it; ``idle`` is declared but not started."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """ROUTE of CATALOGUE: a launcher declares one model, or reports what it is doing for it.

    Sent for each model after REGISTER and at every change. ``removed`` takes the model out of the catalogue.
    ``detail`` is a line for people (progress, or the reason of a failure with the worker's last words). ``scales``: its
    processes come and go with the demand, which the launcher therefore wants to hear of (SCALE). An adapter that was
    loaded at run time has ``onto``, the model that it was loaded for, and the ``folder`` where it lies: the broker sees
    to it that workers of that model have it.
    """

    model: str
    phase: ModelPhase
    elapsed: float = 0.0
    detail: str = ""
    workers: int = 0
    removed: bool = False
    scales: bool = False
    onto: str | None = None
    folder: str = ""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker of a model that scales: requests that it has, of how many, and the seconds since it did anything."""

    name: str
    slots: int
    running: int = 0
    idle: float = 0.0


@dataclass(frozen=True, slots=True)
class Demand:
    """BODY of SCALE: how many requests wait for each of a launcher's models that scale, and what their workers do.

    It is the whole of it: a model that is not named has nobody waiting, a worker that is not named is not there, or
    about to leave.
    """

    queued: dict[str, int] = field(default_factory=dict)
    workers: tuple[WorkerLoad, ...] = ()


# --- adapters at run time ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdapterOrder:
    """ROUTE of LOAD and UNLOAD: an adapter that all workers of a model are to serve, or to serve no longer.

    It becomes a model id of its own, ``name``, that is asked as ``model`` is (type, system prompt), and may be named as
    an adapter of any model of these workers. ``folder`` is absolute, on the workers' host; empty in UNLOAD.
    """

    model: str
    name: str
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """BODY of DONE: what came of LOAD or UNLOAD.

    Attributes:
        failure: why it was not done; None if it was.
        content: hash of the adapter's files.
        served: from a worker that loaded it: what it serves since.
        workers: from the broker: those that did it.
        remembered: from the broker: a launcher does the same with workers that it starts.
    """

    failure: Failure | None = None
    content: str = ""
    served: ServedModel | None = None
    workers: tuple[str, ...] = ()
    remembered: bool = False


# --- status -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model as the broker sees it.

    Attributes:
        phase: what is done for it: idle, queued, building, loading, warming, ready or failed.
        workers: how many serve it.
        queued, running: requests for it.
        detail: a line for people: progress, or the reason of a failure.
        elapsed: seconds in this phase.
    """

    id: str
    phase: ModelPhase
    workers: int = 0
    queued: int = 0
    running: int = 0
    detail: str = ""
    elapsed: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as the broker sees it.

    Attributes:
        slots: requests that it runs at once.
        state: ``draining`` gets nothing new, ``silent`` has missed a heartbeat.
        served, tokens: requests that gave their slot back, and tokens produced, since it joined.
        uptime: seconds since then.
        report: what it said about itself at REGISTER.
        tokens_per_second, cached_tokens, computed_tokens: of its last heartbeat.
    """

    name: str
    models: tuple[str, ...]
    slots: int
    running: int
    engine: str
    pid: int
    host: str
    state: Literal["ready", "draining", "silent"]
    served: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    uptime: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    cached_tokens: int = 0
    computed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """An adapter that requests may name.

    Attributes:
        onto: the model that it was loaded for at run time; None for one of the configuration, or without a launcher.
        contents: hashes of its files, one unless workers have different ones.
        workers: how many have it.
    """

    name: str
    workers: int = 0
    contents: tuple[str, ...] = ()
    onto: str | None = None
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """BODY of REPORT: the broker's answer to STATUS. ``counters`` holds running totals by name.

    ``settled`` is false for a moment after the broker's start, in which models may still join. ``tables`` says how much
    the broker holds of what goes away with its cause: entries, or bytes for ``held`` (requests) and ``output``.
    ``notes`` has by launcher what it wants people to know.
    """

    epoch: bytes
    uptime: float
    software: str
    pid: int
    clients: int
    queued: int
    running: int
    models: tuple[ModelStatus, ...] = ()
    workers: tuple[WorkerStatus, ...] = ()
    launchers: tuple[str, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)
    settled: bool = True
    tables: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    adapters: tuple[AdapterStatus, ...] = ()


# --- administration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evict:
    """ROUTE of EVICT: an administrator wants the worker of this name to leave, in good order.

    It gets nothing new; what it runs has half of ``within`` seconds to end there and then goes on elsewhere.
    """

    worker: str
    within: float = 60.0

    def check(self) -> None:
        """Refuse a time that is none.

        Raises:
            BadRequestError: naming the field, what was found and what was expected.
        """
        _in_range("within", self.within, 0, 86_400)


# --- launcher to worker -----------------------------------------------------------------------------------------------


ToolFormat = Literal[
    "auto", "hermes", "qwen_xml", "llama_json", "mistral_list", "mistral_args", "gemma", "gpt_oss", "glm", "deepseek",
    "envelope",
]  # fmt: skip
"""How a model writes tool calls; ``auto``: its chat template tells."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model id that a worker is to serve: the base with ``adapter_dir`` or alone.

    ``tool_format`` is how it writes tool calls.
    """

    id: str
    adapter_dir: str | None = None
    model_type: Literal["instruct", "base"] = "instruct"
    system_prompt: str | None = None
    tool_format: ToolFormat = "auto"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All a worker process needs to know, handed over as JSON (``loopmux-worker --spec FILE``).

    Attributes:
        endpoint: the broker's worker endpoint.
        base_model: directory or hub id; None only for the echo engine.
        slots: requests at once; None lets the engine choose.
        context: tokens of prompt and answer together; None takes the model's own.
        kv_cache_gib: GiB for attention state; None takes a share of what is free.
        kernels: ``torch`` computes everything, ``native`` attention by our own or not at all; ``auto`` where it can be
            compiled.
        echo: settings of the echo engine: ``rate`` (tokens per second, 0 as fast as possible), ``tokens``.
    """

    name: str
    endpoint: str
    models: tuple[ModelSpec, ...]
    base_model: str | None = None
    engine: Literal["auto", "slots", "plain", "echo"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    slots: int | None = None
    context: int | None = None
    kv_cache_gib: float | None = None
    torch_threads: int | None = None
    kernels: Literal["auto", "native", "torch"] = "auto"
    use_4bit: bool = False
    use_8bit: bool = False
    trust_remote_code: bool = False
    allow_pickle_weights: bool = False
    echo: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what no worker could serve.

        Raises:
            ConfigError: naming the worker, the field, what was found and what was expected.
        """
        who = f"worker {self.name!r}: "
        if not self.models:
            raise ConfigError(f"{who}models: found none, expected at least one")
        names = [model.id for model in self.models]
        doubled = [name for i, name in enumerate(names) if name in names[:i]]
        if doubled:
            raise ConfigError(f"{who}models: found the id {doubled[0]!r} twice, expected different ones")
        for key, low in (("slots", 1), ("context", FEWEST_TOKENS), ("torch_threads", 1)):
            if (value := getattr(self, key)) is not None:
                _in_range(who + key, value, low, 2**31 - 1, error=ConfigError)
        if self.kv_cache_gib is not None:
            _in_range(f"{who}kv_cache_gib", self.kv_cache_gib, 0, 2**20, above_low=True, error=ConfigError)
