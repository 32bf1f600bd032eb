"""Plots of time and memory: over length with two logarithmic axes, or in bars for shapes."""

from __future__ import annotations

from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from zoo.bench.measurement import Report, Row
from zoo.bench.shapes import ShapeSetting


def draw(report: Report) -> Figure:
    """Draw time above memory, one column for each pass; the legend has the growth of time.

    Args:
        report: The measurement.
    """
    setting = report.setting
    if isinstance(setting, ShapeSetting):
        return _bars(report, setting)
    columns = len(setting.passes)
    figure = Figure(figsize=(1.4 + 4.6 * columns, 7.2), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, sharex=True, sharey="row")
    clock = "elapsed" if setting.device == "cuda" else "processor"
    for column, kind in enumerate(setting.passes):
        time, memory = axes[:, column]
        for index, spec in enumerate(setting.specs):
            _lines(report, time, memory, spec, kind, index)
        time.set_title(kind)
        memory.set_xlabel("length N (tokens)")
        for axis in (time, memory):
            _scales(axis, setting.lengths)
    axes[0, 0].set_ylabel(f"{clock} time of a call (ms)")
    axes[1, 0].set_ylabel("peak memory of a call (MiB)")
    causal = "causal" if setting.causal else "bidirectional"
    drawn = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    labels = [_label(report, spec) for spec in drawn]
    figure.legend(
        drawn.values(), labels, fontsize=8, loc="outside lower center", ncols=min(3, columns + 1)
    )
    figure.suptitle(
        f"B={setting.batch}, C={setting.dim}, H={setting.heads}, {causal}, {setting.dtype}, "
        f"{setting.device}, threads={setting.threads}"
    )
    return figure


def _bars(report: Report, setting: ShapeSetting) -> Figure:
    """Time above memory, one column for each pass; a group of bars for each shape."""
    columns = len(setting.passes)
    figure = Figure(figsize=(1.4 + 4.6 * columns, 7.2), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, sharex=True, sharey="row")
    width = 0.8 / len(setting.specs)
    for column, kind in enumerate(setting.passes):
        for index, spec in enumerate(setting.specs):
            rows = report.of(spec, kind)
            places = [i + width * (index + 0.5) - 0.4 for i in range(len(rows))]
            color = colormaps["tab10"](index % 10)
            times = [1e3 * (row.time or 0.0) for row in rows]
            errors = [500 * _iqr(row) for row in rows]
            axes[0, column].bar(places, times, width, yerr=errors, color=color, label=spec)
            held = [(row.memory or 0) / 2**20 for row in rows]
            axes[1, column].bar(places, held, width, color=color)
        axes[0, column].set_title(kind)
        names = [setting.label(case) for case in setting.cases]
        axes[1, column].set_xticks(range(len(names)), names, rotation=20)
    clock = "elapsed" if setting.device == "cuda" else "processor"
    axes[0, 0].set_ylabel(f"{clock} time of a call (ms)")
    axes[1, 0].set_ylabel("peak memory of a call (MiB)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    labels = [label.replace("$", r"\$") for label in labels]
    figure.legend(
        handles, labels, fontsize=8, loc="outside lower center", ncols=min(3, columns + 1)
    )
    host = f"in {setting.host}, " if setting.host else ""
    figure.suptitle(f"{host}{setting.dtype}, {setting.device}, threads={setting.threads}")
    return figure


def _lines(report: Report, time: Axes, memory: Axes, spec: str, kind: str, index: int) -> None:
    rows = [row for row in report.of(spec, kind) if row.time]
    if not rows:
        return
    style: dict[str, Any] = {
        "color": colormaps["tab10"](index % 10),
        "marker": "osD^vP*X"[index % 8],
        "linestyle": "--" if spec == report.setting.baseline else "-",
        "zorder": 3 if spec == report.setting.baseline else 2,
        "markersize": 5,
    }
    lengths = [row.length for row in rows]
    middle = [1e3 * (row.time or 0.0) for row in rows]
    time.plot(lengths, middle, label=spec, **style)
    half = [500 * _iqr(row) for row in rows]
    low = [max(m - h, m / 10) for m, h in zip(middle, half, strict=True)]
    high = [m + h for m, h in zip(middle, half, strict=True)]
    time.fill_between(lengths, low, high, color=style["color"], alpha=0.2, linewidth=0)
    memory.plot(lengths, [(row.memory or 0) / 2**20 for row in rows], **style)


def _label(report: Report, spec: str) -> str:
    """A contender with the exponents of its time, one for each pass."""
    found = [report.growth(spec, kind) for kind in report.setting.passes]
    powers = " and ".join(f"N^{growth:.2f}" for growth in found if growth is not None)
    return (f"{spec} ~ {powers}" if powers else spec).replace("$", r"\$")


def _iqr(row: Row) -> float:
    found = row.wall_iqr if row.cpu is None else row.cpu_iqr
    return found or 0.0


def _scales(axis: Axes, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="major", alpha=0.4)
    axis.grid(True, which="minor", axis="y", alpha=0.15)
