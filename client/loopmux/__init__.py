"""Loopmux: many tool-call loops against local language models with adapters."""

from __future__ import annotations

__version__ = "0.1.0"
