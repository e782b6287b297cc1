"""Tables that commands write into Markdown files, between comments with the table's name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Rows of cells, the first column to the left, all others to the right."""
    heads = list(heads)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_block(path: str | Path, name: str, text: str) -> None:
    """Put `text` between ``<!-- name: begin ... -->`` and ``<!-- name: end -->`` of a file."""
    path = Path(path)
    new, count = re.subn(
        rf"(<!-- {name}: begin[^\n]*\n).*?(<!-- {name}: end -->)",
        lambda match: f"{match[1]}\n{text}\n\n{match[2]}",
        path.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(
            f"{path}: needs one block from '<!-- {name}: begin' to '<!-- {name}: end -->'; "
            f"expected 1, got {count}"
        )
    path.write_text(new, encoding="utf-8")
