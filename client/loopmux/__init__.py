"""Loopmux: many tool-call loops against local language models with adapters.

::

    import loopmux

    with loopmux.Client() as client:
        print(client.generate("Hello", model="default").text)

Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loopmux import loop as loop
    from loopmux import server as server
    from loopmux import tools as tools
    from loopmux.aio import AsyncClient as AsyncClient
    from loopmux.aio import AsyncStream as AsyncStream
    from loopmux.client import Client as Client
    from loopmux.client import Stream as Stream
    from loopmux.errors import AdapterNotFoundError as AdapterNotFoundError
    from loopmux.errors import AuthError as AuthError
    from loopmux.errors import BadRequestError as BadRequestError
    from loopmux.errors import CancelledError as CancelledError
    from loopmux.errors import ConfigError as ConfigError
    from loopmux.errors import ConnectionLostError as ConnectionLostError
    from loopmux.errors import ContextLengthError as ContextLengthError
    from loopmux.errors import DeadlineExceededError as DeadlineExceededError
    from loopmux.errors import EngineError as EngineError
    from loopmux.errors import LoopmuxError as LoopmuxError
    from loopmux.errors import MaxTurnsError as MaxTurnsError
    from loopmux.errors import ModelNotFoundError as ModelNotFoundError
    from loopmux.errors import OverloadedError as OverloadedError
    from loopmux.errors import PayloadTooLargeError as PayloadTooLargeError
    from loopmux.errors import ProtocolError as ProtocolError
    from loopmux.errors import ToolLoopError as ToolLoopError
    from loopmux.errors import ToolNotFoundError as ToolNotFoundError
    from loopmux.errors import WorkerLostError as WorkerLostError
    from loopmux.inference import InferenceConfig as InferenceConfig
    from loopmux.inference import ToolEnabledInferenceConfig as ToolEnabledInferenceConfig
    from loopmux.inference import run_inference as run_inference
    from loopmux.inference import run_inference_with_tools as run_inference_with_tools
    from loopmux.loopevents import ToolLoopResult as ToolLoopResult
    from loopmux.messages import ModelStatus as ModelStatus
    from loopmux.messages import Status as Status
    from loopmux.messages import WorkerStatus as WorkerStatus
    from loopmux.results import ReasoningDelta as ReasoningDelta
    from loopmux.results import Result as Result
    from loopmux.results import StreamEvent as StreamEvent
    from loopmux.results import TextDelta as TextDelta
    from loopmux.results import Timing as Timing
    from loopmux.results import TokenLogprob as TokenLogprob
    from loopmux.results import ToolCall as ToolCall
    from loopmux.results import Usage as Usage
    from loopmux.results import Waiting as Waiting
    from loopmux.tools import Tool as Tool
    from loopmux.tools import tool as tool

_NAMES = {
    "aio": "AsyncClient AsyncStream",
    "client": "Client Stream",
    "errors": "AdapterNotFoundError AuthError BadRequestError CancelledError ConfigError ConnectionLostError "
    "ContextLengthError DeadlineExceededError EngineError LoopmuxError MaxTurnsError ModelNotFoundError "
    "OverloadedError PayloadTooLargeError ProtocolError ToolLoopError ToolNotFoundError WorkerLostError",
    "inference": "InferenceConfig ToolEnabledInferenceConfig run_inference run_inference_with_tools",
    "loopevents": "ToolLoopResult",
    "messages": "ModelStatus Status WorkerStatus",
    "results": "ReasoningDelta Result StreamEvent TextDelta Timing TokenLogprob ToolCall Usage Waiting",
    "tools": "Tool tool",
}
"""Module to the names it contributes. The imports above say the same to type checkers; a test compares the two."""
_MODULES = ("loop", "server", "tools")
"""Modules that are part of the public surface as such."""
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"loopmux.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'loopmux' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"loopmux.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
