"""How often things are said again, and how long silence may last: the seconds of docs/protocol.md, for all sides."""

from __future__ import annotations

from typing import Final

HEARTBEAT: Final = 1.0
"""Interval in which every peer says something, unless the broker's settings name another (it is told in WELCOME)."""
SILENT_HEARTBEATS: Final = 3
"""After so many heartbeats without a word a peer counts as lost."""
ABSENT_HEARTBEATS: Final = 2
"""Who was away for longer itself (suspended, stopped) does not blame the silence on others."""
INTRODUCE_AGAIN: Final = 0.5
"""Until HELLO and REGISTER are repeated."""
RESEND: Final = 1.0
"""Until anything else that wants an answer is repeated."""
KEPT: Final = 60.0
"""For how long output and terminals wait for their acknowledgement; after that nothing more can come."""
LEAVE_PATIENTLY: Final = 240.0
"""For a worker whose requests cannot go on elsewhere, to leave: the first half is for them to end."""
