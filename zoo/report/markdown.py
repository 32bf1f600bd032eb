"""Figures, units and tables as Markdown text, the same text for the same numbers everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NONE = "—"
_THOUSANDS = ("", "k", "M", "G", "T", "P")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def code(text: str) -> str:
    """Set a name in code style so that nothing in it is read as Markdown, in or out of a table."""
    clean = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{clean}`"


def words(text: str) -> str:
    """Write a sentence so that it stays in its line, in its cell and in the page."""
    clean = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|" else letter for letter in clean)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Lay out a table.

    Args:
        header: Heading of each column.
        rows: Cells of each row.
        left: Number of columns aligned to the left; the others are to the right.
    """
    rule = [":--"] * left + ["--:"] * (len(header) - left)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def figures(*values: float, sign: bool = False) -> list[str]:
    """Write measured values that stand side by side in one style: four decimals or an exponent.

    Args:
        values: The values; the largest decides the style.
        sign: Whether to write a plus.
    """
    size = max(map(abs, values))
    style = ".4f" if size == 0 or 1e-3 <= size < 1e3 else ".3e"
    texts = [f"{value:{style}}" for value in values]
    # A rounded negative zero is a zero.
    texts = [text.removeprefix("-") if float(text) == 0 else text for text in texts]
    return [text if text.startswith("-") or not sign else f"+{text}" for text in texts]


def quantity(value: float | None) -> str:
    """Write a count with three digits and k, M, G ...; a dash for None."""
    return NONE if value is None else _scaled(value, 1000, _THOUSANDS)


def size(value: float | None) -> str:
    """Write a number of bytes with three digits and KiB, MiB ...; a dash for None."""
    return NONE if value is None else _scaled(value, 1024, _BINARY)


def milliseconds(value: float | None) -> str:
    """Write a number of seconds as milliseconds with three digits; a dash for None."""
    return NONE if value is None else _three(value * 1000)


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    power = 0
    # Compared as rounded, so that 999 999 is 1M and never 1000k.
    while float(_three(value)) >= base and power < len(units) - 1:
        value /= base
        power += 1
    return f"{_three(value)} {units[power]}" if base == 1024 else f"{_three(value)}{units[power]}"


def _three(value: float) -> str:
    """Write a number with three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"
