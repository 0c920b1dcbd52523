"""MCP servers as tool sources: one made with the official SDK, one that is published, and bad ones."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mcp
import mcp.types
import psutil
import pytest

from fakebroker import wait_until
from loopmux import loop, mcpsession
from loopmux.errors import (
    BadRequestError,
    ConnectionLostError,
    DeadlineExceededError,
    LoopmuxError,
    ProtocolError,
)
from loopmux.mcp import MCPServer
from loopmux.tools import Tool, collect
from scripted import AsyncScriptedClient, ScriptedClient, call, turn

SHOP = [sys.executable, str(Path(__file__).parents[1] / "mcpshop.py")]
DEAF = ["sh", "-c", "cat >/dev/null"]
"""Reads everything and says nothing; ends with its input."""


@contextmanager
def over_http(port: int = 0) -> Iterator[str]:
    """The shop's URL."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        port, number = listening.getsockname()[1], listening.fileno()
        process = subprocess.Popen([*SHOP, str(number)], pass_fds=[number])
    try:
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def stdio() -> Iterator[MCPServer]:
    with MCPServer(SHOP, name="shop", env={"SHOP_TOKEN": "secret"}) as server:
        process = psutil.Process(asyncio.run(server.call("pid", {})))
        yield server
    assert not process.is_running()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with over_http() as where:
        yield where


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[MCPServer]:
    with MCPServer(url, name="shop") as server:
        yield server


@pytest.fixture(params=["stdio", "http"])
def shop(request: pytest.FixtureRequest) -> MCPServer:
    made: MCPServer = request.getfixturevalue(request.param)
    return made


def results(server: MCPServer, *calls: Any, **settings: Any) -> list[str]:
    """What a model reads of some calls, one turn each."""
    client = ScriptedClient([*(turn("", made) for made in calls), turn("done")])
    out = loop.run(client, "go", tools=[server], **settings)
    assert out.text == "done"
    return [message["content"] for message in out.messages if message["role"] == "tool"]


def tools(server: MCPServer) -> dict[str, Tool]:
    return collect([server])


def test_its_tools(shop: MCPServer) -> None:
    found = tools(shop)
    assert list(found) == [
        f"shop_{name}" for name in ("add", "stock_find", "picture", "variable", "order", "pid", "hang", "die")
    ]
    add = found["shop_add"]
    assert add.description == "Add two numbers."
    assert add.parameters["required"] == ["a", "b"]
    assert add.danger == "warning"
    assert add.problems({"a": 1, "b": "2"}) == 'b: found "2", expected a whole number'


def test_a_loop(shop: MCPServer) -> None:
    client = ScriptedClient([turn("", call("shop_add", a=12, b=30)), turn("It is 42.")])
    out = loop.run(client, "go", tools=[shop])
    assert out.messages[2]["content"] == "42"
    assert out.tool_log[0]["result"] == 42


def test_an_async_loop(shop: MCPServer) -> None:
    calls = [call("shop_add", f"c{n}", a=n, b=n) for n in range(4)]
    client = AsyncScriptedClient([turn("", *calls), turn("done")])
    out = asyncio.run(loop.arun(client, "go", tools=[shop]))
    assert [entry["result"] for entry in out.tool_log] == [0, 2, 4, 6]


def test_loops_in_threads_share_it(shop: MCPServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(results, shop, *[call("shop_add", a=n, b=0)] * 3) for n in range(4)]
    assert [job.result() for job in jobs] == [[str(n)] * 3 for n in range(4)]


def test_results_of_all_kinds(shop: MCPServer) -> None:
    assert results(
        shop,
        call("shop_stock_find", name="lamp"),
        call("shop_picture", name="lamp"),
        call("shop_variable", name="HOME_OF_NOBODY"),
        call("shop_order", count=1),
        call("shop_order", count="one"),
    ) == [
        '{"name": "lamp", "price": 2.5}',
        "the lamp:\n[left out: image of the type image/png, which is no text]",
        "not set",
        "Error: Error executing tool order: the shop is closed",
        'Error: bad arguments for shop_order: count: found "one", expected a whole number',
    ]


def test_a_process_gets_the_variables_it_is_given_and_no_others(
    stdio: MCPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert results(stdio, call("shop_variable", name="SHOP_TOKEN")) == ["secret"]
    assert results(stdio, call("shop_variable", name="LOOPMUX_ENDPOINT")) == ["not set"]


def test_its_own_name_goes_in_front_unless_another_is_given(url: str) -> None:
    with MCPServer(url) as server:
        assert "the_shop_add" in tools(server)
    with MCPServer(url, name="") as server:
        assert "add" in tools(server)


def test_some_of_its_tools(url: str) -> None:
    with MCPServer(url, name="s", include=["add", "die"], exclude=["die"], danger=lambda name: "safe") as server:
        assert [(name, tool.danger) for name, tool in tools(server).items()] == [("s_add", "safe")]
    with (
        MCPServer(url, exclude=["pit"]) as server,
        pytest.raises(BadRequestError, match=r"has no tool 'pit' to include or exclude: did you mean 'pid'"),
    ):
        server.tools()


def test_names_that_no_model_can_write(url: str) -> None:
    with (
        MCPServer(url, name="my shop") as server,
        pytest.raises(BadRequestError, match=r"the MCP server 'my shop' .*'my shop_add'.*exclude=\['add'\]"),
    ):
        server.tools()


def test_two_servers_with_tools_of_one_name_keep_the_transcript(shop: MCPServer) -> None:
    with pytest.raises(BadRequestError, match=r"two tools are named 'shop_add'.*MCPServer\(…, name=") as caught:
        loop.run(ScriptedClient([]), "go", tools=[shop, shop])
    assert caught.value.messages == [{"role": "user", "content": "go"}]


GONE = "Error: ConnectionLostError: the MCP server 'shop' ("


def pid(server: MCPServer) -> int:
    number: int = asyncio.run(server.call("pid", {}))
    return number


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def only(expected: set[int]) -> bool:
    """Whether we have no other children, as soon as those that have ended are collected."""
    give_up = time.monotonic() + 30
    while not children() <= expected and time.monotonic() < give_up:
        time.sleep(0.01)
    return children() <= expected


async def begin_a_call_and_give_it_up(server: MCPServer) -> None:
    opening = asyncio.create_task(server.call("pid", {}))
    while not server._session._opening.locked():
        await asyncio.sleep(0.001)
    opening.cancel()


def test_a_server_that_ends_is_opened_again_by_the_next_call_but_not_by_every_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mcpsession, "_AGAIN", 600.0)  # however slow the machine is
    before = children()
    with MCPServer(SHOP, name="shop") as server, ThreadPoolExecutor(4) as pool:
        psutil.Process(pid(server)).kill()
        while server._session._client is not None:  # nobody asks for anything meanwhile
            time.sleep(0.001)
        asyncio.run(begin_a_call_and_give_it_up(server))
        (again,) = set(pool.map(pid, [server] * 4))  # who comes at the same time finds it opened once
        assert only(before | {again})
        assert again in children()
        waiting = [pool.submit(asyncio.run, server.call("hang", {})) for _ in range(3)]
        died, later = results(server, call("shop_die"), call("shop_add", a=1, b=2))
        assert died.startswith(GONE + SHOP[0])
        assert died.endswith("its last words: out of paper): find out why it ended; a later call opens it again")
        assert later.startswith(GONE)
        assert [type(job.exception(30)) for job in waiting] == [ConnectionLostError] * 3
        assert only(before)
        with pytest.raises(ConnectionLostError, match="is gone") as caught:
            loop.run(ScriptedClient([]), "go", tools=[server])
        assert caught.value.messages == [{"role": "user", "content": "go"}]


def test_a_server_that_cannot_be_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcpsession, "_AGAIN", 600.0)
    program = Path(shutil.copy(SHOP[1], tmp_path))
    with MCPServer([SHOP[0], str(program)], name="shop") as server:
        program.unlink()
        makes = [call("shop_die"), call("shop_add", a=1, b=2), call("shop_add", a=1, b=2)]
        died, tried, later = results(server, *makes, max_failures=9)
    assert died.startswith(GONE)
    assert "cannot be opened (" in tried
    assert "No such file or directory): see that the command starts a server" in tried
    assert "is gone (" in later


def test_a_server_behind_a_url_that_dies_and_comes_back() -> None:
    with over_http() as url, MCPServer(url, name="shop") as server:
        (died,) = results(server, call("shop_die"))
        assert f"the MCP server 'shop' ({url}) is gone" in died
        with over_http(int(re.findall(r":(\d+)/", url)[0])):
            assert results(server, call("shop_add", a=1, b=2)) == ["3"]


def test_a_server_behind_a_url_that_has_forgotten_the_session(url: str) -> None:
    """It was started anew while nobody asked."""

    async def forgotten(_: mcp.Client) -> None:
        raise mcp.MCPError(code=mcp.types.INVALID_REQUEST, message="Session terminated")

    async def unknown(_: mcp.Client) -> None:
        raise mcp.MCPError(code=mcp.types.INVALID_PARAMS, message="Unknown tool: session_list")

    with MCPServer(url, name="shop") as server:
        session = server._session
        first = session._client
        with pytest.raises(ConnectionLostError, match=r"is gone \(Session terminated\): find out why"):
            session.portal.call(session.ask, "anything", forgotten)
        assert results(server, call("shop_add", a=1, b=2)) == ["3"]
        second = session._client
        assert second is not first
        with pytest.raises(ProtocolError, match="Unknown tool"):
            session.portal.call(session.ask, "anything", unknown)
        assert session._client is second


def test_a_call_that_is_never_answered(shop: MCPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = shop.tools()
    monkeypatch.setattr(shop._session, "timeout", 0.1)
    out = loop.run(ScriptedClient([turn("", call("shop_hang")), turn("done")]), "go", tools=[*listed])
    content = out.messages[2]["content"]
    assert "asked for a call of 'hang', did not answer within 0.1 s: see whether it hangs, or give it more" in content
    monkeypatch.undo()
    assert results(shop, call("shop_add", a=1, b=2)) == ["3"]  # the connection lives on


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (["loopmux-no-such-command"], "No such file or directory: 'loopmux-no-such-command'"),
        ([sys.executable, "-c", "raise SystemExit('no such zone')"], "Connection closed; its last words: no such zone"),
        (["echo", "hello"], "Connection closed"),
        ("http://127.0.0.1:1/mcp", "ConnectError: .*see that a server for streamable HTTP runs there"),
    ],
)
def test_what_cannot_be_opened(target: Any, said: str) -> None:
    with pytest.raises(ConnectionLostError, match=rf"the MCP server .* cannot be opened \(.*{said}"), MCPServer(target):
        pass


def test_a_process_that_never_answers() -> None:
    before = children()
    with pytest.raises(DeadlineExceededError, match=r"did not answer within 0\.2 s: see that the command starts"):
        MCPServer(DEAF, timeout=0.2).__enter__()
    assert only(before)


def test_a_url_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = MCPServer(f"http://127.0.0.1:{silent.getsockname()[1]}/mcp?key=secret", timeout=0.2)
        with pytest.raises(DeadlineExceededError, match=r"/mcp' did not answer within 0\.2 s"), server:
            pass


def test_a_server_may_be_opened_again_also_by_asyncio(url: str) -> None:
    server = MCPServer(url)

    async def main() -> int:
        async with server:
            total: int = await server.call("add", {"a": 1, "b": 2})
        return total

    assert [asyncio.run(main()) for _ in range(2)] == [3, 3]
    with server:
        assert tools(server)


def test_a_task_that_is_cancelled_while_it_opens_a_server_leaves_it_closed(url: str) -> None:
    server = MCPServer(url)

    async def opening() -> None:
        async with server:
            pass

    async def main() -> None:
        task = asyncio.create_task(opening())
        await asyncio.sleep(0)  # it has begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    with pytest.raises(BadRequestError, match="is not open"):
        server.tools()


def test_a_server_outside_of_its_block() -> None:
    server = MCPServer(DEAF)
    with pytest.raises(BadRequestError, match=r"the MCP server .* is not open: use it inside of its `with` block"):
        server.tools()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_a_signal_as_the_event_loop_of_a_server_starts_leaves_nothing(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anyio import from_thread

    begin, left = from_thread.run_eventloop, threading.Event()

    def interrupted(*words: Any, **more: Any) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        left.wait(0.2)  # who does not wait for what was begun
        begin(*words, **more)

    def heard(number: int, frame: object) -> None:
        raise raised

    before = signal.signal(signal.SIGINT, heard)
    threads = set(threading.enumerate())
    monkeypatch.setattr(from_thread, "run_eventloop", interrupted)
    try:
        with pytest.raises(raised) as caught:
            MCPServer(SHOP).__enter__()
    finally:
        left.set()
        signal.signal(signal.SIGINT, before)
    wait_until(lambda: set(threading.enumerate()) <= threads, "its threads have ended")
    assert caught.tb  # and not because nobody knows of them any more


def test_a_server_is_opened_once_at_a_time(stdio: MCPServer) -> None:
    with pytest.raises(BadRequestError, match="is open already"):
        stdio.__enter__()


def test_a_forked_child_leaves_its_parents_server_alone() -> None:
    with MCPServer(SHOP, name="shop") as server:
        [add] = [tool for tool in server.tools() if tool.name == "shop_add"]
        child = os.fork()
        if child == 0:
            good = False
            try:
                signal.alarm(60)  # the test's own limit does not end it
                with pytest.raises(BadRequestError, match=r"is not open: .* in the process that opened it"):
                    server.tools()
                with pytest.raises(BadRequestError, match="is not open"):
                    asyncio.run(add.function(a=1, b=2))
                server.close()
                with server:
                    good = asyncio.run(server.call("add", {"a": 1, "b": 2})) == 3
            finally:
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert asyncio.run(server.call("add", {"a": 1, "b": 2})) == 3


@pytest.mark.parametrize(
    ("target", "settings", "said"),
    [
        ("", {}, "expected a command such as"),
        ([], {}, "expected a command such as"),
        ("python 'a", {}, "No closing quotation"),
        ("http://host/mcp", {"env": {"A": "b"}}, "env= is for a command"),
        ("python", {"headers": {"A": "b"}}, "headers= for a URL"),
        ("python", {"timeout": None}, "timeout: found None, expected seconds above 0"),
    ],
)
def test_what_is_no_server(target: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        MCPServer(target, **settings)


def test_without_the_sdk_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(LoopmuxError, match=r"pip install '\.\[mcp\]'"):
        MCPServer(DEAF).__enter__()


def test_a_published_server_started_as_a_user_would() -> None:
    with MCPServer(f"{sys.executable} -m mcp_server_time --local-timezone UTC", name="time") as clock:
        noon = {"source_timezone": "Europe/Paris", "time": "12:00", "target_timezone": "Asia/Tokyo"}
        right, wrong = results(
            clock, call("time_convert_time", **noon), call("time_get_current_time", timezone="Atlantis")
        )
        with pytest.raises(
            ProtocolError, match=r"the MCP server 'time' .* asked for a call of 'sub', answered with an error"
        ):
            asyncio.run(clock.call("sub", {}))
    assert '"timezone": "Asia/Tokyo"' in right
    assert wrong.startswith("Error: ")
    assert "Atlantis" in wrong


def test_what_a_process_writes_to_its_standard_error_does_not_fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcpsession, "_LONGEST_LOG", 2000)
    with MCPServer(SHOP, name="shop") as server:
        log = server._session._log.fileno()
        Path(f"/proc/{pid(server)}/fd/2").write_text("a line for a call\n" * 200)
        pid(server)
        assert os.fstat(log).st_size == 0
        assert fcntl.fcntl(log, fcntl.F_GETFL) & os.O_APPEND  # it goes on at the beginning
        (died,) = results(server, call("shop_die"))
        assert "its last words: out of paper" in died
        assert os.fstat(log).st_size == len("out of paper\n")
