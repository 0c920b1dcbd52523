"""The tools of a Python file, for ``loopmux chat --tools``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from pathlib import Path

from loopmux.errors import BadRequestError
from loopmux.outcome import described
from loopmux.tools import Tool


def load(file: str) -> list[Tool]:
    """Run a file and take what it marks with ``@loopmux.tool``, or else all public functions that it defines.

    Raises:
        BadRequestError: it is no Python file, fails while it runs, or has no tools.
    """
    path = Path(file).resolve()
    name = f"loopmux_tools_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadRequestError(f"--tools {file}: expected a Python file, one that ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # hints and dataclasses are looked up there
    sys.path.insert(0, str(path.parent))  # what lies beside it can be imported, as when it is run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise BadRequestError(f"--tools {file}{where}: {described(error)}") from error
    public = [value for name, value in vars(module).items() if not name.startswith("_")]
    marked = [value for value in public if isinstance(value, Tool)]
    functions = [value for value in public if inspect.isfunction(value) and value.__module__ == name]
    if not marked and not functions:
        raise BadRequestError(f"--tools {file}: found no tools, expected functions without a leading _ in their names")
    return marked or [Tool.from_function(function) for function in functions]
