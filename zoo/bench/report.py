"""What becomes of a measurement: tables for the terminal, a JSON file and a plot."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zoo.bench.measurement import Report, Row
from zoo.bench.memory import METHODS
from zoo.bench.settings import Setting
from zoo.bench.shapes import AXES, ShapeSetting
from zoo.report import environment
from zoo.report.files import replace_text

SCHEMA = 1


def slug(report: Report) -> str:
    """Name of the folder of a measurement, safe on every file system."""
    setting = report.setting
    names = "-".join(setting.specs)[:80]
    if isinstance(setting, ShapeSetting):
        shapes = "-".join(map(setting.label, setting.shapes))[:60]
        words = "-".join(filter(None, (setting.host, names, shapes, setting.device)))
    else:
        words = f"{names}-d{setting.dim}h{setting.heads}b{setting.batch}-{setting.device}"
        words += ("-causal" if setting.causal else "") + ("-core" if setting.core else "")
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", words)


def direction(setting: Mapping[str, Any]) -> str:
    """Say who sees whom."""
    if setting["causal"]:
        return "causal"
    against = f", but {setting['baseline']} causal" if setting.get("causal_baseline") else ""
    return f"bidirectional{against}"


def sizes(setting: Mapping[str, Any]) -> str:
    """Say what was measured, and how large it was.

    Args:
        setting: A setting as plain data.
    """
    if "shapes" in setting:
        where = f"inside {setting['host']}, " if setting["host"] else ""
        slots = f", {setting['slots']} slots" if setting["sort"] == "slots" else ""
        return f"{where}inputs ({AXES[setting['sort']]}){slots}"
    core = "core only, " if setting["core"] else ""
    return (
        f"B={setting['batch']} C={setting['dim']} H={setting['heads']} {direction(setting)} {core}"
    ).rstrip(", ")


def header(report: Report) -> str:
    """How the figures came about, in a few lines."""
    s = report.setting
    where = environment.device(s.device)
    clock = "processor time" if s.device == "cpu" else "elapsed time"
    growth = f"growth: exponent p of {clock} ~ N^p over the last three lengths"
    if isinstance(s, ShapeSetting):
        growth = f"{_unit(s)}/s: by the median {clock}; forward is in evaluation mode"
    return "\n".join(
        [
            f"{sizes(plain(s))}, {s.dtype}, {where['name']} ({s.device}, threads={s.threads})",
            "ms, CPU ms: median elapsed and processor time of a call, each with its interquartile "
            "range, over interleaved rounds",
            f"speed: times as fast as {s.baseline!r} in the same rounds",
            growth,
            f"MiB: {METHODS[s.device]}, results included, parameters and input not",
            "GFLOP: torch.utils.flop_counter, counted in calls that are not timed",
        ]
    )


def plain(setting: Setting | ShapeSetting) -> dict[str, Any]:
    """A setting as plain data."""
    found = asdict(setting)
    if isinstance(setting, ShapeSetting):
        found["sort"] = setting.sort
    return found


def _unit(setting: ShapeSetting) -> str:
    return "images" if setting.host else "samples"


def show(report: Report, console: Console) -> None:
    """Print the header and one table for each pass."""
    console.print(Text(header(report)))
    for kind in report.setting.passes:
        console.print()
        console.print(_table(report, kind))
        for line in _failures(report, kind):
            console.print(Text(line, style="red"), soft_wrap=True)


def _table(report: Report, kind: str) -> Table:
    on_cpu = report.setting.device == "cpu"
    table = Table(
        title=kind,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    setting = report.setting
    shaped = isinstance(setting, ShapeSetting)
    table.add_column("shape" if shaped else "N", justify="right", no_wrap=True)
    for name in ("contender", "route"):
        table.add_column(name, overflow="fold")
    figures = ["ms", "IQR", "speed"]
    figures += ["CPU ms", "IQR", "speed"] if on_cpu else []
    last_column = f"{_unit(setting)}/s" if isinstance(setting, ShapeSetting) else "growth"
    for name in (*figures, "MiB", "GFLOP", last_column):
        table.add_column(name, justify="right", no_wrap=True)
    for i, case in enumerate(setting.cases):
        for spec in setting.specs:
            row = report.of(spec, kind)[i]
            last = i == len(setting.cases) - 1
            table.add_row(setting.label(case), Text(spec), *_cells(report, row, on_cpu, last))
        table.add_section()
    return table


def _cells(report: Report, row: Row, on_cpu: bool, last: bool) -> list[Text | str]:
    if row.error is not None:
        return [Text("failed", style="red")]
    cells = [row.route, _milli(row.wall), _milli(row.wall_iqr), _figure(row.speed_wall, ".2f", "x")]
    if on_cpu:
        cells += [_milli(row.cpu), _milli(row.cpu_iqr), _figure(row.speed_cpu, ".2f", "x")]
    cells.append(_figure(None if row.memory is None else row.memory / 2**20, ".2f"))
    cells.append(_figure(None if row.flops is None else row.flops / 1e9, ".3g"))
    if isinstance(report.setting, ShapeSetting):
        cells.append(_figure(row.rate, ".4g"))
    else:
        cells.append(_figure(report.growth(row.spec, row.kind), ".2f") if last else "")
    return list(cells)


def _failures(report: Report, kind: str) -> list[str]:
    """One line for each reason, with the cases in which it came up."""
    shaped = isinstance(report.setting, ShapeSetting)
    found: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row.kind == kind and row.error is not None:
            found.setdefault((row.spec, row.error), []).append(
                report.setting.label(row.shape) if shaped else str(row.length)
            )
    at = "" if shaped else "N = "
    return [f"{spec} at {at}{', '.join(n)} failed: {why}" for (spec, why), n in found.items()]


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _milli(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"


def as_json(report: Report) -> dict[str, Any]:
    """Everything about a measurement as plain data, times in seconds and memory in bytes."""
    setting = report.setting
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "setting": plain(setting),
        "memory_method": METHODS[setting.device],
        "device": {**environment.device(setting.device), "threads": setting.threads},
        "versions": environment.versions(),
        "commit": environment.commit(),
        "rows": [asdict(row) for row in report.rows],
        "growth": {
            spec: {kind: report.growth(spec, kind) for kind in setting.passes}
            for spec in setting.specs
        },
    }


def save(report: Report, folder: str | Path) -> list[Path]:
    """Write ``bench.json``, ``bench.png`` and ``bench.svg`` into a folder, which is created.

    Returns:
        The files.

    Raises:
        ZooError: The folder or a file cannot be written.
    """
    from zoo.bench.plot import draw
    from zoo.pictures.show import save_figure

    folder = Path(folder)
    text = json.dumps(as_json(report), indent=1, sort_keys=True, allow_nan=False) + "\n"
    paths = [replace_text(folder / "bench.json", text)]
    figure = draw(report)
    for suffix in ("png", "svg"):
        paths.append(save_figure(figure, folder / f"bench.{suffix}"))
    return paths
