"""An HTTP server that runs tools: asked for what it has, and called for each call of the model.

- ``POST /call`` with ``{"name": …, "args": {…}}`` answers ``{"ok": true, "result": …}``, or
  ``{"ok": false, "error": …}`` where the tool failed;
- ``GET /tools``, where the server has it, answers a list (or ``{"tools": […]}``) of schemas, bare or as
  ``{"type": "function", "function": {…}}``, each with an optional ``danger``;
- both carry the header ``X-Auth-Token`` if a token is set.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from loopmux.codec import show
from loopmux.errors import AuthError, BadRequestError, ConnectionLostError, DeadlineExceededError, ProtocolError
from loopmux.tools import DANGERS, LATER, Danger, Tool, ToolError, check_seconds

_LARGEST_ANSWER = 16 * 1024 * 1024
"""Bytes; a model reads a few thousand characters, so more is a mistake and would only fill the memory."""
_PIECE = 64 * 1024
"""Bytes that are read at once."""
_SHOWN = 200
"""Characters of an unexpected answer that an error shows."""
_PORTS = {"http": 80, "https": 443}


class ToolServer:
    """The tools of a server at ``url``; hand it to ``run_tools(tools=[server])`` as it is.

    Args:
        url: such as ``http://127.0.0.1:8763``.
        token: sent as ``X-Auth-Token``; empty for none.
        timeout: seconds for each answer, in place of a loop's ``tool_timeout``.
        schemas: the tools' schemas, for a server that does not list them.
        danger: level of a tool that the server gives none for, or a function from a name to it. It is for
            ``before_tool`` to look at.

    Every call opens a connection of its own, so one object serves any number of threads. Proxies of the environment are
    not used: tokens stay between the two machines.

    Raises:
        BadRequestError: the URL is not one, the token cannot stand in a header, the time limit is none, or the schemas
            are no list of schemas.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        timeout: float = 30.0,
        schemas: Iterable[Mapping[str, Any]] | None = None,
        danger: Danger | Callable[[str], Danger] = "warning",
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
            host = (parts.hostname or "").encode("idna").decode()  # as a socket takes it
        except ValueError as error:
            raise BadRequestError(f"tool server: found the URL {url!r}: {error}") from error
        if parts.scheme not in _PORTS or not host or not host.isprintable() or " " in host:
            raise BadRequestError(f"tool server: found the URL {url!r}, expected one such as http://127.0.0.1:8763")
        if not (parts.path.isascii() and parts.path.isprintable() and " " not in parts.path):
            raise BadRequestError(f"tool server: found the URL {url!r}, expected a path in ASCII, all else as in %20")
        if not isinstance(token, str):
            raise BadRequestError(f"tool server: the token is a {type(token).__name__}, expected a text")
        if not (token.isascii() and token.isprintable()):
            raise BadRequestError("tool server: found a token with other characters than a header may have")
        check_seconds(timeout, "tool server: timeout")
        self.url = url.rstrip("/")
        self._token = token
        self._timeout = timeout
        self._schemas = None if schemas is None else _entries(schemas)
        self._danger = danger if callable(danger) else lambda _: danger
        self._secure = parts.scheme == "https"
        self._host, self._port = host, port or _PORTS[parts.scheme]
        self._path = parts.path.rstrip("/")

    def tools(self) -> list[Tool]:
        """The server's tools.

        Raises:
            ConnectionLostError, DeadlineExceededError, AuthError, ProtocolError: it cannot be reached, does not answer,
                refuses the token, or answers something else.
        """
        listed = self._listed() if self._schemas is None else self._schemas
        return [self._tool(entry) for entry in listed]

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Run one tool and return its result.

        Raises:
            ToolError: the tool failed; its text is the server's.
            ConnectionLostError, DeadlineExceededError, AuthError, ProtocolError: as ``tools``.
        """
        status, body = self._request("POST", "/call", {"name": name, "args": dict(arguments)})
        answer = _json(body)
        if isinstance(answer, Mapping) and isinstance(answer.get("ok"), bool):
            if answer["ok"]:
                return answer.get("result")
            raise ToolError(str(answer.get("error") or "the tool failed without saying why"))
        raise self._unexpected(status, body, "/call", '{"ok": …, "result": …, "error": …}')

    def _listed(self) -> list[Mapping[str, Any]]:
        status, body = self._request("GET", "/tools", None)
        if status in (404, 405, 501):
            raise ProtocolError(
                f"the tool server at {self.url} does not list its tools (GET /tools answered {status}): "
                "give their schemas, as in ToolServer(url, token, schemas=[…])"
            )
        answer = _json(body)
        listed = answer.get("tools") if isinstance(answer, Mapping) else answer
        if status != http.client.OK or not isinstance(listed, list) or not all(isinstance(e, dict) for e in listed):
            raise self._unexpected(status, body, "/tools", "a list of tool schemas")
        return listed

    def _tool(self, entry: Mapping[str, Any]) -> Tool:
        inner = entry.get("function", entry)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str):
            raise ProtocolError(f"the tool server at {self.url} lists {entry!r:.200}, expected a schema with a name")
        danger = entry.get("danger", inner.get("danger"))
        parameters = inner.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise ProtocolError(
                f"the tool server at {self.url} lists {name!r} with the parameters {parameters!r:.80}, "
                "expected a JSON schema"
            )
        return Tool(
            name,
            str(inner.get("description") or ""),
            {"type": "object", "properties": {}} | dict(parameters),
            lambda **arguments: self.call(name, arguments),
            danger if danger in DANGERS else self._danger(name),
            self._timeout + LATER,
        )

    def _request(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        end = time.monotonic() + self._timeout
        connection = kind(self._host, self._port, timeout=min(self._timeout, threading.TIMEOUT_MAX))
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, self._path + path, data, self._headers())
            line = connection.sock
            response = connection.getresponse()
            answer = _body(response, line, end)
        except TimeoutError as error:
            late = f"the tool server at {self.url} did not answer within {self._timeout:g} s"
            raise DeadlineExceededError(late) from error
        except (OSError, http.client.HTTPException) as error:
            said = f"{type(error).__name__}: {error}"
            lost = f"the tool server at {self.url} cannot be reached ({said}): is it running?"
            raise ConnectionLostError(lost) from error
        finally:
            connection.close()
        if len(answer) > _LARGEST_ANSWER:
            raise ProtocolError(f"the tool server at {self.url} answered more than {_LARGEST_ANSWER >> 20} MiB")
        if response.status in (401, 403):
            token = "the token was refused" if self._token else "no token was given"
            raise AuthError(f"the tool server at {self.url} answered {response.status}: {token}")
        return response.status, answer

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        return headers | {"X-Auth-Token": self._token} if self._token else headers

    def _unexpected(self, status: int, body: bytes, path: str, expected: str) -> ProtocolError:
        found = body.decode("utf-8", "replace")[:_SHOWN]
        return ProtocolError(
            f"the tool server at {self.url} answered {path} with {status} {found!r}, expected {expected}"
        )


def _entries(schemas: Any) -> list[Mapping[str, Any]]:
    entries = None if isinstance(schemas, Mapping) or not isinstance(schemas, Iterable) else list(schemas)
    if entries is None or not all(isinstance(entry, Mapping) for entry in entries):
        raise BadRequestError(f"tool server: found the schemas {show(schemas)}, expected a list of JSON schemas")
    return entries


def _body(response: http.client.HTTPResponse, line: socket.socket, end: float) -> bytes:
    """What was answered, or somewhat more than the largest answer of it; a server may send a byte at a time for ever.

    Raises:
        TimeoutError: it has not ended by ``end``, monotonic seconds.
    """
    answer = bytearray()
    while len(answer) <= _LARGEST_ANSWER and not response.isclosed():
        if (left := end - time.monotonic()) <= 0:
            raise TimeoutError
        line.settimeout(min(left, threading.TIMEOUT_MAX))
        if not (piece := response.read1(_PIECE)):
            break
        answer += piece
    return bytes(answer)


def _json(body: bytes) -> Any:
    """What a body says; None for what is not JSON, or nested without end, which fits no expected answer."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
