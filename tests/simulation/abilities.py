"""What the cores can do so far. Remove this with the last use of it, once they all resume."""

from __future__ import annotations

from loopmux.wire import Kind

RESUMES = "HELD" in Kind.__members__
"""Whether a request goes on elsewhere when its worker is lost, and survives a restart of the broker."""
