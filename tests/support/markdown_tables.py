"""Tables of a page in Markdown, as tests read them."""

from __future__ import annotations

import re


def tables(page):
    """Every table of a page as a list of rows, each a mapping from heading to cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()
        )
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found
