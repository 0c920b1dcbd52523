"""The tool server's client against a real HTTP server."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import pytest

from loopmux import loop
from loopmux.errors import AuthError, BadRequestError, ConnectionLostError, DeadlineExceededError, ProtocolError
from loopmux.tools import ToolError, schemas
from loopmux.toolserver import ToolServer
from scripted import ScriptedClient, call, turn
from toolhttp import serving

READ = {
    "name": "read_file",
    "description": "Read a file.",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
}


def test_a_call():
    with serving({"/call": (200, {"ok": True, "result": {"size": 3}, "error": None})}) as server:
        assert ToolServer(server.url, "secret").call("read_file", {"path": "a"}) == {"size": 3}
        assert server.seen == [("POST", "/call", "secret", {"name": "read_file", "args": {"path": "a"}})]


def test_without_a_token_no_header_is_sent():
    with serving({"/base/call": (200, {"ok": True, "result": 1})}) as server:
        ToolServer(server.url + "/base/").call("t", {})
        assert server.seen == [("POST", "/base/call", None, {"name": "t", "args": {}})]


def test_a_tool_that_fails():
    with (
        serving({"/call": (200, {"ok": False, "result": None, "error": "no such file"})}) as server,
        pytest.raises(ToolError, match=r"^no such file$"),
    ):
        ToolServer(server.url).call("read_file", {"path": "a"})


def test_a_tool_that_fails_with_an_error_status():
    with (
        serving({"/call": (500, {"ok": False, "error": "crashed"})}) as server,
        pytest.raises(ToolError, match=r"^crashed$"),
    ):
        ToolServer(server.url).call("read_file", {"path": "a"})


@pytest.mark.parametrize(
    "listing",
    [
        [READ],
        {"tools": [READ]},
        {"ok": True, "tools": [{"type": "function", "function": READ}]},
    ],
)
def test_a_server_that_lists_its_tools(listing: Any):
    with serving({"/tools": (200, listing)}) as server:
        source = ToolServer(server.url)
        assert schemas([source]) == [{"type": "function", "function": READ}]
        assert source.tools()[0].danger == "warning"


def test_danger_levels():
    listed = [READ | {"danger": "safe"}, {"name": "run_shell"}, {"name": "odd", "danger": "extreme"}]
    with serving({"/tools": (200, listed)}) as server:
        tools = ToolServer(server.url, danger=lambda name: "dangerous" if name == "run_shell" else "warning").tools()
    assert [t.danger for t in tools] == ["safe", "dangerous", "warning"]


def test_schemas_of_the_callers_for_a_server_that_lists_nothing():
    with serving({"/tools": (404, b"not here"), "/call": (200, {"ok": True, "result": "text"})}) as server:
        with pytest.raises(ProtocolError, match=r"does not list its tools \(GET /tools answered 404\).*schemas="):
            ToolServer(server.url).tools()
        (tool,) = ToolServer(server.url, schemas=[{"type": "function", "function": READ}]).tools()
        assert tool.function(path="a") == "text"


def test_the_whole_loop_over_http():
    answers = {"/tools": (200, [READ]), "/call": (200, {"ok": False, "error": "no such file"})}
    with serving(answers) as server:
        client = ScriptedClient([turn("", call("read_file", path="a")), turn("It is not there.")])
        out = loop.run(client, "read a", tools=[ToolServer(server.url)])
    assert out.messages[2]["content"] == "Error: no such file"
    assert out.tool_log[0]["error"] == "no such file"
    assert out.text == "It is not there."


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused(status: int):
    with serving({"/tools": (status, b""), "/call": (status, b"")}) as server:
        with pytest.raises(AuthError, match=f"{status}: the token was refused"):
            ToolServer(server.url, "wrong").tools()
        with pytest.raises(AuthError, match=f"{status}: no token was given"):
            ToolServer(server.url).call("t", {})


@pytest.mark.parametrize(
    "answer",
    [(200, b"<html>"), (200, []), (200, {"result": 1}), (200, {"ok": "yes"}), (502, b"Bad Gateway"), (302, b"")],
)
def test_an_answer_that_is_none(answer: tuple[int, Any]):
    with (
        serving({"/call": answer}) as server,
        pytest.raises(ProtocolError, match=rf'answered /call with {answer[0]} .*expected {{"ok"'),
    ):
        ToolServer(server.url).call("t", {})


NESTED = b"[" * 100_000


@pytest.mark.parametrize("answer", [(200, b"<html>"), (200, NESTED), (200, {"a": 1}), (200, ["read"]), (500, [])])
def test_a_listing_that_is_none(answer: tuple[int, Any]):
    with serving({"/tools": answer}) as server, pytest.raises(ProtocolError, match="expected a list of tool schemas"):
        ToolServer(server.url).tools()


def test_a_listed_tool_without_a_name():
    with (
        serving({"/tools": (200, [{"description": "?"}])}) as server,
        pytest.raises(ProtocolError, match="with a name"),
    ):
        ToolServer(server.url).tools()


def test_a_listed_tool_with_a_name_that_no_model_can_write():
    with (
        serving({"/tools": (200, [{"name": "read file"}])}) as server,
        pytest.raises(BadRequestError, match="read file"),
    ):
        ToolServer(server.url).tools()


def test_an_answer_that_is_too_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loopmux.toolserver._LARGEST_ANSWER", 1 << 20)
    with (
        serving({"/call": (200, b'"' + b"x" * (1 << 20) + b'"')}) as server,
        pytest.raises(ProtocolError, match="more than 1 MiB"),
    ):
        ToolServer(server.url).call("t", {})


def test_nobody_is_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConnectionLostError, match="is it running"):
            ToolServer(url).tools()


def test_a_server_that_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = ToolServer(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.05)
        with pytest.raises(DeadlineExceededError, match=r"within 0\.05 s"):
            server.tools()


def test_a_server_that_hangs_up():
    with socket.create_server(("127.0.0.1", 0)) as rude:

        def hang_up() -> None:
            rude.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(ConnectionLostError):
            ToolServer(f"http://127.0.0.1:{rude.getsockname()[1]}").call("t", {})
        thread.join()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8763",
        "ftp://host",
        "http://",
        "http:///path",
        "http://h:99999",
        "http://h:port",
        "http://[h",
        "http://a..b",
        f"http://{'x' * 64}.example",
        "http://a host",
        "http://h/größe",
        "http://h/a b",
    ],
)
def test_what_is_no_url(url: str):
    with pytest.raises(BadRequestError, match="tool server: found the URL"):
        ToolServer(url)


@pytest.mark.parametrize("timeout", [0, None, "30", float("nan")])
def test_what_is_no_time_limit(timeout: Any):
    with pytest.raises(BadRequestError, match=r"tool server: timeout: found .*, expected seconds above 0"):
        ToolServer("http://127.0.0.1:1", timeout=timeout)


def test_no_time_limit():
    with serving({"/tools": (200, [READ])}) as server:
        assert [tool.name for tool in ToolServer(server.url, timeout=float("inf")).tools()] == ["read_file"]


@pytest.mark.parametrize("token", ["two\r\nlines", "geheïm"])
def test_what_is_no_token(token: str):
    with pytest.raises(BadRequestError, match="a token with other characters than a header may have"):
        ToolServer("http://127.0.0.1:8763", token)


def test_a_token_that_is_no_text():
    with pytest.raises(BadRequestError, match="the token is a NoneType, expected a text"):
        ToolServer("http://127.0.0.1:8763", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [READ, "read", 5, ["read"]])
def test_what_is_no_list_of_schemas(given: Any):
    with pytest.raises(BadRequestError, match=r"found the schemas .*, expected a list of JSON schemas"):
        ToolServer("http://127.0.0.1:8763", schemas=given)


@pytest.mark.parametrize("parameters", ["path", ["path"]])
def test_a_listed_tool_whose_parameters_are_no_schema(parameters: Any):
    with (
        serving({"/tools": (200, [{"name": "read_file", "parameters": parameters}])}) as server,
        pytest.raises(ProtocolError, match=r"lists 'read_file' with the parameters .*path.*, expected a JSON schema"),
    ):
        ToolServer(server.url).tools()


def test_a_loop_waits_a_little_longer_than_the_server_may_take():
    schema = {"name": "hang", "parameters": {"type": "object"}}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = ToolServer(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.05, schemas=[schema])
        out = loop.run(ScriptedClient([turn("", call("hang")), turn("ok")]), "go", tools=[server])
    assert "did not answer within 0.05 s" in out.tool_log[0]["error"]


def test_the_time_limit_is_for_the_whole_answer():
    over = threading.Event()

    def trickle(listening: socket.socket) -> None:
        line, _ = listening.accept()
        with line, contextlib.suppress(OSError):  # the reader has gone
            line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n")
            for _ in range(40):
                over.wait(0.05)
                line.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=trickle, args=(listening,))
        thread.start()
        with pytest.raises(DeadlineExceededError, match=r"did not answer within 0\.3 s"):
            ToolServer(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.3).tools()
        over.set()
        thread.join()


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving({"/call": (200, {"ok": True, "result": 1})}) as server:
        assert ToolServer(server.url).call("t", {}) == 1
