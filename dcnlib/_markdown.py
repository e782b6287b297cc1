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


def find_block(path: str | Path, name: str) -> tuple[str, str]:
    """The file's text to the end of ``<!-- name: begin ... -->`` and from ``<!-- name: end -->``."""
    marks = rf"(.*<!-- {name}: begin[^\n]*\n).*?(<!-- {name}: end -->.*)"
    text = Path(path).read_text(encoding="utf-8")
    count = len(re.findall(rf"<!-- {name}: (?:begin|end)", text))
    found = re.fullmatch(marks, text, re.DOTALL)
    if count != 2 or found is None:
        raise ValueError(
            f"{path}: needs one block from '<!-- {name}: begin' to '<!-- {name}: end -->'"
        )
    return found[1], found[2]


def write_block(path: str | Path, name: str, text: str) -> None:
    """Put `text` between ``<!-- name: begin ... -->`` and ``<!-- name: end -->`` of a file."""
    before, after = find_block(path, name)
    Path(path).write_text(f"{before}\n{text}\n\n{after}", encoding="utf-8")
