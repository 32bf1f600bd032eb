"""The picture and the table of the rooms are those of the imports."""

from __future__ import annotations

from pathlib import Path

import pytest

import zoo
from zoo.docs import tower
from zoo.errors import ZooError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"


def test_the_page_and_its_picture_are_those_of_the_imports():
    found = tower.renew(PAGE)
    assert set(found) == {PAGE, PAGE.with_name(tower.PICTURE)}
    for path, content in found.items():
        assert path.read_text(encoding="utf-8") == content, "run: make docs"


def test_every_room_is_there_and_no_arrow_goes_up():
    found = {room.name: room for room in tower.rooms(tower.rows(ROOT / "pyproject.toml"))}
    folder = Path(zoo.__file__).parent
    there = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/*.py")}
    assert set(found) == there - {"__init__", "__main__", "_moved"}
    for room in found.values():
        assert room.summary
        assert all(found[other].row > room.row for other in room.imports)
    assert "torch" not in found
    assert found["host"].imports >= {"parts", "cache", "errors"}
    assert found["errors"].imports == frozenset()


def test_arrows_leave_out_what_follows():
    rooms = [
        tower.Room("a", 0, frozenset("bc")),
        tower.Room("b", 1, frozenset("c")),
        tower.Room("c", 2, frozenset()),
    ]
    assert tower.arrows(rooms) == [("a", "b"), ("b", "c")]


def test_a_page_without_markers_and_a_project_without_a_contract(tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("nothing")
    with pytest.raises(ZooError, match=r"markers .* are missing"):
        tower.renew(page)
    page.write_text(f"{tower.BEGIN}{tower.END}")
    with pytest.raises(ZooError, match="states no contract"):
        tower.renew(page)
    (tmp_path / "pyproject.toml").write_text("[tool]")
    with pytest.raises(ZooError, match="states no contract"):
        tower.renew(page)
