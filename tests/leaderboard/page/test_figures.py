from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from zoo.leaderboard import efficiency
from zoo.leaderboard.board import assemble
from zoo.leaderboard.page import figures
from zoo.leaderboard.page import markdown_page as leaderboard
from zoo.leaderboard.page.figures import lengths, pareto, pictures
from zoo.runs.records import RecordWarning, write

ROOT = Path(__file__).parents[3]


def seeds(make, attention, values, **changes):
    return [make(attention=attention, seed=s, report=f, **changes) for s, f in enumerate(values)]


@pytest.fixture
def records(make):
    return [
        *seeds(make, "mha", [0.5, 0.6, 0.7], step_time_cpu=0.01),
        *seeds(make, "cog", [0.6, 0.7, 0.8], step_time_cpu=0.02),
        *seeds(make, "odd(a='<&>')", [0.1, 0.1], step_time_cpu=0.03),
        make(attention="odd(a='<&>')", seed=2, status="nan"),
    ]


def test_the_front_holds_what_no_other_point_beats():
    points = [(1.0, 0.9), (2.0, 0.8), (2.0, 0.7), (3.0, 0.85), (4.0, 0.1)]
    assert pareto(points, lower=False) == [(1.0, 0.9), (3.0, 0.85), (4.0, 0.1)]
    assert pareto(points, lower=True) == [(4.0, 0.1)]
    assert pareto([], lower=True) == []


def test_the_same_records_give_the_same_bytes(records):
    one = {name: found.svg() for name, found in pictures(assemble(records)).items()}
    two = {name: found.svg() for name, found in pictures(assemble(records[::-1])).items()}
    assert one == two
    assert set(one) == {"places.svg", "mqar_throughput.svg", "mqar_curves.svg"}
    for text in one.values():
        ElementTree.fromstring(text)  # hostile names are escaped
        assert "nan" not in re.findall(r' d="[^"]*"', text)
        assert len(text) < 150_000
    assert "odd(a='&lt;&amp;&gt;')" in one["mqar_throughput.svg"]


def test_a_figure_changes_with_its_figures(records):
    before = pictures(assemble(records))["mqar_throughput.svg"].svg()
    after = pictures(assemble(records[1:]))
    assert after["mqar_throughput.svg"].svg() != before


def test_without_records_there_are_no_figures(make):
    assert pictures(assemble([])) == {}
    assert pictures(assemble([make()])) == {}


def test_places_of_many_tracks_stand_apart_and_can_be_read(make):
    longest = "neighborhood(kernel=3, ndim=2)"
    names = ["mha", "no_mixing", longest, *(f"odd_{i}" for i in range(9))]
    records = [
        run
        for track, count in enumerate((12, 3, 7, 2, 10, 4, 12, 2))
        for place, name in enumerate(names[:count])
        for run in seeds(
            *(make, name, [0.1 * place + 0.01 * seed for seed in range(3)]),
            **{"recipe": f"own_{track}", "track": f"track number {track}", "group": f"g{track}"},
        )
    ]
    figure = pictures(assemble(records))["places.svg"].make()
    FigureCanvasAgg(figure).draw()
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    assert len(boxes) == 8
    for one, two in combinations(boxes, 2):
        assert Bbox.intersection(one, two) is None
    assert {label.get_fontsize() for axis in figure.axes for label in axis.get_yticklabels()} == {9}
    assert figure.get_figwidth() < 13  # on a page, nothing has to be made smaller
    heights = {len(a.get_yticks()): a.get_position().height for a in figure.axes}
    assert heights[12] / heights[2] == pytest.approx(6)


def test_figures_by_length(make):
    def run(attention, *values):
        names = (
            "test/accuracy",
            "test_len64/accuracy",
            "test_128/accuracy",
            "test_sparse/accuracy",
        )
        metrics = {"val/accuracy": 0.5, **dict(zip(names, values, strict=True))}
        return [make(attention=attention, seed=s, metrics=metrics) for s in range(3)]

    board = assemble([*run("mha", 0.9, 0.8, 0.7, 0.1), *run("cog", 0.9, 0.9, 0.9, 0.1)])
    (table,) = board.tables
    assert lengths(table) == [(64, "test_len64/accuracy"), (128, "test_128/accuracy")]
    ElementTree.fromstring(pictures(board)["mqar_lengths.svg"].svg())
    # The plain test set is that of the length of training.
    config = {"data": {"seq_len": 32}}
    runs = [
        replace(run, config=config) for one in board.tables for row in one.rows for run in row.runs
    ]
    (table,) = assemble(runs).tables
    assert lengths(table)[0] == (32, "test/accuracy")
    runs = [replace(run, config={"data": {"seq_len": 64}}) for run in runs]
    (table,) = assemble(runs).tables
    assert lengths(table) == [(64, "test/accuracy"), (128, "test_128/accuracy")]


def test_a_measurement_against_length_is_drawn(records):
    content = json.loads((ROOT / "docs/performance/baselines.json").read_text())
    found = pictures(assemble(records), {"layers": content})["layers_growth.svg"].svg()
    assert "N^1.39" in found  # the growth of mha, forward and backward
    shaped = json.loads((ROOT / "docs/performance/vision_triplet.json").read_text())
    assert "x_growth.svg" not in pictures(assemble(records), {"x": shaped})


def test_figures_are_kept_up_beside_the_records(records, tmp_path):
    for record in records:  # of a recipe that does not ship, and so is never stale
        write(replace(record, recipe="own"), tmp_path / "data" / "runs")
    page = tmp_path / "page.md"
    leaderboard.write(tmp_path / "data" / "runs", page)
    assert ".svg" not in page.read_text()
    leaderboard.write(tmp_path / "data" / "runs", page, figures=True)
    links = re.findall(r"\(([^)]*\.svg)\)", page.read_text())
    assert len(links) == 3
    assert all((tmp_path / link).is_file() for link in links)
    assert leaderboard.verify(page, tmp_path / "data" / "runs") == ""
    (tmp_path / "data" / "figures" / "old.svg").write_text("<svg/>")
    with pytest.warns(RecordWarning, match=r"figures of no record: old\.svg"):
        leaderboard.write(tmp_path / "data" / "runs", page)
    assert (tmp_path / "data" / "figures" / "old.svg").exists()


def test_measurements_beside_the_records_are_a_track(records, tmp_path):
    for record in records:
        write(record, tmp_path / "runs")
    bench = tmp_path / efficiency.FOLDER
    bench.mkdir()
    text = (ROOT / "docs/performance/baselines.json").read_text()
    (bench / "layers.json").write_text(text)
    page, _ = leaderboard.page(tmp_path / "runs")
    assert "## Track: Efficiency" in page
    assert "| `linear` | linear |" in page
    (bench / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json is no measurement"):
        leaderboard.page(tmp_path / "runs")


def test_the_published_figures_are_those_of_the_page():
    page = (ROOT / "leaderboard.md").read_text()
    links = set(re.findall(r"\((data/figures/[^)]*\.svg)\)", page))
    there = {f"data/figures/{path.name}" for path in (ROOT / "data" / figures.FOLDER).glob("*.svg")}
    assert links == there
