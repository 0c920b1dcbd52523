"""What systemd's units say for one installation, and whether a unit is still as it was written.

A unit's first line has the digest of the others, so that nobody's edit is overwritten or removed unasked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from loopmux.errors import ConfigError

_NEVER = re.compile(r"[\"'\\\x00-\x1f\x7f]")
"""What systemd takes in no program's path, quoted or not."""


def render(shipped: str, programs: str, configs: Mapping[str, str]) -> str:
    """The text of a unit.

    Args:
        shipped: the unit as it lies in ``configs/systemd``, whose program has no path.
        programs: the folder of the programs.
        configs: by program, the configuration file that is named to it.

    Raises:
        ConfigError: no unit can name that folder.
    """
    if _NEVER.search(programs):
        raise ConfigError(
            f"the programs are in {programs!r}: found a quote, backslash or control character, expected a folder that "
            "systemd starts programs from: install Loopmux in another one"
        )
    folder = programs.replace("%", "%%")  # a $ stands for itself there

    def command(line: re.Match[str]) -> str:
        program, words = line.groups()
        named = f" --config {_word(configs[program])}" if program in configs else ""
        return f'ExecStart="{folder}/{program}"{words}{named}'

    return _signed(re.sub(r"^ExecStart=(\S+)(.*)", command, shipped, flags=re.M))


def unedited(text: str) -> bool:
    """Whether a unit is one that ``render`` made, for whichever installation, and nobody has changed it since."""
    return text == _signed(text.partition("\n")[2])


def commands(before: Iterable[str], after: Mapping[str, str]) -> list[list[str]]:
    """What is to be said to systemd, in this order, once these units, texts by name, are in place of those names."""
    said = [["daemon-reload"]]
    services = [name for name in before if name.endswith(".service")]
    if services:  # what runs was started by units that may have been others
        said.append(["try-restart", *services])
    # The one without an [Install] section is started by its sockets.
    return [*said, ["enable", "--now", *(name for name, text in after.items() if "\n[Install]\n" in text)]]


def _signed(text: str) -> str:
    # Worded otherwise, every unit that is installed would count as edited.
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"# Written by `loopmux systemd install` ({digest}). Changes belong in `systemctl --user edit`.\n{text}"


def _word(text: str) -> str:
    """An argument in ExecStart=, quoted; nothing in it is an escape, a specifier or a variable."""
    for sign, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("%", "%%"), ("$", "$$")):
        text = text.replace(sign, escaped)
    return f'"{text}"'
