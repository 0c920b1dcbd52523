"""What an answer's text means: clean text, reasoning, and tool calls in the form of the model's family."""

from loopmux_worker.engine.calls.families import FAMILIES, Family, family_of
from loopmux_worker.engine.calls.output import Parsed
from loopmux_worker.engine.calls.parser import Parser

__all__ = ["FAMILIES", "Family", "Parsed", "Parser", "family_of"]
