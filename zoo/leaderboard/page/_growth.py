"""Time and memory of a layer against the length, from a measurement of `zoo bench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

_LINES = ("-", "--", ":")


def against_length(content: Mapping[str, Any]) -> Figure:
    """Draw time above memory on logarithmic axes; the legend has the growth of time.

    Args:
        content: A measurement, as its JSON file holds it.
    """
    setting = content["setting"]
    kind = "forward+backward" if setting.get("backward", True) else "forward"
    figure = Figure(figsize=(9.5, 7.5))
    time, memory = figure.subplots(2, 1, sharex=True)
    shades = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for index, spec in enumerate(setting["specs"]):
        rows = [
            row
            for row in content["rows"]
            if row["spec"] == spec and row["kind"] == kind and row["error"] is None
        ]
        growth = content["growth"][spec][kind]
        label = spec if growth is None else f"{spec}: N^{growth:.2f}"
        look = {
            "color": "black" if spec == setting["baseline"] else shades[index % len(shades)],
            "ls": _LINES[index // len(shades) % len(_LINES)],
            "lw": 2.0 if spec == setting["baseline"] else 1.0,
        }
        on_cpu = setting["device"] == "cpu"
        spent = [(row["length"], 1000 * (row["cpu"] if on_cpu else row["wall"])) for row in rows]
        held = [(row["length"], row["memory"] / 2**20) for row in rows if row["memory"]]
        if spent:
            time.plot(*zip(*spent, strict=True), label=label, **look)
        if held:
            memory.plot(*zip(*held, strict=True), **look)
    for axis in (time, memory):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(setting["lengths"]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    clock = "processor" if setting["device"] == "cpu" else "elapsed"
    time.set_ylabel(f"{clock} time of {kind} (ms)")
    memory.set_ylabel("peak memory of a call (MiB)")
    memory.set_xlabel(
        f"tokens N; B = {setting['batch']}, dim {setting['dim']}, {setting['heads']} heads, "
        f"{setting['dtype']}, {content['device']['name']}"
    )
    time.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=7,
        title="growth of time",
        title_fontsize=8,
    )
    return figure
