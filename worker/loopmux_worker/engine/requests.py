"""What becomes of a job before it can be run: checked, its prompt read, then everything that its tokens go through."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from loopmux.errors import AdapterNotFoundError, BadRequestError
from loopmux.messages import Generate
from loopmux.results import Usage
from loopmux_worker.causes import panics_as_errors
from loopmux_worker.engine import admission, templates
from loopmux_worker.engine.base import Finished, Job, Produced, timing_of
from loopmux_worker.engine.continuing import Prompt
from loopmux_worker.engine.grammars import asked, matching
from loopmux_worker.engine.loading import Loaded
from loopmux_worker.engine.models import Models
from loopmux_worker.engine.output import Reader
from loopmux_worker.engine.sampling import Pick, Sampler, seed_of
from loopmux_worker.engine.served import Served


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that was checked, with its prompt as token ids; nobody else knows of it yet.

    Attributes:
        model, adapter: what it was prepared for; the adapter as a model id of its own, None for the base alone.
        rewritten: tokens of earlier answers that the prompt does not have as they were produced.
        limit: most tokens of its output, those of an earlier attempt included.
        reader: reads its output; past the tokens of an earlier attempt, as the grammar is.
        grammar: what its output is held to.
        arrived: when the worker got it.
    """

    job: Job
    model: Served
    adapter: Served | None
    prompt: list[int]
    rewritten: int
    limit: int
    reader: Reader
    grammar: matching.Matcher | None
    arrived: float


@dataclass(slots=True)
class Request:
    """A job that an engine has taken in: its prompt as token ids, and everything that its tokens go through.

    Attributes:
        adapter, limit, arrived: see ``Prepared``.
        started, first: when it was begun, and when its first own token came.
    """

    job: Job
    prompt: list[int]
    rewritten: int
    adapter: str | None
    limit: int
    reader: Reader
    sampler: Sampler
    arrived: float
    started: float | None = None
    first: float | None = None

    @property
    def exact(self) -> bool:
        """Whether its tokens are to be the same whatever runs beside it, and after a worker was lost."""
        return _exact(self.job)

    def usage(self, total: int, cached: int = 0) -> Usage:
        """Token counts after ``total`` tokens of output; of the whole sequence ``cached`` were found."""
        prompt = len(self.prompt)
        return Usage(prompt, total, min(cached, prompt), self.rewritten)

    @panics_as_errors()
    def produced(self, pick: Pick, now: float) -> Produced:
        """Take in a token that was chosen, and say what it brings."""
        position = self.reader.total
        self.sampler.note(pick.token)
        piece = self.reader.push(pick.token, last=self.sampler.complete)
        self.first = self.first or now
        logprobs = (pick.logprob,) if pick.logprob else ()
        return Produced(self.job.key, position, (pick.token,), piece.text, piece.calls, logprobs, piece.reasoning)

    def finished(self, usage: Usage, now: float) -> Finished:
        """Its end, which its last token has brought."""
        total, reason = self.reader.total, self.reader.reason
        assert reason is not None
        timing = timing_of(self.arrived, self.started, self.first, now, total - len(self.job.prefix))
        return Finished(self.job.key, total, reason, usage, timing)


class Requests:
    """Makes requests of jobs.

    Args:
        models: what is served.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._grammars = matching.Grammars(models.loaded.head)

    @panics_as_errors()
    def prepare(self, job: Job) -> Prepared:
        """Check a job and read its prompt. In any thread; uses no torch, whose threads are those of who computes.

        Raises:
            LoopmuxError: it cannot be run here; it says why.
        """
        arrived = time.monotonic() if job.arrived is None else job.arrived
        generate, loaded = job.generate, self._models.loaded
        _check(job, loaded)
        wanted = asked.asked(generate)
        self._models.check_not_leaving(job.run.model, job.run.adapter)
        served = self._models.served  # one look: adapters come and go meanwhile
        specs = {name: one.spec for name, one in served.items()}
        model = served[admission.model_of(job.run, specs).id]
        adapter = admission.adapter_of(job.run, specs)
        prompt, rewritten = self._prompt(generate, model)
        limit = admission.room_for(len(prompt), len(job.prefix), generate.max_new_tokens, loaded.context)
        thinks = model.thinks(prompt)
        reading = model.reading(job, limit, thinks=thinks)
        grammar = None
        if wanted is not None:
            grammar = self._grammars.matcher(
                wanted, model.family, model.tokenizer, eos=model.ends, ends=reading.ends, thinks=thinks
            )
        reader = Reader(reading)
        _replay(job.prefix, reader, grammar)
        own = served[adapter] if adapter else None
        return Prepared(job, model, own, prompt, rewritten, limit, reader, grammar, arrived)

    def begin(self, prepared: Prepared) -> Request:
        """A prepared job, ready to run.

        Raises:
            LoopmuxError: it cannot be run any more, for an adapter went since; or it names a token that is not there.
        """
        job, generate, loaded = prepared.job, prepared.job.generate, self._models.loaded
        self._models.check_not_leaving(job.run.model, job.run.adapter)
        for served in (prepared.model, prepared.adapter):
            if served is not None and self._models.served.get(served.spec.id) is not served:
                raise AdapterNotFoundError(
                    f"adapter {served.spec.id!r} was unloaded while this request's prompt was read; if one of that "
                    "name is loaded again, send the request again",
                    model=served.spec.id,
                )
        sampler = Sampler(
            generate.sampling,
            seed=seed_of(generate.sampling, job.key.request),
            vocabulary=loaded.head,
            prompt=prepared.prompt,
            written=job.prefix[: prepared.reader.total],
            logprobs=generate.logprobs,
            device=loaded.device,
            grammar=prepared.grammar,
        )
        own = prepared.adapter.spec.id if prepared.adapter else None
        return Request(
            job, prepared.prompt, prepared.rewritten, own, prepared.limit, prepared.reader, sampler, prepared.arrived
        )

    def _prompt(self, generate: Generate, model: Served) -> Prompt:
        prompt = templates.render(generate, model.spec, model.tokenizer, model.ends)
        if not prompt.ids:
            raise BadRequestError("prompt: found no tokens, expected at least one")
        if max(prompt.ids) >= (known := self._models.loaded.vocabulary):
            where = "token_ids of a message" if generate.prompt_token_ids is None else "prompt_token_ids"
            raise BadRequestError(f"{where}: found {max(prompt.ids)}, this model's ids are below {known}")
        return prompt


def _check(job: Job, loaded: Loaded) -> None:
    generate, known = job.generate, min(loaded.vocabulary, loaded.head)
    generate.check()
    admission.check_stop_tokens(generate, loaded.head)
    if _exact(job) and loaded.dtype != torch.float32:
        raise BadRequestError(
            f"deterministic: the model runs in {str(loaded.dtype).removeprefix('torch.')}, where a resumed request "
            "may differ; set dtype: float32 for it"
        )
    if job.prefix and max(job.prefix) >= known:
        raise BadRequestError(
            f"found token {max(job.prefix)} in what this request is to go on behind, this model's ids are below {known}"
        )


def _replay(prefix: Iterable[int], reader: Reader, grammar: matching.Matcher | None) -> None:
    """Take in the tokens of an earlier attempt, up to the one that ended it.

    Raises:
        EngineError: the grammar does not allow one of them.
    """
    for token in prefix:
        if grammar is not None:
            grammar.push(token)
        reader.push(token, last=grammar is not None and grammar.complete)
        if reader.reason is not None:
            return


def _exact(job: Job) -> bool:
    return job.generate.deterministic or job.run.deterministic
