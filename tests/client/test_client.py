from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import loopmux
from fakebroker import PATIENCE, FakeBroker, wait_until, whole_text
from loopmux import codec, connection, driver, keys, pump, wire
from loopmux.events import Asked, Fail, Finish
from loopmux.messages import Generate, SessionHint, Submit
from loopmux.wire import Kind, Message


@pytest.fixture(params=["ipc", "tcp"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeBroker]:
    endpoint = f"ipc://{tmp_path / 'b'}" if request.param == "ipc" else "tcp://127.0.0.1:*"
    with FakeBroker(endpoint) as fake:
        yield fake


@pytest.fixture
def ipc_broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(f"ipc://{tmp_path / 'b'}") as fake:
        yield fake


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loopmux-client"]


@pytest.fixture
def client(ipc_broker: FakeBroker) -> Iterator[loopmux.Client]:
    with loopmux.Client(ipc_broker.endpoint) as c:
        yield c


def ran(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, to its end; any warning of it is an error."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_generates_over_both_transports(broker: FakeBroker) -> None:
    with loopmux.Client(broker.endpoint, model="echo") as client:
        result = client.generate("Hello", max_new_tokens=300)
    assert result.text == whole_text(300)
    assert result.token_ids == tuple(range(300))
    assert (result.finish_reason, result.model, result.worker) == ("length", "echo", "fake-worker")
    assert result.usage == loopmux.Usage(3, 300)
    assert len(bytes.fromhex(result.request_id)) == 16
    broker.wait_for(Kind.BYE)
    assert broker.count(Kind.ENDACK) == 1


def test_streams_every_token_once_and_usage_last(client: loopmux.Client) -> None:
    with client.stream("Hello", max_new_tokens=250) as stream:
        events = list(stream)
        assert stream.text == whole_text(250)
    assert events[-1] == loopmux.Usage(3, 250)
    deltas = [e for e in events if isinstance(e, loopmux.TextDelta)]
    assert [i for d in deltas for i in d.token_ids] == list(range(250))
    assert stream.result.text == whole_text(250)
    assert list(stream) == []


def test_the_result_reads_the_rest_of_a_stream(client: loopmux.Client) -> None:
    with client.stream("Hello", max_new_tokens=100) as stream:
        first = next(stream)
        assert isinstance(first, loopmux.TextDelta)
        assert stream.result.text == whole_text(100)


def test_a_reader_that_stops_gets_no_more_than_its_window(client: loopmux.Client, ipc_broker: FakeBroker) -> None:
    with client.stream("Hello", max_new_tokens=1000) as stream:
        next(stream)
        assert client.generate("another", max_new_tokens=500).text == whole_text(500)  # the connection is not held up
        live = next(iter(ipc_broker.live.values()))
        # several PONGs later, each of which repeats the credit, nothing more was sent
        ipc_broker.wait_for(Kind.PING, ipc_broker.count(Kind.PING) + 3)
        assert live.sent == ipc_broker.window
        assert stream.result.text == whole_text(1000)


def test_lost_chunks_and_a_lost_end_are_asked_for_again(tmp_path: Path) -> None:
    lost: list[tuple[Kind, int]] = []

    def loses(message: Message) -> bool:
        place = (message.kind, message.header.seq)
        if message.kind not in (Kind.TOK, Kind.END) or place in lost or place[1] % 3:
            return False
        lost.append(place)
        return True

    with FakeBroker(f"ipc://{tmp_path / 'b'}", loses=loses) as broker, loopmux.Client(broker.endpoint) as client:
        assert client.generate("x", max_new_tokens=81).text == whole_text(81)
    assert {kind for kind, _ in lost} == {Kind.TOK, Kind.END}
    assert len(lost) > 5


def test_leaving_a_stream_early_cancels_it(client: loopmux.Client, ipc_broker: FakeBroker) -> None:
    with client.stream("Hello", model="hang") as stream:
        next(stream)
    assert ipc_broker.wait_for(Kind.CANCEL).header.request.hex() == stream.request_id
    ipc_broker.wait_for(Kind.ENDACK)
    with pytest.raises(loopmux.CancelledError, match="left before its end") as caught:
        _ = stream.result
    assert caught.value.partial_text == whole_text(4)


def test_a_stream_goes_on_when_nobody_holds_the_client(ipc_broker: FakeBroker) -> None:
    stream = loopmux.Client(ipc_broker.endpoint).stream("x", max_new_tokens=3)
    gc.collect()
    assert stream.result.text == whole_text(3)


def test_dropping_a_stream_cancels_it(client: loopmux.Client, ipc_broker: FakeBroker) -> None:
    stream = client.stream("Hello", model="hang")
    next(stream)
    del stream
    gc.collect()
    ipc_broker.wait_for(Kind.CANCEL)


def test_cancel_from_another_thread_ends_the_reader(client: loopmux.Client) -> None:
    with client.stream("Hello", model="hang") as stream:
        next(stream)
        threading.Thread(target=stream.cancel).start()
        with pytest.raises(loopmux.CancelledError, match="as asked") as caught:
            next(stream)
    assert caught.value.partial_text == whole_text(4)


@pytest.mark.parametrize("end", ["cancel", "leave"])
def test_the_end_of_a_stream_wakes_every_thread_that_reads_it(client: loopmux.Client, end: str) -> None:
    with client.stream("Hello", model="hang") as stream, ThreadPoolExecutor(3) as pool:
        next(stream)
        readers = [pool.submit(list, stream) for _ in range(2)] + [pool.submit(lambda: stream.result)]
        getattr(stream, end)()
        errors = [reader.exception(timeout=PATIENCE) for reader in readers]
    assert any(isinstance(error, loopmux.CancelledError) for error in errors)


def test_many_threads_share_a_client(client: loopmux.Client) -> None:
    def one(i: int) -> str:
        total = 20 + i
        if i % 2:
            return client.generate("x", max_new_tokens=total).text[len(whole_text(total)) :]
        with client.stream("x", max_new_tokens=total) as stream:
            text = "".join(e.text for e in stream if isinstance(e, loopmux.TextDelta))
        return text[len(whole_text(total)) :] or ("" if text == whole_text(total) else "differs")

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(one, range(200))) == {""}


def test_errors_of_the_broker_arrive_with_their_details(client: loopmux.Client) -> None:
    with pytest.raises(loopmux.OverloadedError, match="queue is full") as caught:
        client.generate("x", model="overloaded")
    error = caught.value
    assert (error.retry_after, error.retryable, error.model) == (1.5, True, "overloaded")
    assert len(error.request_id or "") == 32


def test_an_undecodable_chunk_is_an_error_of_its_request_alone(client: loopmux.Client, ipc_broker: FakeBroker) -> None:
    with pytest.raises(loopmux.ProtocolError, match="undecodable"):
        client.generate("x", model="garbage")
    ipc_broker.wait_for(Kind.ENDACK)
    assert client.generate("x", max_new_tokens=5).text == whole_text(5)


def test_a_silent_engine_ends_at_the_deadline(client: loopmux.Client, ipc_broker: FakeBroker) -> None:
    client.status()  # it is connected: the tokens are there long before the deadline
    with pytest.raises(TimeoutError, match=r"deadline of 1 s passed; 4 tokens") as caught:
        client.generate("x", model="hang", timeout=1.0)
    assert isinstance(caught.value, loopmux.DeadlineExceededError)
    assert caught.value.partial_text == whole_text(4)
    ipc_broker.wait_for(Kind.CANCEL)


def test_an_idle_stream_ends_by_its_idle_timeout(client: loopmux.Client, ipc_broker: FakeBroker) -> None:
    with (
        pytest.raises(loopmux.DeadlineExceededError, match="idle_timeout"),
        client.stream("x", model="hang", idle_timeout=0.1) as stream,
    ):
        list(stream)
    ipc_broker.wait_for(Kind.CANCEL)


def test_nobody_there(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'nobody'}"
    with loopmux.Client(endpoint, connect_timeout=0.2) as client:
        for call in (lambda: client.generate("x"), client.status):
            with pytest.raises(ConnectionError, match="start one with `loopmux up`") as caught:
                call()
            assert endpoint in str(caught.value)
            assert isinstance(caught.value, loopmux.ConnectionLostError)


def test_a_broker_that_starts_later_is_found(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'late'}"
    with loopmux.Client(endpoint) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, "x", max_new_tokens=3)
        with FakeBroker(endpoint):
            assert waiting.result(PATIENCE).text == whole_text(3)


def test_a_restarted_broker_gets_what_was_under_way(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'b'}"
    with loopmux.Client(endpoint) as client, ThreadPoolExecutor(2) as pool:
        with FakeBroker(endpoint) as first:
            mute = pool.submit(client.generate, "x", model="mute", max_new_tokens=7)
            hang = pool.submit(client.generate, "x", model="hang")
            first.wait_for(Kind.SUBMIT, 2)
            first.wait_for(Kind.PING, first.count(Kind.PING) + 2)  # by then the chunk of `hang` was read
        with FakeBroker(endpoint, epoch=b"epoch--2") as second:
            second.wait_for(Kind.ATTACH, 2)
            again = {codec.unpack(Submit, s.message.route).model: s.message for s in second.seen if s.message.body}
            assert (again["mute"].header.seq, again["hang"].header.seq) == (0, 4)
            assert again["hang"].tokens == wire.pack_tokens([0, 1, 2, 3])
            client.close()
            with pytest.raises(loopmux.CancelledError, match="client was closed") as caught:
                hang.result(PATIENCE)
            assert caught.value.partial_text == whole_text(4)
            with pytest.raises(loopmux.CancelledError, match="client was closed"):
                mute.result(PATIENCE)


def test_a_new_broker_is_greeted_as_soon_as_it_is_there(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'b'}"
    with loopmux.Client(endpoint, model="m") as client:
        with FakeBroker(endpoint, heartbeat=60):  # nobody would ask it for a long time
            client.generate("x", max_new_tokens=1)
        with FakeBroker(endpoint, heartbeat=60, epoch=b"epoch--2") as second:
            second.wait_for(Kind.HELLO)
            client.generate("x", max_new_tokens=1)


def test_models_and_status(client: loopmux.Client, ipc_broker: FakeBroker) -> None:
    assert [m.id for m in client.models()] == ["echo"]
    assert client.status().epoch == ipc_broker.epoch


def test_hints_reach_the_broker(client: loopmux.Client, ipc_broker: FakeBroker) -> None:
    client.status()
    client.hint("s1", "waiting_on_tool", 2.5)
    assert codec.unpack(SessionHint, ipc_broker.wait_for(Kind.SESSION).route) == SessionHint(
        "s1", "waiting_on_tool", 2.5
    )
    with pytest.raises(loopmux.BadRequestError, match="one of waiting_on_tool, done"):
        client.hint("s1", "sleeping")  # type: ignore[arg-type]


def test_no_connection_is_opened_for_a_hint(ipc_broker: FakeBroker) -> None:
    with loopmux.Client(ipc_broker.endpoint) as client:
        client.hint("s", "done")
        assert not _threads()
    with pytest.raises(loopmux.ConnectionLostError, match="closed: make another"):
        client.hint("s", "done")


def test_a_tool_loop_that_is_left_at_exit_says_nothing(ipc_broker: FakeBroker) -> None:
    program = f"""
        import loopmux

        client = loopmux.Client({ipc_broker.endpoint!r}, max_new_tokens=300)
        events = client.iter_tools("x", tools=[])
        while not isinstance(next(events), loopmux.TextDelta):
            pass
    """
    done = ran(program)
    assert (done.returncode, done.stderr) == (0, "")


_LONG, _NO_TEXT = "n" * 5000, "bad\ud800"
MISTAKEN: list[tuple[str, tuple[object, ...], str]] = [
    ("hint", (_LONG, "done"), "session: found a text of 5000 characters"),
    ("hint", (_NO_TEXT, "done"), "session: found the lone surrogate"),
    ("hint", (None, "done"), "session: found None, expected a text"),
    ("hint", ("s", "done", "5"), "expected: found '5' (str), expected a number or nothing"),
    ("load_adapter", (5, "n", "/x"), "model: found 5 (int), expected a text"),
    ("load_adapter", ("m", None, "/x"), "name: found None, expected a text"),
    ("load_adapter", ("m", _LONG, "/x"), "name: found a text of 5000 characters"),
    ("load_adapter", ("m", _NO_TEXT, "/x"), "name: found the lone surrogate"),
    ("load_adapter", ("m", "n", f"/{_LONG}"), "folder: found a text of 5001 characters"),
    ("load_adapter", ("m", "n", None), "folder: found None, expected a path"),
    ("load_adapter", ("m", "n", "~nobody-of-this-name/x"), "folder: found '~nobody-of-this-name/x' (str), expected a"),
    ("unload_adapter", ("m", None), "name: found None, expected a text"),
    ("unload_adapter", (_LONG, "n"), "model: found a text of 5000 characters"),
    ("drain", (None,), "worker: found None, expected a text"),
    ("drain", (_LONG,), "worker: found a text of 5000 characters"),
]


@pytest.mark.parametrize(("method", "arguments", "says"), MISTAKEN)
def test_what_a_broker_would_take_for_malformed_is_refused_at_its_caller(
    client: loopmux.Client, ipc_broker: FakeBroker, method: str, arguments: tuple[object, ...], says: str
) -> None:
    with client.stream("x", max_new_tokens=200) as stream:
        next(stream)
        with pytest.raises(loopmux.BadRequestError, match=f"^{re.escape(says)}"):
            getattr(client, method)(*arguments)
        assert stream.result.text == whole_text(200)

    async def other() -> None:
        async with loopmux.AsyncClient(ipc_broker.endpoint) as client:
            await getattr(client, method)(*arguments)

    with pytest.raises(loopmux.BadRequestError, match=f"^{re.escape(says)}"):
        asyncio.run(other())


@pytest.mark.parametrize("within", ["60", None, float("nan"), -1])
def test_a_worker_gets_no_impossible_time_to_leave(client: loopmux.Client, within: object) -> None:
    with pytest.raises(loopmux.BadRequestError, match=r"^within: found "):
        client.drain("w", within=within)  # type: ignore[arg-type]


def test_options_travel(client: loopmux.Client, ipc_broker: FakeBroker) -> None:
    mine = client.with_options(model="m", temperature=0, session="s")
    mine.generate(messages=[{"role": "user", "content": "Hi"}], max_new_tokens=1, stop="END", top_k=5)
    submitted = ipc_broker.wait_for(Kind.SUBMIT)
    route = codec.unpack(Submit, submitted.route)
    body = codec.unpack(Generate, submitted.body, codec.BODY_LIMITS)
    assert (route.model, route.session, route.max_new_tokens, route.prompt_size) == ("m", "s", 1, 2)
    assert (body.sampling.temperature, body.sampling.top_k, body.stop) == (0.0, 5, ("END",))
    assert body.messages == ({"role": "user", "content": "Hi"},)


def test_a_copy_with_options_shares_and_does_not_close_the_connection(
    client: loopmux.Client, ipc_broker: FakeBroker
) -> None:
    with client.with_options(max_new_tokens=2) as copy:
        assert copy.generate("x").text == whole_text(2)
    assert client.generate("x", max_new_tokens=3).text == whole_text(3)
    assert len(ipc_broker.peers) == 1


def test_closing_is_final_and_harmless(ipc_broker: FakeBroker) -> None:
    client = loopmux.Client(ipc_broker.endpoint)
    client.generate("x", max_new_tokens=1)
    client.close()
    client.close()
    ipc_broker.wait_for(Kind.BYE)
    with pytest.raises(loopmux.ConnectionLostError, match="closed: make another"):
        client.generate("x")
    assert not _threads()


def test_closing_while_no_broker_is_there_yet_says_so(tmp_path: Path) -> None:
    client = loopmux.Client(f"ipc://{tmp_path / 'b'}", connect_timeout=60)
    stream = client.stream("x")
    client.close()
    with pytest.raises(loopmux.CancelledError, match="the client was closed"):
        list(stream)


def test_an_unclosed_client_is_cleaned_up_when_collected(ipc_broker: FakeBroker) -> None:
    client = loopmux.Client(ipc_broker.endpoint)
    client.generate("x", max_new_tokens=1)
    del client
    gc.collect()
    ipc_broker.wait_for(Kind.BYE)
    wait_until(lambda: not _threads(), "thread gone")


def test_an_unclosed_client_does_not_hang_the_interpreter(ipc_broker: FakeBroker) -> None:
    program = f"""
        import loopmux
        client = loopmux.Client({ipc_broker.endpoint!r})
        print(client.generate("x", max_new_tokens=2).text)
        stream = client.stream("x", model="hang")
        next(stream)
    """
    done = ran(program)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, whole_text(2).strip(), "")
    ipc_broker.wait_for(Kind.BYE)


@pytest.mark.parametrize("away", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_belongs_to_this_process_says_so_to_who_would_send_it_to_another(
    ipc_broker: FakeBroker, away: Callable[[object], object]
) -> None:
    def refused(*bound: object) -> None:
        for one in bound:
            with pytest.raises(TypeError, match=r"belongs to this process .* copied: (make|read|run) \w+"):
                away(one)

    async def story() -> None:
        async with loopmux.AsyncClient(ipc_broker.endpoint) as client, client.stream("x") as stream:
            refused(client, stream, client.iter_tools("x", tools=[]))

    with loopmux.Client(ipc_broker.endpoint) as client, client.stream("x") as stream:
        refused(client, client.with_options(), stream, client.iter_tools("x", tools=[]))
    asyncio.run(story())


def test_threads_that_outlive_the_main_one_hear_at_once_that_their_client_was_closed(ipc_broker: FakeBroker) -> None:
    program = """
        import sys, threading
        import loopmux

        client = loopmux.Client(sys.argv[1], model="hang")
        stream = client.stream("x")
        next(stream)

        def read():
            try:
                stream.result
            except loopmux.LoopmuxError as error:
                print(type(error).__name__, repr(error.partial_text))

        def close():
            threading.main_thread().join()
            client.close()

        for act in (read, close):
            threading.Thread(target=act).start()
    """
    done = ran(program, ipc_broker.endpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"CancelledError {whole_text(4)!r}\n", "")


_LEFT_WAITING = """
    import atexit, sys, threading, time

    def join():
        thread.join()
        print("joined")

    if sys.argv[2:]:
        atexit.register(join)
    import loopmux

    client = loopmux.Client(sys.argv[1], model="hang")
    stream = client.stream("x")
    next(stream)

    def call():
        try:
            stream.result
        except loopmux.LoopmuxError as error:
            print(type(error).__name__)
            raise SystemExit

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
"""


@pytest.mark.parametrize(("told", "joins"), [("", []), ("ConnectionLostError\njoined\n", ["join"])])
def test_a_daemon_thread_that_waits_at_exit_hears_of_it_only_if_it_is_joined(
    ipc_broker: FakeBroker, told: str, joins: list[str]
) -> None:
    done = ran(_LEFT_WAITING, ipc_broker.endpoint, *joins)
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")
    ipc_broker.wait_for(Kind.CANCEL)
    ipc_broker.wait_for(Kind.BYE)


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_a_program_that_may_open_no_more_files_gets_an_error_and_goes_on(ipc_broker: FakeBroker, kind: str) -> None:
    program = f"""
        import asyncio, inspect, os, resource, loopmux

        async def call():
            client = loopmux.{kind}({ipc_broker.endpoint!r}, max_new_tokens=2, timeout=60)
            try:
                result = client.generate("x")
                return (await result if inspect.isawaitable(result) else result).text
            except loopmux.ConnectionLostError as error:
                return "too few" if "Too many open files" in error.message else error.message
            finally:
                if inspect.isawaitable(closed := client.close()):
                    await closed

        async def main():
            print(await call())
            held = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            while held:
                print(await call())
                os.close(held.pop())
            print(await call())

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, *others = done.stdout.splitlines()
    refused = others.count("too few")
    assert refused > 0
    assert others == ["too few"] * refused + [first] * (len(others) - refused)
    assert first == others[-1] == whole_text(2)


def test_one_that_gets_no_thread_leaves_nothing_that_hangs(tmp_path: Path) -> None:
    program = f"""
        import gc, threading, loopmux
        client = loopmux.Client("ipc://{tmp_path / "nobody"}")
        with_threads, threading.Thread.start = threading.Thread.start, lambda _: 1 / 0
        try:
            client.status()
        except ZeroDivisionError:
            print("no thread")
        threading.Thread.start = with_threads
        gc.collect()
        try:
            client.with_options().generate("x", timeout=0.1)
        except loopmux.DeadlineExceededError:
            print("deadline")
    """
    done = ran(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no thread\ndeadline\n", "")


@pytest.mark.parametrize("instant", ["before the thread", "with the thread"])
def test_a_keyboard_interrupt_in_the_first_call_leaves_nothing_behind(
    ipc_broker: FakeBroker, monkeypatch: pytest.MonkeyPatch, instant: str
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if instant == "with the thread":
            start(thread)
        raise KeyboardInterrupt

    with loopmux.Client(ipc_broker.endpoint, max_new_tokens=2) as client:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                client.generate("x")
        assert client.generate("x").text == whole_text(2)
        assert len(_threads()) == 1
    assert not _threads()


def test_a_keyboard_interrupt_of_close_leaves_nothing_behind(
    ipc_broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = [KeyboardInterrupt()]
    stop = pump.Pump.stop

    def interrupted(one: pump.Pump) -> None:
        if interrupts:
            raise interrupts.pop()
        stop(one)

    monkeypatch.setattr(pump.Pump, "stop", interrupted)
    client = loopmux.Client(ipc_broker.endpoint, max_new_tokens=2)
    client.generate("x")
    with pytest.raises(KeyboardInterrupt):
        client.close()
    assert not _threads()


@pytest.mark.parametrize("instant", [(driver, "Link"), (threading.Thread, "start")])
def test_a_handler_of_a_signal_may_close_the_client_in_its_first_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: tuple[object, str]
) -> None:
    client = loopmux.Client(f"ipc://{tmp_path / 'nobody'}")
    errors: list[BaseException] = []

    def call() -> None:
        real = getattr(*instant)
        monkeypatch.setattr(*instant, lambda *args: (client.close(), real(*args))[1])
        try:
            client.status()
        except loopmux.LoopmuxError as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    with monkeypatch.context() as monkeypatch:
        thread.start()
        thread.join(PATIENCE)
    assert [type(error) for error in errors] == [loopmux.ConnectionLostError]
    assert not _threads()


def test_each_caller_gets_an_error_of_its_own_where_the_connection_ends(tmp_path: Path) -> None:
    """A tool loop notes its transcript on the error that ends it."""
    told: list[object] = []
    ended = pump.Pump(f"ipc://{tmp_path / 'nobody'}", 5.0, None)
    ended.start(Asked(b"one", 0.0), told.append)
    ended.start(Asked(b"two", 0.0), told.append)
    ended.stop()
    ended.start(Asked(b"three", 0.0), told.append)
    errors = [item.error for item in told if isinstance(item, Fail)]
    assert [type(error) for error in errors] == [loopmux.ConnectionLostError] * 3
    assert len(set(map(id, errors))) == 3


def test_who_begins_something_at_exit_is_told_as_late_as_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = pump.Pump(f"ipc://{tmp_path / 'nobody'}", 5.0, None)
    ended.stop()
    told: list[object] = []
    untold: list[float] = []
    monkeypatch.setattr(pump, "_exiting", lambda: True)
    monkeypatch.setattr(time, "sleep", lambda seconds: told or untold.append(seconds))
    ended.start(Asked(b"one", 0.0), told.append)
    assert untold == [2.0]
    assert len(told) == 1


def test_a_keyboard_interrupt_of_a_question_leaves_nothing_behind(tmp_path: Path) -> None:
    with loopmux.Client(f"ipc://{tmp_path / 'nobody'}", connect_timeout=float("inf")) as client:
        pump = client._channel.pump()

        def interrupt() -> None:
            wait_until(lambda: bool(pump._core._questions), "it was asked")
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            client.status()
        assert not pump._sinks
        wait_until(lambda: not pump._core._questions, "nobody waits")


def test_a_keyboard_interrupt_leaves_the_client_usable(ipc_broker: FakeBroker) -> None:
    with loopmux.Client(ipc_broker.endpoint) as client:
        interrupt = threading.Thread(
            target=lambda: (ipc_broker.wait_for(Kind.SUBMIT), os.kill(os.getpid(), signal.SIGINT))
        )
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            client.generate("x", model="hang")
        interrupt.join()
        ipc_broker.wait_for(Kind.CANCEL)
        assert client.generate("x", max_new_tokens=2).text == whole_text(2)


def test_a_keyboard_interrupt_as_the_outcome_comes_does_not_lose_it(
    client: loopmux.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(queue.SimpleQueue[object]):
        interrupted = False

        def get(self) -> object:  # type: ignore[override]
            item = super().get()
            if isinstance(item, Finish) and not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return item

    monkeypatch.setattr(queue, "SimpleQueue", Interrupted)
    stream = client.stream("x", max_new_tokens=20)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    results: list[loopmux.Result] = []
    reader = threading.Thread(target=lambda: results.append(stream.result), daemon=True)
    reader.start()
    reader.join(PATIENCE)
    assert [result.text for result in results] == [whole_text(20)]


def test_a_forked_child_has_a_connection_of_its_own(ipc_broker: FakeBroker) -> None:
    with loopmux.Client(ipc_broker.endpoint, max_new_tokens=2) as client:
        stream = client.stream("x", model="hang")
        next(stream)
        child = os.fork()
        if child == 0:
            good = False
            try:
                good = client.generate("x").text == whole_text(2)
                try:
                    next(stream)
                    good = False
                except loopmux.ConnectionLostError:
                    pass
                client.close()
            finally:
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.generate("x").text == whole_text(2)
        assert len(ipc_broker.peers) == 2
        stream.leave()


@pytest.mark.parametrize(
    "endpoint", ["nowhere", "ipc://", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "ipc:///" + "x" * 200]
)
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(loopmux.ConfigError):
        loopmux.Client(endpoint)


@pytest.mark.parametrize("time", [10**400, None, "5", float("nan"), True, 0, -1])
@pytest.mark.parametrize("kind", [loopmux.Client, loopmux.AsyncClient])
def test_a_connect_timeout_that_is_no_time(kind: Callable[..., object], time: object) -> None:
    with pytest.raises(loopmux.BadRequestError, match=r"^connect_timeout: found .*, expected a number of seconds"):
        kind(connect_timeout=time)


@pytest.mark.parametrize("time", [1e308, float("inf")])
def test_a_connect_timeout_may_be_any(tmp_path: Path, time: float) -> None:
    with loopmux.Client(f"ipc://{tmp_path / 'b'}", connect_timeout=time) as client:
        with client.stream("x", max_new_tokens=2) as stream, FakeBroker(client.endpoint):
            assert stream.result.text == whole_text(2)


def test_an_endpoint_that_zeromq_refuses(tmp_path: Path) -> None:
    path, key = keys.new("desk", tmp_path)
    with loopmux.Client("tcp://two words:7750", key=path, server_key=key.public) as client:
        with pytest.raises(loopmux.ConfigError, match="cannot connect"):
            client.generate("x")


def test_what_no_broker_takes_is_refused_beyond_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_WAITING", 2)
    with loopmux.Client(f"ipc://{tmp_path / 'nobody'}", connect_timeout=60) as client:
        first, second = client.stream("x"), client.stream("x")
        with pytest.raises(loopmux.OverloadedError, match=r"2 requests of .* bytes wait for the broker") as caught:
            client.generate("x")
        assert caught.value.retry_after is not None
        first.leave()
        second.leave()
