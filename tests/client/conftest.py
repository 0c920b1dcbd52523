from __future__ import annotations

import os

from hypothesis import settings

# No deadline per example: the machine may be busy. On CI the same examples every time, so that a red run repeats.
settings.register_profile("loopmux", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("loopmux")
