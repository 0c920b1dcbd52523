"""``loopmux-worker``: the model process.

``loopmux-worker --spec FILE|-`` serves a broker. ``… run-adapter`` answers one prompt in this process, ``… probe`` says
what this interpreter offers. It ends with ``loopmux.exitcodes``.

Standard output belongs to the reader of this process (the launcher's progress lines, an answer's text); whatever a
library prints goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from loopmux import exitcodes, standard
from loopmux.errors import BadRequestError, ConfigError, EngineError, LoopmuxError
from loopmux_worker import caches, logs
from loopmux_worker.causes import causes

if TYPE_CHECKING:
    from collections.abc import Callable

    from loopmux.messages import WorkerSpec
    from loopmux.pulse import Pulse

_SWITCH_INTERVAL = 0.001
"""Seconds after which a computing thread hands the interpreter over: the default 5 ms would delay every message."""
_LONGEST_DETAIL = 2_000
"""Bytes of a detail on standard output: whoever reads it takes lines of a limited length."""
_DAMAGED = (
    "its environment lacks something or is damaged: `loopmux env verify` says what, `loopmux env build --anew` builds "
    "it again, and SIGHUP has a running launcher use that"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    standard.complete()
    options = _parser().parse_args(arguments)
    out = _own_output()
    try:
        return int(options.run(options, out))
    except LoopmuxError as error:
        if options.debug:
            raise
        print(f"loopmux-worker: error: {error.message}", file=sys.stderr)
        return exitcodes.of(error)
    except KeyboardInterrupt:
        return exitcodes.INTERRUPTED
    except BrokenPipeError:
        return exitcodes.FAILURE  # the reader of our output left early (`… | head`): there is nobody to tell
    except Exception as error:
        if options.debug:
            raise
        print(f"loopmux-worker: error: {_told(error)} (--debug shows where)", file=sys.stderr)
        return exitcodes.FAILURE
    finally:
        logs.end()
        _close(out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("loopmux-worker", description="Serves a base model and its adapters to a broker.")
    parser.add_argument(
        "--spec", metavar="FILE", help="what to serve, as JSON (messages.WorkerSpec); - is standard input"
    )
    parser.add_argument("--parent-pid", type=int, metavar="PID", help="end when this process, the parent, has ended")
    parser.add_argument(
        "--pulse-fd", type=int, default=-1, metavar="N", help="give signs of life in this inherited file of one byte"
    )
    parser.add_argument(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="the least that is logged (%(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    adapter = commands.add_parser("run-adapter", help="answer one prompt in this process, without a broker")
    adapter.add_argument("--prompt", required=True, metavar="TEXT", help="what to answer")
    adapter.add_argument("--base-model", required=True, metavar="DIR", help="a model's directory, or its hub id")
    adapter.add_argument("--adapter-dir", metavar="DIR", help="an adapter's directory, or that of a merged model")
    adapter.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens (%(default)s)")
    adapter.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (%(default)s)")
    adapter.add_argument(
        "--model-type",
        choices=["instruct", "base"],
        default="instruct",
        help="instruct: chat template; base: plain text (%(default)s)",
    )
    adapter.add_argument("--system-prompt", metavar="TEXT", help="goes in front of the prompt")
    adapter.add_argument("--torch-threads", type=_positive, metavar="N", help="default: torch's own choice")
    adapter.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    adapter.set_defaults(run=_run_adapter)
    probe = commands.add_parser("probe", help="print as JSON what this interpreter offers")
    probe.add_argument("--engine", choices=["auto", "echo"], default="auto", help="echo needs no torch")
    probe.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    probe.set_defaults(run=_probe)
    return parser


def _positive(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1")


def _check_text(name: str, text: str | None) -> None:
    """Refuse bytes of the command line that were no UTF-8: Python hands them on as lone surrogates."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00
        raise BadRequestError(
            f"{name} is not UTF-8: found byte 0x{byte:02x} at character {error.start}; convert it first"
        ) from error


def _own_output() -> TextIO:
    """The real standard output for us alone; for everybody else it becomes standard error."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    os.dup2(2, 1)
    return own


def _close(out: TextIO) -> None:
    try:
        out.close()
    except OSError:
        pass  # the reader left early (a launcher that ended, a pipe into head), or the disk is full, which was said


def _probe(options: argparse.Namespace, out: TextIO) -> int:
    from loopmux_worker.probe import probe

    if options.engine != "echo":
        _prepare_libraries()
    report = probe(models=options.engine != "echo")
    print(json.dumps(report), file=out)
    return 0 if report["ok"] else exitcodes.FAILURE


def _run_adapter(options: argparse.Namespace, out: TextIO) -> int:
    from loopmux.messages import Generate, Sampling
    from loopmux_worker.oneshot import one_shot, spec_for

    logs.set_up("warning")
    _check_text("the prompt", options.prompt)
    _check_text("the system prompt", options.system_prompt)
    _prepare_libraries()
    spec = spec_for(
        options.base_model, options.adapter_dir, options.model_type, options.system_prompt, options.torch_threads
    )

    sampling = Sampling(temperature=options.temperature)
    generate = Generate(prompt=options.prompt, max_new_tokens=options.max_new_tokens, sampling=sampling)
    generate.check()  # now, not after the weights are loaded

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    one_shot(spec, generate, write)
    print(file=out)
    return 0


def _serve(options: argparse.Namespace, out: TextIO) -> int:
    if options.spec is None:
        _parser().error("--spec is missing")
    if options.parent_pid is not None:
        from loopmux_worker.parent import die_with_parent

        die_with_parent(options.parent_pid)
    from loopmux.codec import shorten
    from loopmux.pulse import Pulse

    logs.set_up(options.log_level)

    def progress(phase: str, detail: str, **more: str) -> None:
        line = {"phase": phase, "detail": shorten(detail, _LONGEST_DETAIL), **more}
        print(json.dumps(line), file=out, flush=True)

    try:
        spec = _read_spec(options.spec)
        code = _work(spec, progress, Pulse(options.pulse_fd))
    except Exception as error:
        progress("failed", _told(error))
        raise
    # Everything is closed or, deep in a step, not worth waiting for; unloading torch would take up to a second more
    logs.end()
    _close(out)
    sys.stderr.flush()
    os._exit(code)


def _told(error: Exception) -> str:
    """An error in words; of code that cannot be imported with what to look at."""
    if isinstance(error, LoopmuxError):
        return error.message
    text = f"{type(error).__name__}: {error}"
    damaged = any(isinstance(cause, ImportError | SyntaxError) for cause in causes(error))
    return f"{text}; {_DAMAGED}" if damaged else text


def _read_spec(name: str) -> WorkerSpec:
    from loopmux.codec import FieldError, build
    from loopmux.messages import WorkerSpec

    where = "standard input" if name == "-" else name
    try:
        text = _from_input() if name == "-" else Path(name).read_text(encoding="utf-8")
        return build(WorkerSpec, json.loads(text), strict=True)
    except FieldError as error:
        raise ConfigError(f"the specification in {where}: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"the specification in {where} cannot be read: {error}") from error


def _from_input() -> str:
    # Where the end of the input tells that the parent died, it has to stay open: the specification is one line there
    return sys.stdin.read() if sys.platform == "linux" else sys.stdin.readline()


def _work(spec: WorkerSpec, progress: Callable[..., None], pulse: Pulse) -> int:
    from loopmux.cadence import LEAVE_PATIENTLY
    from loopmux.keys import credentials
    from loopmux_worker.engine import freed, memory, open_engine

    shown = credentials(spec.endpoint)  # before the engine is opened, which takes long: it may be wrong
    if spec.engine != "echo":
        _prepare_libraries()
        logs.prepare()
    freed.keep()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    progress("loading", f"engine {spec.engine}")
    with memory.explained("the worker started", "its threads and messages"):
        from loopmux_worker.server import Worker

        engine = open_engine(spec, progress)
        freed.give_back()
        worker = Worker(spec, engine, pulse, shown)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    signal.signal(signal.SIGUSR1, lambda *_: worker.stop(LEAVE_PATIENTLY))
    # The kernel may hand a signal to a computing thread: only this wakes the main one, whose the handlers are
    signal.set_wakeup_fd(worker.bell, warn_on_full_buffer=False)
    description = engine.describe()
    for one in description.left_out:
        progress("left_out", one.reason, model=one.id)
    count = len(description.models)
    ready = f"{count} model{'s' if count > 1 else ''} on {description.engine}"
    try:
        worker.run(joined=lambda: progress("ready", ready))
    except EngineError as error:  # it hangs or has died: waiting for what it leaves behind might never end
        progress("failed", error.message)
        print(f"loopmux-worker: error: {error.message}", file=sys.stderr)
        return exitcodes.FAILURE
    finally:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)  # it leaves already, and there is nothing to wake
        worker.close()
    return 0


def _prepare_libraries() -> None:
    """Progress bars and advice of libraries are not for the readers of our output, nor their folders for /tmp."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and (cache := _cache_folder()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)  # torch makes this folder as soon as it is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # between transformers and peft, for their authors


def _cache_folder() -> Path | None:
    try:
        return caches.folder("torch")
    except (OSError, RuntimeError):
        return None  # a user without a home: torch's own choice has to do


if __name__ == "__main__":
    sys.exit(main())
