"""The tables of docs/performance.md are those of the files beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.bench import Setting, measure, pages, report
from zoo.errors import ZooError

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
MARKED = "before\n<!-- begin bench x.json -->\nold\n<!-- end bench -->\nafter"


def test_the_page_is_that_of_its_files() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert pages.renew(text, PAGE.parent) == text, "run: make docs"


def test_a_measurement_becomes_a_table_of_each_pass(tmp_path: Path) -> None:
    setting = Setting(specs=["linear"], lengths=[4, 8], dim=8, heads=2, rounds=2, seconds=1e-4)
    content = report.as_json(measure(setting))
    for row in content["rows"]:
        row |= {"cpu": 0.0015, "speed_cpu": 2.0, "memory": 3 * 2**20}
    content["rows"][-1]["error"] = "left out: a call took 9 s at N = 4"
    content["rows"][-1]["memory"] = None
    (tmp_path / "x.json").write_text(json.dumps(content))
    text = pages.renew(MARKED, tmp_path)
    assert text.startswith("before\n<!-- begin bench x.json -->\n\n")
    assert text.endswith("\n\n<!-- end bench -->\nafter")
    assert "old" not in text
    assert "dim 8, 2 heads, causal; a layer with projections" in text
    assert text.count("| contender | route | N = 4 | N = 8 | growth | MiB at 4 | MiB at 8 |") == 2
    lines = text.splitlines()
    forward, both = (next(x for x in part if x.startswith("| `linear`")) for part in halves(lines))
    assert "| linear | 1.5 (2.00) | 1.5 (2.00) |" in forward
    assert forward.endswith("| 3 | 3 |")
    assert "| 1.5 (2.00) | left out |" in both
    assert both.endswith("| 3 | — |")
    assert pages.renew(text, tmp_path) == text


def halves(lines: list[str]) -> tuple[list[str], list[str]]:
    at = lines.index("**forward+backward**")
    return lines[:at], lines[at:]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, r"x\.json: No such file"), ("{", "is no measurement"), ("{}", "is no measurement")],
)
def test_a_file_that_is_no_measurement_is_named(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ZooError, match=said):
        pages.renew(MARKED, tmp_path)


def test_a_page_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no table"):
        pages.renew("nothing", tmp_path)
