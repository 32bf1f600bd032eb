"""The table of what is in the zoo, as it stands in README.md; written from the registry.

``python -m zoo.docs.catalogue README.md`` renews the table between its two markers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from zoo import registry
from zoo.errors import ZooError

BEGIN = "<!-- begin catalogue (python -m zoo.docs.catalogue README.md) -->"
END = "<!-- end catalogue -->"


def table() -> str:
    """Markdown table of every mechanism, by kind and then by name."""
    rows = ["| name | kind | what it does | source | causal | mask | cost |", "|---" * 7 + "|"]
    for kind in registry.KINDS:
        for name in registry.list_names(kind=kind):
            entry = registry.info(name)
            paper = entry.paper
            source = ""
            if paper is not None:
                source = f"[{paper.year}]({paper.url})" if paper.url else str(paper.year)
            promises = entry.promises
            rows.append(
                f"| `{name}` | {kind} | {entry.summary} | {source} | {entry.causality} "
                f"| {promises.get('mask', 'na')} | {promises['cost']} |"
            )
    return "\n".join(rows)


def renew(text: str) -> str:
    """Text with the table between the markers written anew.

    Raises:
        ZooError: A marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ZooError(f"the markers {BEGIN!r} and {END!r} are missing")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    target.write_text(renew(target.read_text(encoding="utf-8")), encoding="utf-8")
