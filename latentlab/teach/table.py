"""A table that shows itself as HTML in a notebook, else as aligned text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows under a head; floats are shown with three significant digits."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""

    def __str__(self) -> str:
        cells = [list(self.head), *([_text(x) for x in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.head))]
        lines = ["  ".join(x.rjust(width) for x, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, *([self.caption] if self.caption else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = ["".join(f"<th>{html.escape(x)}</th>" for x in self.head)]
        lines += ["".join(f"<td>{html.escape(_text(x))}</td>" for x in row) for row in self.rows]
        body = "\n".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table>\n{body}\n</table>" + (
            f"\n<p><small>{html.escape(self.caption)}</small></p>" if self.caption else ""
        )


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
