"""``loopmux chat``: commands, tools and who is asked about them, with a scripted model."""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from loopmux import cli, loop
from loopmux.cli import chat, toolfile
from loopmux.errors import BadRequestError, ModelNotFoundError, WorkerLostError
from loopmux.messages import ModelStatus, Status
from loopmux.tools import Tool, collect
from scripted import ScriptedClient, call, turn

SYSTEM = {"role": "system", "content": "Be brief."}


def delete(path: str) -> str:
    """Delete a file."""
    return f"{path} is gone"


DELETE = Tool.from_function(delete, danger="dangerous")


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class ChatClient(ScriptedClient):
    def status(self) -> Status:
        return Status(b"e" * 8, 5, "0.1.0", 42, 1, 0, 0, (ModelStatus("m", "ready"), ModelStatus("other", "ready")))

    def iter_tools(self, messages: Any, **settings: Any) -> loop.Events:
        return loop.iterate(self, messages, **settings)


class Terminal(io.StringIO):
    """A terminal at which a person types these lines; ^C is a line of its own, and ä comes as another encoding's."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line.encode("latin-1").decode() if "\xe4" in line else line


def talk(
    monkeypatch: pytest.MonkeyPatch, typed: io.StringIO, *script: Any, tools: Any = (), **settings: Any
) -> ChatClient:
    client = ChatClient(list(script))
    monkeypatch.setattr(sys, "stdin", typed)
    chat.Chat(client, "m", collect(tools), {"temperature": 0}, [SYSTEM], **settings).run()  # type: ignore[arg-type]
    return client


def said(client: ScriptedClient, request: int) -> list[str]:
    return [message["content"] for message in client.messages(request)]


def test_a_conversation_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    client = talk(monkeypatch, io.StringIO("Hi\n /etc?\n\nnot read\n"), turn("Hello"), turn("A folder."))
    assert capsys.readouterr().out == "Hello\nA folder.\n"
    assert said(client, 1) == ["Be brief.", "Hi", "Hello", "/etc?"]
    assert [request["temperature"] for request in client.requests] == [0, 0]
    (session,) = {request["session"] for request in client.requests}
    assert client.hints == [(session, "waiting_on_tool")] * 2 + [(session, "done")]


def test_tools_run_and_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = [turn("Hm", call(a=1, b=2)), turn("3")]
    client = talk(monkeypatch, io.StringIO("go\n"), *script, tools=[add])
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("Hm\n3\n", '[add {"a": 1, "b": 2}]\n[add: "3"]\n')
    assert said(client, 1) == ["Be brief.", "go", "Hm", "3"]


@pytest.mark.parametrize(
    ("typed", "ran", "questions"),
    [
        ("go\ny\ngo\nn\n", [True, False], 2),
        ("go\nno\ngo\nyes\n", [False, True], 2),
        ("go\na\ngo\n", [True, True], 1),
        ("go\nwhat?\nalways\ngo\n", [True, True], 2),
        ("go\n", [False], 1),  # the end of the input is a no
    ],
)
def test_a_person_is_asked(
    typed: str, ran: list[bool], questions: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [turn("", call("delete", path="a\x1b")), turn("ok")] * 2
    client = talk(monkeypatch, Terminal(typed), *script, tools=[DELETE])
    answers = [said(client, 2 * n + 1)[-1] for n in range(len(ran))]
    assert ["gone" in answer for answer in answers] == ran
    assert capsys.readouterr().out.count('dangerous: run delete {"path": "a\\u001b"}? [y]es') == questions


def test_without_a_terminal_nothing_runs_that_needs_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [turn("", call("delete", path="a")), turn("ok")]
    client = talk(monkeypatch, io.StringIO("go\n"), *script, tools=[DELETE])
    assert said(client, 1)[-1] == "Denied: nobody is there to allow it"
    assert "--yes runs tools without asking" in capsys.readouterr().err
    client = talk(monkeypatch, io.StringIO("go\n"), *script, tools=[DELETE], yes=True)
    assert said(client, 1)[-1] == "a is gone"


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my chat.json"
    typed = f"one\n/model other\ntwo\n/save {file}\n/reset\nthree\n/help\n"
    client = talk(monkeypatch, Terminal(typed), turn("1"), turn("2"), turn("3"))
    assert [request["model"] for request in client.requests] == ["m", "other", "other"]
    assert said(client, 1) == ["Be brief.", "one", "1", "two"]
    assert said(client, 2) == ["Be brief.", "three"]
    assert client.requests[1]["session"] != client.requests[2]["session"]
    assert json.loads(file.read_text())[-1] == {"role": "assistant", "content": "2"}
    assert chat.HELP in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/modle x", "/modle x is no command; there are\n/model NAME"),
        ("/model", "/model is no command"),
        ("/", "/ is no command"),
        ("/model ohter", "model 'ohter' is not known, expected one of m, other; did you mean 'other'?"),
        ("/save /no/such/folder/x", "/save '/no/such/folder/x': [Errno 2] No such file or directory"),
        ("/save ~nobody-of-that-name/x", "/save '~nobody-of-that-name/x': "),
        ("/save a\0b", "/save 'a\\x00b': "),
    ],
)
def test_a_command_that_cannot_be_done(
    line: str, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, Terminal(f"{line}\nhi\n"), turn("Hello"))
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert "Hello" in shown.out  # and it goes on


def test_without_a_terminal_the_first_error_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError):
        talk(monkeypatch, io.StringIO("/model nobody\nhi\n"))


def test_what_is_typed_in_another_encoding_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [turn("", call("delete", path="a")), turn("2")]
    client = talk(monkeypatch, Terminal("ä\none\nä\ny\n"), *script, tools=[DELETE])
    assert said(client, 1) == ["Be brief.", "one", "", "a is gone"]
    shown = capsys.readouterr()
    assert "loopmux: what was typed is not utf-8, so it is dropped: " in shown.err
    assert shown.out.count("run delete") == 2
    with pytest.raises(BadRequestError, match="not utf-8"):
        talk(monkeypatch, io.TextIOWrapper(io.BytesIO(b"\xe4\n"), "utf-8"))  # type: ignore[arg-type]


def test_control_c_stops_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = talk(monkeypatch, Terminal("one\n^C\ntwo\n"), KeyboardInterrupt(), turn("2"))
    assert said(client, 1) == ["Be brief.", "two"]
    assert "[stopped; this question is forgotten]" in capsys.readouterr().err
    assert client.left == ["cancelled", "finished"]


def test_control_c_at_the_question_whether_to_run_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    script = [turn("", call("delete", path="a")), turn("2")]
    client = talk(monkeypatch, Terminal("one\n^C\ntwo\n"), *script, tools=[DELETE])
    assert said(client, 1) == ["Be brief.", "one", "", "Not run: the loop was stopped.", "two"]


def test_control_c_after_tools_ran_keeps_what_they_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [turn("", call(a=1, b=2)), KeyboardInterrupt(), turn("3")]
    client = talk(monkeypatch, Terminal("one\ntwo\n"), *script, tools=[add])
    assert said(client, 2) == ["Be brief.", "one", "", "3", "two"]
    assert "[stopped; what came of it so far is kept]" in capsys.readouterr().err


def test_control_c_while_a_tool_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang() -> None:
        """As long as it takes."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        released.wait(20)

    client = talk(monkeypatch, Terminal("one\ntwo\n"), turn("", call("hang")), turn("2"), tools=[hang])
    released.set()
    stopped = "Error: the loop was stopped while this ran; whether it did its work is not known"
    assert said(client, 1) == ["Be brief.", "one", "", stopped, "two"]


def test_an_error_after_tools_ran_keeps_what_they_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [WorkerLostError("gone"), turn("", call(a=1, b=2)), WorkerLostError("gone again"), turn("3")]
    client = talk(monkeypatch, Terminal("zero\none\ntwo\n"), *script, tools=[add])
    assert said(client, 3) == ["Be brief.", "one", "", "3", "two"]
    assert "loopmux: gone again\n" in capsys.readouterr().err


def test_an_answer_that_was_cut_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, io.StringIO("go\n"), turn("and then", reason="length"))
    assert capsys.readouterr().err == "[length]\n"


PUBLIC = """
from __future__ import annotations
from dataclasses import dataclass
from json import dumps
import beside

@dataclass
class Place:
    x: int

def where(place: Place) -> str:
    return dumps(beside.double(place.x))

def _helper(x): ...
"""
MARKED = """
import loopmux

def helper(x): ...

@loopmux.tool(danger="warning")
def where(x: int) -> int:
    return x
"""


def test_the_tools_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("def double(x): return 2 * x\n")
    (tmp_path / "public.py").write_text(PUBLIC)
    (tmp_path / "marked.py").write_text(MARKED)
    (public,) = toolfile.load(f"{tmp_path}/public.py")
    assert public.function(**public.bind({"place": {"x": 2}})) == "4"
    (marked,) = toolfile.load(f"{tmp_path}/marked.py")
    assert (marked.name, marked.danger) == ("where", "warning")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("t.py", "_x = 1\n", r"t\.py: found no tools"),
        ("t.py", "\n\nundefined\n", r"t\.py, line 3: NameError: name 'undefined'"),
        ("t.py", "def (:\n", r"t\.py: SyntaxError"),
        ("t.py", "def f(x): ...\n", "tool 'f', parameter x: it has no type hint"),
        ("t.txt", "", r"t\.txt: expected a Python file"),
        ("t.py", None, r"t\.py: FileNotFoundError"),
    ],
)
def test_a_file_without_usable_tools(
    name: str, text: str | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadRequestError, match=complaint):
        toolfile.load(f"{tmp_path}/{name}")


def test_the_options_that_may_be_repeated() -> None:
    options: argparse.Namespace = cli._parser().parse_args(
        ["chat", "m", "--tools", "a.py", "--tools", "b.py", "--mcp", "uvx x", "--mcp", "http://h/mcp"]
    )
    assert (options.tools, options.mcp, options.yes) == (["a.py", "b.py"], ["uvx x", "http://h/mcp"], False)


def test_a_file_of_tools_that_is_not_there_is_told_before_a_broker_is_waited_for(tmp_path: Path) -> None:
    missing = tmp_path / "tools.py"
    command = [sys.executable, "-m", "loopmux", "chat", "a", "--endpoint", f"ipc://{tmp_path}/nobody.ipc"]
    done = subprocess.run([*command, "--tools", str(missing)], input="", capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert str(missing) in done.stderr
    assert "broker" not in done.stderr
