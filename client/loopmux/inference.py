"""The two helpers of the system that Loopmux replaces, under their old names and with their old meaning.

A broker that is running at the default endpoint is used; with none running, the first call starts a private stack for
this process (``loopmux.server``), which later calls use and which ends with the process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopmux import server
from loopmux.client import Client
from loopmux.codec import show
from loopmux.errors import BadRequestError, MaxTurnsError
from loopmux.loop import run
from loopmux.loopevents import LoopEvent, Run, ToolLoopResult, ToolResult
from loopmux.results import ToolCall
from loopmux.tools import Danger, Tool, collect
from loopmux.toolserver import ToolServer

LogCallback = Callable[[str], None]
ToolCallback = Callable[[str, dict[str, Any], Any], None]
"""Gets a tool's name, its arguments, and its result or error, after each call."""
ApprovalCallback = Callable[[str, dict[str, Any]], bool]
"""Gets a tool's name and its arguments; the call runs if it answers true."""

_DANGER: dict[str, Danger] = {
    "read_file": "safe",
    "list_dir": "safe",
    "git_status": "safe",
    "write_file": "warning",
    "run_shell": "dangerous",
}
"""The levels that the replaced system gave to the tools of its server; any other name needed approval."""


@dataclass
class InferenceConfig:
    """One generation.

    Attributes:
        prompt: the user's text.
        model_id: a model of the configuration.
        base_model: directory or hub id of a model that the configuration does not have; stands in for ``model_id``.
        adapter_dir: directory of an adapter for ``base_model``.
        max_new_tokens: length limit of an answer, tokens.
        temperature: 0 for greedy decoding.
    """

    prompt: str
    model_id: str = "default"
    base_model: str | None = None
    adapter_dir: str | Path | None = None
    max_new_tokens: int = 256
    temperature: float = 0.7


@dataclass
class ToolEnabledInferenceConfig(InferenceConfig):
    """A generation in which the model may use the tools of a tool server.

    Attributes:
        enable_tools: False makes it a plain generation.
        tool_server_url, tool_server_token: the server, see ``ToolServer``.
        auto_execute_safe_tools: run tools of the level ``safe`` without asking ``approval_callback``.
        max_tool_iterations: how many times calls are run and the model is asked again.
        system_prompt: goes in front of the prompt.
        tools: schemas for a server that does not list its tools; functions and ``Tool`` objects run in this process.
    """

    enable_tools: bool = True
    tool_server_url: str = "http://127.0.0.1:8763"
    tool_server_token: str = ""
    auto_execute_safe_tools: bool = True
    max_tool_iterations: int = 5
    system_prompt: str = ""
    tools: Sequence[Any] = field(default_factory=tuple)


def run_inference(config: InferenceConfig, log_callback: LogCallback | None = None) -> str:
    """Generate an answer and return its clean text: no prompt, no special tokens.

    Raises:
        LoopmuxError: the request or the start of the private stack failed.
    """
    endpoint, model = _place(config, log_callback)
    with Client(endpoint) as client:
        return client.generate(config.prompt, **_options(config, model)).text


def run_inference_with_tools(
    config: ToolEnabledInferenceConfig,
    tool_callback: ToolCallback | None = None,
    approval_callback: ApprovalCallback | None = None,
    log_callback: LogCallback | None = None,
) -> tuple[str, list[dict[str, Any]]]:
    """Let the model use tools until it answers; return its last text and the log of its calls.

    Tools that need approval are run without asking when there is no ``approval_callback``. A denied call is told to the
    model; a turn whose calls were all denied ends the loop. A loop that used up its iterations returns what it has.

    Raises:
        BadRequestError: ``max_tool_iterations`` is no number of times.
        LoopmuxError: a request, the start of the private stack, or the listing of the server's tools failed.
    """
    if not config.enable_tools:
        return run_inference(config, log_callback), []
    if type(config.max_tool_iterations) is not int or config.max_tool_iterations < 0:
        found = show(config.max_tool_iterations)
        raise BadRequestError(f"max_tool_iterations: found {found}, expected a whole number of 0 or more")
    tools = collect(_tools(config))
    endpoint, model = _place(config, log_callback)
    with Client(endpoint) as client:
        try:
            result = _loop(client, config, tools, model, tool_callback, approval_callback)
        except MaxTurnsError as error:
            result = error.result
            if log_callback is not None:
                log_callback(f"stopped after {config.max_tool_iterations} tool iterations")
    # what a limit kept from running was never logged
    return result.text, [entry for entry in result.tool_log if entry["status"] != "skipped"]


def _loop(
    client: Client,
    config: ToolEnabledInferenceConfig,
    tools: dict[str, Tool],
    model: str,
    tool_callback: ToolCallback | None,
    approval_callback: ApprovalCallback | None,
) -> ToolLoopResult:
    def before_tool(call: ToolCall) -> Any:
        free = config.auto_execute_safe_tools and tools[call.name].danger == "safe"
        if free or approval_callback is None:
            return Run()
        return bool(approval_callback(call.name, call.arguments))

    def on_event(event: LoopEvent) -> None:
        if tool_callback is not None and isinstance(event, ToolResult) and event.status in ("success", "error"):
            told = event.result if event.status == "success" else event.error
            tool_callback(event.call.name, event.call.arguments, told)

    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    return run(
        client,
        [*system, {"role": "user", "content": config.prompt}],
        tools=tools.values(),
        max_turns=config.max_tool_iterations + 1,  # the last iteration's results still get an answer
        before_tool=before_tool,
        on_event=on_event,
        stop_when_denied=True,
        **_options(config, model),
    )


def _tools(config: ToolEnabledInferenceConfig) -> Sequence[Any]:
    """The tools of this process, or else the server's."""
    schemas = [entry for entry in config.tools if isinstance(entry, Mapping)]
    local = [entry for entry in config.tools if not isinstance(entry, Mapping)]
    if local and not schemas:
        return local
    remote = ToolServer(
        config.tool_server_url,
        config.tool_server_token,
        schemas=schemas or None,
        danger=lambda name: _DANGER.get(name, "warning"),
    )
    return [*local, remote]


def _options(config: InferenceConfig, model: str) -> dict[str, Any]:
    return {"model": model, "max_new_tokens": config.max_new_tokens, "temperature": config.temperature}


def _place(config: InferenceConfig, log: LogCallback | None) -> tuple[str, str]:
    """Where to ask, and for which model."""
    if config.base_model is not None:
        return server.ensure_model(config.base_model, config.adapter_dir, log), "default"
    if config.adapter_dir is not None:
        raise BadRequestError("adapter_dir: found no base_model beside it, expected the model that the adapter is for")
    return server.ensure_running(config.model_id, log), config.model_id
