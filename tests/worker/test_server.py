import sys
import threading
import time
from contextlib import contextmanager

import pytest

from enginekit import until
from loopmux.codec import Limits, decode, pack, unpack
from loopmux.errors import ConfigError, ProtocolError
from loopmux.messages import End, Failure, Generate, Heartbeat, ModelSpec, Tok, WorkerSpec
from loopmux.wire import HEADER_SIZE, Header, Kind, unpack_tokens
from loopmux_worker.driver import Driver
from loopmux_worker.engine import open_engine
from loopmux_worker.engine.base import fitting
from loopmux_worker.engine.echo import EchoEngine, echo_text, echo_token
from loopmux_worker.server import Worker
from workerpeer import PATIENCE, FakeBroker

REQUEST, OTHER = b"r" * 16, b"o" * 16


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/b"


@pytest.fixture
def broker(endpoint):
    made = FakeBroker(endpoint)
    yield made
    made.close()


@contextmanager
def serving(endpoint, engine=None, joined=lambda: None, **echo):
    """A worker in a thread; checks that it leaves in time and leaves nothing behind."""
    spec = WorkerSpec("w1", endpoint, (ModelSpec("echo"),), engine="echo", slots=8, echo=echo)
    outcome = []

    def run(worker):
        try:
            worker.run(joined)
        except Exception as error:  # noqa: BLE001 - handed to the test
            outcome.append(error)

    others = set(threading.enumerate())  # engines of earlier tests may still be ending
    with Worker(spec, engine or open_engine(spec, lambda *_: None)) as worker:
        worker.outcome = outcome
        thread = threading.Thread(target=run, args=(worker,))
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()
    until(lambda: "engine" not in {t.name for t in set(threading.enumerate()) - others}, "the end of its engine")


def ids(messages):
    return [i for m in messages for i in unpack_tokens(m.tokens)]


def test_register_run_stream_end(broker, endpoint):
    with serving(endpoint, tokens=50):
        register = broker.welcome()
        assert (register.name, register.role, register.slots, register.engine) == ("w1", "worker", 8, "echo")
        assert [m.id for m in register.models] == ["echo"]
        broker.run(REQUEST, Generate(prompt="hi"))
        tokens, end = broker.output(REQUEST)
        assert ids(tokens) == [echo_token(REQUEST, i) for i in range(50)]
        assert [m.header.seq for m in tokens] == [sum(m.header.arg for m in tokens[:i]) for i in range(len(tokens))]
        assert "".join(unpack(Tok, m.body).text for m in tokens) == "".join(echo_text(i) for i in ids(tokens))
        assert (end.kind, end.header.seq, end.header.attempt) == (Kind.END, 50, 1)
        ended = unpack(End, end.body)
        assert (ended.finish_reason, ended.model, ended.worker) == ("stop", "echo", "w1")


def test_a_long_search_path_and_one_that_is_no_text_keep_nobody_from_registering(broker, endpoint, monkeypatch):
    monkeypatch.setattr("sys.path", ["/caf\udce9", *sys.path, *(f"/{n}" for n in range(300)), "/long" * 10_000])
    with serving(endpoint):
        report = broker.expect(Kind.REGISTER).body
    paths = decode(report, Limits(array=256, map=256, size=16 * 1024))["sys_path"]  # as the broker does
    assert paths[0] == "/caf�"
    assert len(paths) == 250


def test_what_a_list_of_the_report_has_no_room_for_is_left_out():
    notes = [f"{n}: " + "é" * 100 for n in range(100)]
    told = fitting(notes, 8192)
    assert told == notes[: len(told)]
    assert 8192 - 300 < len(pack(told)) <= 8192 + 3
    assert fitting(["a \ud800 and \udce9", "b"], 100) == ["a � and �", "b"]


def test_it_is_ready_when_the_broker_knows_it(broker, endpoint, monkeypatch):
    monkeypatch.setattr("loopmux_worker.server._ALONE", 3 * PATIENCE)
    ready = threading.Event()
    with serving(endpoint, joined=ready.set):
        broker.expect(Kind.REGISTER)
        assert not ready.is_set()
        broker.welcome()
        assert ready.wait(PATIENCE)


def test_it_is_ready_without_a_broker_too_after_a_while(endpoint, monkeypatch):
    monkeypatch.setattr("loopmux_worker.server._ALONE", 0.05)
    ready = threading.Event()
    with serving(endpoint, joined=ready.set):
        assert ready.wait(PATIENCE)


def test_it_says_that_it_has_a_request_before_that_can_end_it(broker, endpoint, monkeypatch):
    """The broker blames no request for the end of a worker that has not acknowledged it."""

    def end(driver, command):
        raise RuntimeError("the end of this worker")

    with serving(endpoint) as worker:
        broker.welcome()
        monkeypatch.setattr(Driver, "put", end)
        broker.run(REQUEST, Generate(prompt="hi"), attempt=2)
        ended = time.monotonic() + PATIENCE
        while not worker.outcome:
            assert time.monotonic() < ended
            time.sleep(0.01)
        with pytest.raises(AssertionError, match="no message"):
            broker.receive(0.5)
    assert [header.attempt for header in broker.acknowledged] == [2]
    assert [str(error) for error in worker.outcome] == ["the end of this worker"]


def test_a_resumed_request_continues_at_its_prefix(broker, endpoint):
    with serving(endpoint, tokens=20):
        broker.welcome()
        prefix = tuple(echo_token(REQUEST, i) for i in range(7))
        broker.run(REQUEST, Generate(prompt="hi"), attempt=2, prefix=prefix)
        tokens, end = broker.output(REQUEST)
        assert (tokens[0].header.seq, end.header.seq) == (7, 20)
        assert [*prefix, *ids(tokens)] == [echo_token(REQUEST, i) for i in range(20)]


def test_stop_answers_with_cancelled_and_the_engine_is_free(broker, endpoint):
    with serving(endpoint, rate=50, tokens=10**6):
        broker.welcome()
        broker.run(REQUEST, Generate(prompt="hi", max_new_tokens=10**6))
        first = broker.expect(Kind.TOK)
        broker.send(Kind.STOP, REQUEST, attempt=1, arg=1)
        tokens, cancelled = broker.output(REQUEST)
        failure = unpack(Failure, cancelled.body)
        assert (cancelled.kind, failure.code) == (Kind.CANCELLED, "cancelled")
        assert cancelled.header.seq == len(ids([first, *tokens])) == failure.usage.completion_tokens
        broker.run(OTHER, Generate(prompt="hi", max_new_tokens=1))
        assert broker.output(OTHER)[1].kind is Kind.END
        broker.beats.clear()
        while not broker.beats:
            with pytest.raises(AssertionError, match="no message"):
                broker.receive(0.3)
        assert unpack(Heartbeat, broker.beats[-1].route).running == 0


def test_many_streams_at_once_are_exact(broker, endpoint):
    requests = [bytes([i]) * 16 for i in range(1, 21)]
    with serving(endpoint, rate=200, tokens=40):
        broker.welcome()
        for request in requests:
            broker.send(Kind.RUN, request, route={"model": "echo"}, body=Generate(prompt="x"), attempt=1)
        streams = {request: [] for request in requests}
        ended = 0
        while ended < len(requests):
            message = broker.receive()
            if message.kind is Kind.TOK:
                streams[message.header.request] += unpack_tokens(message.tokens)
            elif message.kind is Kind.END:
                ended += 1
        assert all(tokens == [echo_token(r, i) for i in range(40)] for r, tokens in streams.items())


def test_what_a_step_gives_its_streams_travels_together(broker, endpoint):
    requests = [bytes([i]) * 16 for i in range(1, 9)]
    long = Generate(prompt="x", max_new_tokens=5_000)  # so that all of them run for a while, however they are started
    with serving(endpoint, tokens=5_000):
        broker.welcome()
        for request in requests:
            broker.send(Kind.RUN, request, route={"model": "echo"}, body=long, attempt=1)
        for _ in requests:
            while broker.receive().kind is not Kind.END:
                pass
    assert broker.largest >= len(requests)


def test_a_request_whose_output_takes_its_time_is_acknowledged(broker, endpoint):
    with serving(endpoint, tokens=5, first_delay=1.5):
        broker.welcome()
        broker.run(REQUEST, Generate(prompt="x"))
        assert broker.output(REQUEST)[1].kind is Kind.END
        assert broker.acknowledged == [Header(Kind.RUNACK, REQUEST, attempt=1)]


def test_bad_requests_fail_alone(broker, endpoint):
    with serving(endpoint, tokens=5):
        broker.welcome()
        for generate, model, code in [
            (Generate(prompt="x"), "nobody", "model_not_found"),
            (Generate(), "echo", "bad_request"),
        ]:
            broker.run(REQUEST, generate, model=model)
            tokens, error = broker.output(REQUEST)
            assert (tokens, error.kind, unpack(Failure, error.body).code) == ([], Kind.ERROR, code)
        broker.send(Kind.RUN, REQUEST, route={"model": "echo"}, raw=b"\x93", attempt=1)
        assert unpack(Failure, broker.output(REQUEST)[1].body).code == "bad_request"
        broker.run(REQUEST, Generate(prompt="x"))
        assert broker.output(REQUEST)[1].kind is Kind.END


def test_an_engine_that_raises_fails_what_ran_and_goes_on(broker, endpoint):
    with serving(endpoint, tokens=20, raise_after=10):
        broker.welcome()
        for _ in range(2):
            broker.run(REQUEST, Generate(prompt="x"))
            tokens, error = broker.output(REQUEST)
            failure = unpack(Failure, error.body)
            assert (error.kind, failure.code) == (Kind.ERROR, "engine")
            assert "raise_after" in failure.message
            assert len(ids(tokens)) == error.header.seq == 8  # the step that raised lost its two tokens
        broker.run(REQUEST, Generate(prompt="x", max_new_tokens=4))
        assert broker.output(REQUEST)[1].kind is Kind.END


def test_malformed_messages_of_a_broker_are_ignored(broker, endpoint):
    with serving(endpoint, tokens=5):
        broker.welcome()
        broker._router.send_multipart([broker.peer, b"junk"])
        broker._router.send_multipart([broker.peer, b"LM\2" + bytes(32), b"x"])
        broker.send(Kind.WELCOME, route={"version": "one"})
        broker.run(REQUEST, Generate(prompt="x"))
        assert broker.output(REQUEST)[1].kind is Kind.END


def test_a_restarted_broker_says_what_becomes_of_the_work(endpoint):
    first = FakeBroker(endpoint)
    with serving(endpoint, rate=20, tokens=10**6):
        first.welcome()
        first.run(REQUEST, Generate(prompt="x", max_new_tokens=10**6))
        first.expect(Kind.TOK)
        first.close()
        second = FakeBroker(endpoint, epoch=b"f" * 8)
        try:
            assert second.welcome().held == 1
            held = second.expect(Kind.HELD)
            assert (held.header.request, held.header.attempt) == (REQUEST, 1)
            second.send(Kind.RESET, REQUEST, attempt=1)
            second.run(OTHER, Generate(prompt="x", max_new_tokens=3))
            tokens, end = second.output(OTHER)
            assert (end.kind, ids(tokens)) == (Kind.END, [echo_token(OTHER, i) for i in range(3)])
        finally:
            second.close()


def test_a_broken_connection_loses_no_token(endpoint):
    first = FakeBroker(endpoint)
    with serving(endpoint, rate=100, tokens=60):
        first.welcome()
        first.run(REQUEST, Generate(prompt="x"))
        assert unpack_tokens(first.expect(Kind.TOK).tokens) == [echo_token(REQUEST, 0)]
        first.send(Kind.TOKACK, REQUEST, attempt=1, arg=1)
        first.send(Kind.STOP, OTHER, attempt=1)
        while first.receive().kind is not Kind.CANCELLED:  # the answer to what came behind the acknowledgement
            pass
        first.close()
        same = FakeBroker(endpoint, epoch=b"e" * 8)
        try:
            same.welcome()
            held = same.expect(Kind.HELD)
            assert held.header.request == REQUEST
            assert held.header.seq in (0, 1)  # TOKACK may have been lost with the connection
            same.send(Kind.REPLAY, REQUEST, attempt=1, seq=1)
            found, end = same.output(REQUEST)
            by_position = {}
            for message in found:
                for i, token in enumerate(unpack_tokens(message.tokens)):
                    by_position[message.header.seq + i] = token
            assert end.kind is Kind.END
            assert {p: t for p, t in by_position.items() if p} == {i: echo_token(REQUEST, i) for i in range(1, 60)}
        finally:
            same.close()


def test_a_silent_broker_is_left_and_found_again(endpoint):
    broker = FakeBroker(endpoint, heartbeat=0.1)
    try:
        with serving(endpoint):
            broker.welcome()
            while (message := broker._router.recv_multipart())[1][3] != Kind.REGISTER:
                pass  # heartbeats, left unanswered
            broker.peer = message[0]
            broker.send(Kind.WHO)
            broker.welcome()
    finally:
        broker.close()


def test_a_terminal_is_repeated_until_it_is_acknowledged(broker, endpoint):
    with serving(endpoint, tokens=1):
        broker.welcome()
        broker.run(REQUEST, Generate(prompt="x"))
        broker.expect(Kind.TOK)
        first = broker.expect(Kind.END)
        assert broker.expect(Kind.END) == first
        broker.send(Kind.ENDACK, REQUEST, attempt=1)


def test_stopping_says_bye(broker, endpoint):
    with serving(endpoint) as worker:
        broker.welcome()
        started = time.monotonic()
        worker.stop()
        broker.expect(Kind.BYE)
        assert time.monotonic() - started < 2


def test_a_refused_worker_ends_with_the_reason(broker, endpoint):
    with serving(endpoint) as worker:
        broker.expect(Kind.REGISTER)
        broker.send(Kind.ERROR, body=Failure("protocol", "version 9 is spoken here"))
        while not worker.outcome:
            time.sleep(0.005)
        assert isinstance(worker.outcome[0], ProtocolError)
        assert "version 9" in worker.outcome[0].message


def test_a_broker_of_another_release_ends_it_with_what_to_do(broker, endpoint):
    with serving(endpoint) as worker:
        broker.expect(Kind.REGISTER)
        broker._router.send_multipart([broker.peer, b"LM\x09" + bytes(HEADER_SIZE)])
        while not worker.outcome:
            time.sleep(0.005)
        assert isinstance(worker.outcome[0], ProtocolError)
        assert "protocol version 9 is not spoken here" in worker.outcome[0].message
        assert "install one release everywhere" in worker.outcome[0].message


def test_a_fast_engine_waits_for_a_slow_wire(endpoint):
    """Nobody reads: what the engine makes is bounded by the queue, not by its speed."""
    spec = WorkerSpec("w", endpoint, (ModelSpec("echo"),), engine="echo")
    engine = EchoEngine(spec)
    rung = threading.Event()
    driver = Driver(engine, rung.set)
    from loopmux.messages import Run
    from loopmux_worker.engine.base import Job, Key
    from loopmux_worker.events import Submit

    driver.put(Submit(Job(Key(REQUEST, 1), Run("echo"), Generate(prompt="x", max_new_tokens=10**7, ignore_eos=True))))
    driver.start()
    assert rung.wait(PATIENCE)
    while not driver._events.full():
        time.sleep(0.005)
    made = engine.load().progress
    assert made <= 8 * 260
    assert driver.stop(PATIENCE)
    assert len(driver.drain()) <= 257


def test_too_many_models_to_announce(endpoint):
    spec = WorkerSpec("w", endpoint, tuple(ModelSpec(f"m{i}") for i in range(65)), engine="echo")
    with pytest.raises(ConfigError, match="65 models"):
        Worker(spec, open_engine(spec, lambda *_: None))


def test_an_impossible_endpoint():
    with serving("nonsense://x") as worker:
        while not worker.outcome:
            time.sleep(0.005)
        assert isinstance(worker.outcome[0], ConfigError)


def test_an_idle_worker_is_woken_by_each_request_and_by_each_token(endpoint, monkeypatch):
    """One that looked now and then would look too late: it has nothing else to do for minutes."""
    monkeypatch.setattr("loopmux_worker.server._LONGEST_POLL", 600.0)
    monkeypatch.setattr("loopmux_worker.session.ACKNOWLEDGE_WITHIN", 600.0)
    broker = FakeBroker(endpoint, heartbeat=600.0)
    try:
        with serving(endpoint, tokens=1):
            broker.welcome()
            for i in range(1, 51):
                request = bytes([i]) * 16
                broker.send(Kind.RUN, request, route={"model": "echo"}, body=Generate(prompt="x"), attempt=1)
                broker.expect(Kind.TOK)
                broker.output(request)
    finally:
        broker.close()
