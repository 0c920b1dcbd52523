import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from loopmux.messages import Generate, ModelSpec, Sampling, WorkerSpec
from loopmux.wire import Kind, unpack_tokens
from loopmux_worker.events import STOP_WITHIN
from loopmux_worker.oneshot import one_shot
from processes import running
from workerpeer import LOADING, PATIENCE, FakeBroker

PROGRAM = [sys.executable, "-m", "loopmux_worker"]
REQUEST, OTHER = b"r" * 16, b"o" * 16


@pytest.fixture
def broker(tmp_path):
    made = FakeBroker(f"ipc://{tmp_path}/b")
    yield made
    made.close()


def write_spec(folder, endpoint, **options):
    given = {"models": (ModelSpec("echo"),), "engine": "echo"} | options
    path = folder / "spec.json"
    path.write_text(json.dumps(asdict(WorkerSpec("w1", endpoint, **given))))
    return path


@contextmanager
def start(*arguments, **options):
    """The program, which does not outlive the block."""
    command = [*PROGRAM, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def run(*arguments, **variables):
    command = [*PROGRAM, *map(str, arguments)]
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE, env=environment)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files, of this test's own, and variables that lead there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch, imported by other tests, may have set it
    return folder, {"TMPDIR": folder, "XDG_CACHE_HOME": tmp_path / "cache"}


def wait(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_phases_serve_and_leave_on_sigterm(broker, tmp_path):
    with start("--spec", write_spec(tmp_path, broker.endpoint), "--parent-pid", os.getpid()) as process:
        register = broker.welcome()
        assert register.pid == process.pid
        broker.run(REQUEST, Generate(prompt="x", max_new_tokens=2))
        assert broker.output(REQUEST)[1].kind is Kind.END
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while (said := broker.receive()).kind is not Kind.BYE:
            assert said.kind is Kind.DRAIN  # the end is not acknowledged, so the request is still here
        out, err = process.communicate(timeout=PATIENCE)
        assert time.monotonic() - asked < 2
    assert process.returncode == 0
    assert [json.loads(line)["phase"] for line in out.splitlines()] == ["loading", "ready"]
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_who_is_asked_once_more_when_all_is_closed_ends_likewise(broker, tmp_path, number):
    again = f"""
        import os, sys
        from loopmux_worker import __main__, server

        class Asked(server.Worker):
            def close(self):
                super().close()
                os.kill(os.getpid(), {int(number)})

        server.Worker = Asked
        sys.exit(__main__.main(["--spec", {str(write_spec(tmp_path, broker.endpoint))!r}]))
    """
    command = [sys.executable, "-c", textwrap.dedent(again)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        broker.welcome()
        process.send_signal(number)
        broker.expect(Kind.BYE)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "failed" not in out
    assert not err


def test_one_whose_engine_hangs_ends_with_an_exit_code_that_says_so(broker, tmp_path):
    with start("--spec", write_spec(tmp_path, broker.endpoint)) as process:
        broker.welcome()
        broker.send(Kind.DIE)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert err.splitlines()[-1].endswith("its engine does not get on, and had it end")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("this is no Python", "SyntaxError: "),
        ("try: import nowhere\nexcept ImportError as e: raise RuntimeError('no zmq') from e", "RuntimeError: no zmq; "),
    ],
)
def test_what_cannot_be_imported_is_told_with_where_to_look(tmp_path, code, reason):
    (tmp_path / "zmq.py").write_text(code)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = run("--spec", write_spec(tmp_path, f"ipc://{tmp_path}/nobody"), PYTHONPATH=path)
    assert done.returncode == 1
    failed = json.loads(done.stdout.splitlines()[-1])
    assert failed["phase"] == "failed"
    assert failed["detail"].startswith(reason)
    for told in (failed["detail"], done.stderr):
        assert "`loopmux env verify` says what, `loopmux env build --anew` builds it again" in told


def test_the_specification_by_standard_input(broker, tmp_path):
    spec = write_spec(tmp_path, broker.endpoint).read_text()
    with start("--spec", "-", stdin=subprocess.PIPE) as process:
        process.stdin.write(spec)
        process.stdin.close()
        broker.welcome()
        process.send_signal(signal.SIGINT)
        broker.expect(Kind.BYE)
        process.stdout.read()
        process.stderr.read()
        assert process.wait(PATIENCE) == 0


def test_a_model_is_loaded_announced_and_served_and_a_broken_adapter_told(broker, tmp_path, tiny_model):
    """All that is left to this process: it ends soon upon SIGTERM, in the middle of a generation, too."""
    bad = shutil.copytree(tiny_model.adapters["red"], tmp_path / "bad")
    (bad / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    adapters = {"bad": bad, "red": tiny_model.adapters["red"]}
    models = (ModelSpec("base"), *(ModelSpec(name, adapter_dir=str(folder)) for name, folder in adapters.items()))
    spec = write_spec(
        tmp_path,
        broker.endpoint,
        models=models,
        engine="auto",
        base_model=str(tiny_model.base),
        torch_threads=1,
        kernels="torch",
    )
    with start("--spec", spec) as process:
        register = broker.welcome(LOADING)
        assert [m.id for m in register.models] == ["base", "red"]
        assert (register.adapters, register.slots, register.engine) == (("red",), 16, "slots")
        [left] = register.left_out
        answers = {}
        for name in ("base", "red", "base"):
            generate = Generate(prompt="hi", max_new_tokens=10, ignore_eos=True, sampling=Sampling(temperature=0))
            broker.run(REQUEST, generate, model=name)
            tokens, end = broker.output(REQUEST)
            ids = [i for message in tokens for i in unpack_tokens(message.tokens)]
            assert (end.kind, len(ids)) == (Kind.END, 10)
            assert answers.setdefault(name, ids) == ids
        assert answers["base"] != answers["red"]
        out, err = stopped_while_it_generates(broker, process, "base")
    said = [json.loads(line) for line in out.splitlines()]
    assert said[0]["phase"] == "loading"
    assert said[-3]["phase"] == "warming"
    assert said[-2:] == [
        {"phase": "left_out", "detail": left.reason, "model": "bad"},
        {"phase": "ready", "detail": "2 models on slots"},
    ]
    assert left.id == "bad"
    assert left.reason == f"{bad}: found an adapter of type 'IA3', served are LORA ones (DoRA and rsLoRA too)"
    [logged] = [json.loads(line) for line in err.splitlines()]
    assert (logged["event"], logged["model"], logged["reason"]) == ("model left out", "bad", left.reason)


def test_the_plain_engine_is_served_and_writes_nothing_to_standard_error(broker, tmp_path, tiny_model):
    spec = write_spec(
        tmp_path, broker.endpoint, models=(ModelSpec("m"),), engine="plain", base_model=str(tiny_model.base),
        torch_threads=1,
    )  # fmt: skip
    with start("--spec", spec) as process:
        broker.welcome(LOADING)
        out, err = stopped_while_it_generates(broker, process, "m")
    assert [json.loads(line)["phase"] for line in out.splitlines()][-2:] == ["warming", "ready"]
    assert err == ""


def stopped_while_it_generates(broker, process, model):
    """What a worker that is stopped in the middle of a generation has printed; it ends well.

    It takes the time that it says, for the broker, and what a process with torch takes to end on this machine.
    """
    broker.run(OTHER, Generate(prompt="hi", max_new_tokens=200, ignore_eos=True), model=model)
    broker.expect(Kind.TOK)
    process.terminate()
    while (said := broker.receive()).kind is not Kind.DRAIN:
        assert said.kind in (Kind.TOK, Kind.END)
    assert said.header.arg == round(1000 * STOP_WITHIN)
    printed = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    return printed


def parent_of_a_worker(spec, tmp_path):
    """A process that starts a worker as a launcher does, and tells its process id."""
    code = (
        "import os, subprocess, sys, time\n"
        f"p = subprocess.Popen({[*PROGRAM, '--spec', str(spec)]!r} + ['--parent-pid', str(os.getpid())])\n"
        f"open({str(tmp_path / 'pid')!r} + '.new', 'w').write(str(p.pid))\n"
        f"os.rename({str(tmp_path / 'pid')!r} + '.new', {str(tmp_path / 'pid')!r})\n"
        "time.sleep(600)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ties the two on Linux only")
def test_a_killed_parent_takes_the_worker_with_it(broker, tmp_path):
    parent = parent_of_a_worker(write_spec(tmp_path, broker.endpoint), tmp_path)
    try:
        worker = broker.welcome().pid
        assert worker == int((tmp_path / "pid").read_text())
    finally:
        parent.kill()
        parent.wait()
    wait(lambda: not running(worker))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ties the two on Linux only")
def test_a_parent_that_died_before_the_start_is_noticed(tmp_path):
    spec = write_spec(tmp_path, f"ipc://{tmp_path}/nobody")
    assert run("--spec", spec, "--parent-pid", "1" if os.getpid() != 1 else "2").returncode == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "w", "endpoint": "ipc:///x", "models": [{"id": "m"}], "slot": 3}', "slot: found an unknown key"),
        ('{"name": "w", "endpoint": "ipc:///x", "models": [{"id": 3}]}', "models[0].id: found 3 (int)"),
        ('{"name": "w"', "cannot be read"),
        ("[]", "expected a mapping"),
        ('{"name": "w", "endpoint": "ipc:///x", "models": [{"id": "m"}], "base_model": "/no/where"}', "no such folder"),
        ('{"name": "w", "endpoint": "ipc:///x", "models": [{"id": "m"}], "engine": "slots"}', "base_model is missing"),
        ('{"name": "w", "endpoint": "what://x", "models": [{"id": "m"}], "engine": "echo"}', "is neither ipc://"),
    ],
)
def test_a_bad_specification_is_a_bad_configuration(tmp_path, text, reason):
    path = tmp_path / "spec.json"
    path.write_text(text)
    done = run("--spec", path)
    assert done.returncode == 78
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["phase"] == "failed"
    assert reason in last["detail"]


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in run("--debug", "--spec", tmp_path / "missing.json").stderr


def test_usage():
    assert run().returncode == 2
    assert run("--spec", "x", "--log-level", "loud").returncode == 2
    assert "run-adapter" in run("--help").stderr + run("--help").stdout


def test_run_adapter_prints_clean_text_only_and_leaves_no_files(tiny_model, temporary):
    folder, variables = temporary
    adapter = str(tiny_model.adapters["red"])
    options = {"--prompt": "hello", "--base-model": tiny_model.base, "--adapter-dir": adapter, "--temperature": 0,
               "--max-new-tokens": 12, "--torch-threads": 1}  # fmt: skip
    shown = run("run-adapter", *(part for option in options.items() for part in option), **variables)
    texts = []
    spec = WorkerSpec("w", "", (ModelSpec("m", adapter_dir=adapter),), str(tiny_model.base), torch_threads=1)
    one_shot(spec, Generate(prompt="hello", max_new_tokens=12, sampling=Sampling(temperature=0)), texts.append)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == "".join(texts) + "\n"
    assert "".join(texts).strip()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "code", "reason"),
    [
        ({"--base-model": "/no/where"}, 78, "found no directory /no/where, expected an existing directory or a hub id"),
        ({"--adapter-dir": "/no/where"}, 78, "found no directory /no/where, expected an adapter's directory"),
        ({"--temperature": -1}, 2, "temperature: found -1.0, expected a value from 0 to 100"),
    ],
)
def test_run_adapter_refuses_with_one_line(tiny_model, changed, code, reason):
    options = {"--prompt": "x", "--base-model": tiny_model.base} | changed
    done = run("run-adapter", *(part for option in options.items() for part in option))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("loopmux-worker: error:")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_probe_reports_versions_and_devices_and_leaves_no_files(temporary):
    folder, variables = temporary
    done = run("probe", **variables)
    assert list(folder.iterdir()) == []
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["missing"]) == (0, True, [])
    assert {"torch", "transformers", "peft", "tokenizers", "pyzmq", "msgpack", "structlog", "loopmux"} <= set(
        report["packages"]
    )
    assert report["devices"][0].startswith("cpu")
    assert report["executable"] == sys.executable


def test_probe_without_memory_names_no_package_to_install():
    limited = f"ulimit -v 400000; exec {sys.executable} -m loopmux_worker probe"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, timeout=3 * PATIENCE)
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["missing"]) == (1, False, [])
    assert report["out_of_memory"]


def test_probe_names_what_is_missing_and_the_remedy(tmp_path):
    """An interpreter without any of our packages but the code itself."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}/client:{root}/worker"}
    bare = subprocess.run(
        [sys.executable, "-S", "-m", "loopmux_worker", "probe"], capture_output=True, text=True, env=environment
    )
    report = json.loads(bare.stdout)
    assert (bare.returncode, report["ok"]) == (1, False)
    remedies = {entry["name"]: entry["remedy"] for entry in report["missing"]}
    assert {"pyzmq", "msgpack", "structlog", "torch", "transformers", "peft"} <= set(remedies)
    assert remedies["torch"].endswith("-m pip install 'torch==2.13.0'")
    echo = subprocess.run(
        [sys.executable, "-S", "-m", "loopmux_worker", "probe", "--engine", "echo"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert "torch" not in {entry["name"] for entry in json.loads(echo.stdout)["missing"]}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prompt", b"ab\xff"), "the prompt is not UTF-8: found byte 0xff at character 2"),
        (("--prompt", "x", "--system-prompt", b"\xfe"), "the system prompt is not UTF-8: found byte 0xfe"),
        (("--prompt", "x", "--torch-threads", "0"), "expected a whole number from 1"),
    ],
)
def test_run_adapter_refuses_before_it_loads(tmp_path, arguments, told):
    command = [*PROGRAM, "run-adapter", "--base-model", str(tmp_path / "nowhere"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


WITHOUT_WEIGHTS = """
    import sys
    from dataclasses import replace
    from loopmux_worker import logs, oneshot
    from loopmux_worker.__main__ import main
    from loopmux_worker.engine.echo import EchoEngine

    def open_engine(spec, progress):
        logs.warning("looked at", base=spec.base_model)
        return EchoEngine(replace(spec, engine="echo"))

    oneshot.open_engine = open_engine
    sys.exit(main())
"""


def test_run_adapter_into_a_reader_that_left_or_a_full_disk(tmp_path):
    program = [sys.executable, "-c", textwrap.dedent(WITHOUT_WEIGHTS)]
    command = [*program, "run-adapter", "--prompt", "hi", "--base-model", str(tmp_path)]
    whole = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE)
    assert (whole.returncode, bool(whole.stdout.strip())) == (0, True)
    assert json.loads(whole.stderr)["base"] == str(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        left = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=3 * PATIENCE)
    finally:
        os.close(writer)
    assert (left.returncode, json.loads(left.stderr)["event"]) == (1, "looked at")
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        full_disk = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=3 * PATIENCE)
    assert full_disk.returncode == 1
    assert "No space left" in full_disk.stderr
    assert "Traceback" not in full_disk.stderr
