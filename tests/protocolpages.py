"""The tables of docs/protocol.md and docs/protocol-worker.md, for tests that hold them against the code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
CLIENT, WORKER = DOCS / "protocol.md", DOCS / "protocol-worker.md"


@dataclass(frozen=True)
class Table:
    """One Markdown table: the heading that it stands under, its columns' titles, its rows."""

    heading: str
    columns: list[str]
    rows: list[list[str]]

    def by(self, column: str) -> dict[str, dict[str, str]]:
        """The rows by what they have in a column, as title to cell."""
        named = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        found = {row[column]: row for row in named}
        assert len(found) == len(named), f"{self.heading}: two rows say the same in {column!r}"
        return found


def tables(page: Path) -> list[Table]:
    found: list[Table] = []
    heading, inside = "", False
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.lstrip().startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if not inside:
            found.append(Table(heading, cells, []))
            inside = True
        elif not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            found[-1].rows.append(cells)
    return found


def table(page: Path, *columns: str) -> Table:
    """The one table of a page that begins with these columns."""
    [only] = [t for t in tables(page) if t.columns[: len(columns)] == list(columns)]
    return only
