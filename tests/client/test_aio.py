from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import loopmux
from fakebroker import PATIENCE, FakeBroker, whole_text
from loopmux import codec, connection
from loopmux.events import Barred
from loopmux.link import Link
from loopmux.messages import Generate
from loopmux.wire import Kind


@pytest.fixture(params=["ipc", "tcp"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeBroker]:
    endpoint = f"ipc://{tmp_path / 'b'}" if request.param == "ipc" else "tcp://127.0.0.1:*"
    with FakeBroker(endpoint) as fake:
        yield fake


@pytest.fixture
def ipc_broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(f"ipc://{tmp_path / 'b'}") as fake:
        yield fake


def run(endpoint: str, story: Callable[[loopmux.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with loopmux.AsyncClient(endpoint) as client:
            await story(client)

    asyncio.run(main())


async def until(condition: Callable[[], bool], within: float = PATIENCE) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.002)


def test_generates_and_streams_over_both_transports(broker: FakeBroker) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        result = await client.generate("x", max_new_tokens=300)
        assert (result.text, result.token_ids) == (whole_text(300), tuple(range(300)))
        async with client.stream("x", max_new_tokens=150) as stream:
            events = [event async for event in stream]
        assert stream.text == stream.result.text == whole_text(150)
        assert events[-1] == loopmux.Usage(3, 150)
        assert [m.id for m in await client.models()] == ["echo"]
        await client.hint("s", "done")

    run(broker.endpoint, story)
    broker.wait_for(Kind.SESSION)
    broker.wait_for(Kind.BYE)


def test_many_tasks_share_a_client(ipc_broker: FakeBroker) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        results = await asyncio.gather(*(client.generate("x", max_new_tokens=20 + i) for i in range(200)))
        assert [r.text for r in results] == [whole_text(20 + i) for i in range(200)]

    run(ipc_broker.endpoint, story)
    assert len(ipc_broker.peers) == 1


@pytest.mark.parametrize("call", ["chat", "generate", "run_tools"])
def test_a_source_of_tools_that_takes_its_time_does_not_hold_up_the_event_loop(
    ipc_broker: FakeBroker, call: str
) -> None:
    class Source:
        def __init__(self) -> None:
            self.answers = threading.Event()

        def tools(self) -> list[loopmux.Tool]:
            assert self.answers.wait(PATIENCE), "the event loop waited"
            return [loopmux.Tool("far", "", {"type": "object"}, print)]

    async def story(client: loopmux.AsyncClient) -> None:
        source = Source()
        asyncio.get_running_loop().call_later(0.01, source.answers.set)
        match call:
            case "chat":
                await client.chat([{"role": "user", "content": "x"}], tools=[source])
            case "generate":
                await client.generate("x", tools=[source])
            case _:
                await client.run_tools("x", tools=[source])

    run(ipc_broker.endpoint, story)
    asked = codec.unpack(Generate, ipc_broker.wait_for(Kind.SUBMIT).body, codec.BODY_LIMITS)
    assert [tool["function"]["name"] for tool in asked.tools or ()] == ["far"]


def test_what_tasks_say_in_one_turn_of_the_loop_travels_together(tmp_path: Path) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        await client.generate("x", max_new_tokens=2)
        await client.generate("x", max_new_tokens=2)
        await asyncio.gather(*(client.generate("x", max_new_tokens=2) for _ in range(9)))

    with FakeBroker(f"ipc://{tmp_path / 'b'}", heartbeat=60) as quiet:  # no PING is due, which would travel with them
        run(quiet.endpoint, story)
        assert [Kind.ENDACK, Kind.SUBMIT] in quiet.frames
        assert [Kind.SUBMIT] * 9 in quiet.frames


def test_cancelling_a_task_cancels_its_request(ipc_broker: FakeBroker) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        task = asyncio.create_task(client.generate("x", model="hang"))
        await until(lambda: ipc_broker.count(Kind.SUBMIT) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: ipc_broker.count(Kind.CANCEL) == 1 and ipc_broker.count(Kind.ENDACK) == 1)
        assert (await client.generate("x", max_new_tokens=2)).text == whole_text(2)

    run(ipc_broker.endpoint, story)


def test_a_cancelled_wait_loses_no_event(ipc_broker: FakeBroker) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        texts = []
        async with client.stream("x", max_new_tokens=400) as stream:
            while True:
                waiting = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0)
                waiting.cancel()
                try:
                    event = await waiting
                except asyncio.CancelledError:
                    continue
                except StopAsyncIteration:
                    break
                if isinstance(event, loopmux.TextDelta):
                    texts.append(event.text)
        assert "".join(texts) == whole_text(400)

    run(ipc_broker.endpoint, story)


def test_leaving_a_stream_early_cancels_it(ipc_broker: FakeBroker) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        async with client.stream("x", model="hang") as stream:
            await anext(stream)
            with pytest.raises(loopmux.LoopmuxError, match="has not ended"):
                _ = stream.result
        await until(lambda: ipc_broker.count(Kind.ENDACK) == 1)
        with pytest.raises(loopmux.CancelledError, match="left before"):
            await stream.wait()

    run(ipc_broker.endpoint, story)


@pytest.mark.parametrize("end", ["cancel", "leave"])
def test_the_end_of_a_stream_wakes_every_task_that_reads_it(ipc_broker: FakeBroker, end: str) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        async with client.stream("x", model="hang") as stream:
            await anext(stream)
            readers = [asyncio.create_task(stream.wait()) for _ in range(2)]
            await asyncio.sleep(0)  # both wait now
            getattr(stream, end)()
            async with asyncio.timeout(PATIENCE):
                errors = await asyncio.gather(*readers, return_exceptions=True)
        assert [type(error) for error in errors] == [loopmux.CancelledError] * 2

    run(ipc_broker.endpoint, story)


def test_a_stream_that_nobody_holds_any_more_is_cancelled(ipc_broker: FakeBroker) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        async for _ in client.stream("x", model="hang"):
            break
        gc.collect()
        await until(lambda: ipc_broker.count(Kind.CANCEL) == 1)

    run(ipc_broker.endpoint, story)


def test_cancel_ends_the_reader(ipc_broker: FakeBroker) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        async with client.stream("x", model="hang") as stream:
            await anext(stream)
            stream.cancel()
            with pytest.raises(loopmux.CancelledError, match="as asked"):
                await anext(stream)

    run(ipc_broker.endpoint, story)


def test_a_reader_that_stops_gets_no_more_than_its_window(ipc_broker: FakeBroker) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        async with client.stream("x", max_new_tokens=1000) as stream:
            await anext(stream)
            pings = ipc_broker.count(Kind.PING)
            await until(lambda: ipc_broker.count(Kind.PING) > pings + 2)
            assert next(iter(ipc_broker.live.values())).sent == ipc_broker.window
            assert (await stream.wait()).text == whole_text(1000)

    run(ipc_broker.endpoint, story)


def test_deadline_and_nobody_there(ipc_broker: FakeBroker, tmp_path: Path) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        with pytest.raises(TimeoutError, match="deadline of 0"):
            await client.generate("x", model="hang", timeout=0.1)

    async def nobody() -> None:
        async with loopmux.AsyncClient(f"ipc://{tmp_path / 'nobody'}", connect_timeout=0.1) as client:
            with pytest.raises(loopmux.ConnectionLostError, match="loopmux up"):
                await client.generate("x")
            with pytest.raises(loopmux.ConnectionLostError, match="loopmux up"):
                await client.status()

    run(ipc_broker.endpoint, story)
    asyncio.run(nobody())


def test_a_client_follows_from_one_loop_to_the_next(ipc_broker: FakeBroker) -> None:
    client = loopmux.AsyncClient(ipc_broker.endpoint, max_new_tokens=2)

    async def call() -> str:
        return (await client.generate("x")).text

    assert asyncio.run(call()) == whole_text(2)
    assert asyncio.run(call()) == whole_text(2)
    asyncio.run(client.close())
    with pytest.raises(loopmux.ConnectionLostError, match="closed"):
        asyncio.run(call())


def test_an_unclosed_client_outlives_its_loop_harmlessly(ipc_broker: FakeBroker) -> None:
    program = f"""
        import asyncio, gc, loopmux

        async def main():
            client = loopmux.AsyncClient({ipc_broker.endpoint!r}, max_new_tokens=2)
            print((await client.generate("x")).text)

        asyncio.run(main())
        gc.collect()
        print("went on")
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"{whole_text(2)}\nwent on\n")
    assert done.stderr.count("ResourceWarning") == 1
    assert "`await client.close()`" in done.stderr


def test_one_that_nobody_holds_any_more_is_closed_while_the_loop_runs(ipc_broker: FakeBroker) -> None:
    async def main() -> None:
        client = loopmux.AsyncClient(ipc_broker.endpoint, max_new_tokens=2)
        await client.generate("x")
        with pytest.warns(ResourceWarning, match="not closed"):
            del client
        await until(lambda: ipc_broker.count(Kind.BYE) == 1)

    asyncio.run(main())


def test_a_stream_keeps_the_client_open_that_nobody_else_holds(ipc_broker: FakeBroker) -> None:
    async def main() -> None:
        stream = loopmux.AsyncClient(ipc_broker.endpoint).stream("x", max_new_tokens=300)
        gc.collect()
        assert (await stream.wait()).text == whole_text(300)
        with pytest.warns(ResourceWarning, match="not closed"):
            del stream
        await until(lambda: ipc_broker.count(Kind.BYE) == 1)

    asyncio.run(main())


def test_a_forked_child_leaves_its_parents_connection_alone(ipc_broker: FakeBroker) -> None:
    client = loopmux.AsyncClient(ipc_broker.endpoint, max_new_tokens=2)

    async def call() -> str:
        return (await client.generate("x")).text

    with asyncio.Runner() as runner:
        runner.run(call())
        child = os.fork()
        if child == 0:
            good = False
            try:
                signal.alarm(60)  # the test's own limit does not end it
                warnings.simplefilter("ignore")  # as errors they would keep pyzmq from closing what it finds unclosed
                good = asyncio.run(call()) == whole_text(2)
                del client
                gc.collect()
            finally:
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert runner.run(call()) == whole_text(2)
        assert len(ipc_broker.peers) == 2
        runner.run(client.close())


def test_closing_ends_what_runs(ipc_broker: FakeBroker) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        task = asyncio.create_task(client.generate("x", model="hang"))
        await until(lambda: ipc_broker.count(Kind.SUBMIT) == 1)
        await client.close()
        with pytest.raises(loopmux.CancelledError, match="client was closed"):
            await task

    run(ipc_broker.endpoint, story)


def test_a_question_that_is_cancelled_is_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        async with loopmux.AsyncClient(f"ipc://{tmp_path / 'nobody'}", connect_timeout=float("inf")) as client:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await client.status()
            driver = client._channel.driver()
            assert not driver._sinks
            assert not driver._core._questions

    asyncio.run(main())


def test_no_connection_is_opened_for_a_hint(ipc_broker: FakeBroker) -> None:
    async def main() -> None:
        client = loopmux.AsyncClient(ipc_broker.endpoint)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one that was opened would be said to be unclosed
            await client.hint("s", "done")
            del client
            gc.collect()
        async with loopmux.AsyncClient(ipc_broker.endpoint) as other:
            await other.generate("x", max_new_tokens=1)
        with pytest.raises(loopmux.ConnectionLostError, match="closed: make another"):
            await other.hint("s", "done")
        assert len(ipc_broker.peers) == 1

    asyncio.run(main())


def test_no_turn_is_left_behind_when_it_is_closed(ipc_broker: FakeBroker) -> None:
    failures: list[object] = []

    async def story(client: loopmux.AsyncClient) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        await client.generate("x", max_new_tokens=1)
        driver = client._channel.driver()
        driver._again = loop.call_soon(driver._turn)  # as if there was more to be taken
        driver._turn()  # the descriptor was faster
        await client.close()
        await asyncio.sleep(0)

    run(ipc_broker.endpoint, story)
    assert failures == []


@pytest.fixture
def elsewhere() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in another thread, and would say if it was touched from this one."""
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_stream_that_is_read_in_another_loop_says_so(
    ipc_broker: FakeBroker, elsewhere: asyncio.AbstractEventLoop
) -> None:
    async def story(client: loopmux.AsyncClient) -> None:
        stream = client.stream("x", max_new_tokens=2)
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            asyncio.run_coroutine_threadsafe(stream.wait(), elsewhere).result(PATIENCE)
        assert (await stream.wait()).text == whole_text(2)

    run(ipc_broker.endpoint, story)


def test_closing_from_another_loop_ends_what_runs_in_its_own(
    ipc_broker: FakeBroker, elsewhere: asyncio.AbstractEventLoop
) -> None:
    client = loopmux.AsyncClient(ipc_broker.endpoint)
    running = asyncio.run_coroutine_threadsafe(client.generate("x", model="hang"), elsewhere)
    asyncio.run(until(lambda: ipc_broker.count(Kind.SUBMIT) == 1))
    asyncio.run(client.close())
    with pytest.raises(loopmux.CancelledError, match="client was closed"):
        running.result(PATIENCE)
    asyncio.run(until(lambda: ipc_broker.count(Kind.BYE) == 1))


def test_a_new_broker_is_greeted_as_soon_as_it_is_there(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'b'}"

    async def story(client: loopmux.AsyncClient) -> None:
        with FakeBroker(endpoint, heartbeat=60):  # nobody would ask it for a long time
            await client.generate("x", max_new_tokens=1)
        with FakeBroker(endpoint, heartbeat=60, epoch=b"epoch--2") as second:
            await until(lambda: second.count(Kind.HELLO) > 0)
            await client.generate("x", max_new_tokens=1)

    run(endpoint, story)


def test_what_no_broker_takes_is_refused_beyond_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_WAITING", 2)

    async def story(client: loopmux.AsyncClient) -> None:
        waiting = [client.stream("x") for _ in range(2)]
        with pytest.raises(loopmux.OverloadedError, match=r"2 requests of .* bytes wait for the broker"):
            await client.generate("x")
        for one in waiting:
            one.leave()

    run(f"ipc://{tmp_path / 'nobody'}", story)


def test_one_that_is_barred_before_its_first_request_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    came = [Barred("no key")]
    monkeypatch.setattr(Link, "barred", "no key")
    monkeypatch.setattr(Link, "news", lambda _: came.pop() if came else None)

    async def story(client: loopmux.AsyncClient) -> None:
        for ask in (client.generate("x"), client.status()):
            with pytest.raises(loopmux.AuthError, match="no key"):
                await asyncio.wait_for(ask, PATIENCE)

    run(f"ipc://{tmp_path / 'b'}", story)
