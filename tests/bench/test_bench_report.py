from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from zoo.bench import Report, Row, Setting, report
from zoo.bench.plot import draw
from zoo.errors import ZooError

GOOD = {
    "wall": 2e-3,
    "wall_iqr": 1e-4,
    "speed_wall": 1.5,
    "speed_cpu": 1.4,
    "memory": 3 * 2**20,
    "flops": 5 * 10**9,
}


@pytest.fixture
def made() -> Report:
    setting = Setting(specs=["rope", "entmax"], lengths=[64, 128])
    rows = []
    for length in (64, 128):
        for kind in setting.passes:
            for spec in setting.specs:
                row = Row(spec, length, kind, "sdpa", cpu=1e-6 * length, cpu_iqr=1e-7, **GOOD)
                rows.append(row)
    rows[2] = Row("entmax", 64, "forward", error="no [room] at all")
    return Report(setting, rows)


def printed(made: Report) -> str:
    out = io.StringIO()
    report.show(made, Console(file=out, width=200))
    return out.getvalue()


def test_table_shows_every_figure(made: Report) -> None:
    text = printed(made)
    assert "mha+rope" in text
    assert text.count("entmax at N = 64 failed: no [room] at all") == 1
    for figure in ("  2  ", "  0.1  ", "1.50x", "0.064", "0.0001", "1.40x", "3.00", "sdpa", "1.00"):
        assert figure in text
    assert "forward+backward" in text
    assert "torch.profiler" in text


def test_table_without_processor_times_has_no_such_columns(made: Report) -> None:
    made.setting.device = "cpu"
    assert "CPU ms" in printed(made)
    for row in made.rows:
        row.cpu = row.cpu_iqr = row.speed_cpu = None
    assert made.rows[0].time == made.rows[0].wall


def test_json_holds_everything(made: Report, tmp_path: Path) -> None:
    paths = report.save(made, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["bench.json", "bench.png", "bench.svg"]
    found = json.loads(paths[0].read_text())
    assert found["schema"] == 1
    assert found["setting"]["lengths"] == [64, 128]
    assert len(found["rows"]) == len(made.rows)
    assert found["rows"][2]["error"] == "no [room] at all"
    assert found["growth"]["mha"]["forward"] == pytest.approx(1.0)
    assert set(found["versions"]) >= {"torch", "python"}
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert "forward+backward" in paths[2].read_text()


def test_an_unwritable_folder_is_one_line(made: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="cannot write"):
        report.save(made, tmp_path / "file" / "below")


def test_plot_has_a_line_for_every_contender(made: Report) -> None:
    figure = draw(made)
    assert isinstance(figure, Figure)
    time, other, memory, _ = figure.axes
    assert [line.get_label() for line in time.get_lines()] == ["mha", "mha+rope", "entmax"]
    assert time.get_xscale() == time.get_yscale() == memory.get_yscale() == "log"
    assert (time.get_title(), other.get_title()) == ("forward", "forward+backward")
    # The length at which it failed is left out, the other is shown.
    assert list(time.get_lines()[2].get_xdata()) == [128]
    assert list(memory.get_lines()[0].get_ydata()) == [3.0, 3.0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "mha ~ N^1.00 and N^1.00"


def test_plot_of_failures_only(made: Report) -> None:
    for row in made.rows:
        row.wall = row.cpu = None
    assert draw(made).legends[0].get_texts() == []


def test_slug_is_safe_and_tells_settings_apart(made: Report) -> None:
    name = report.slug(made)
    assert name == "mha-mha_rope-entmax-d512h8b1-cpu-causal"
    made.setting.specs = ["sliding_window(window=3)" * 20]
    assert len(report.slug(made)) < 120
    assert "/" not in report.slug(made)
