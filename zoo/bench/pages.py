"""Tables of measurements in a page, written from the JSON files of `zoo bench` and `zoo kernels`.

``python -m zoo.bench.pages docs/performance.md`` renews every table between two markers::

    <!-- begin bench performance/baselines.json -->
    <!-- end bench -->

The path is that of the file, as seen from the page.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.bench import kernel_report
from zoo.bench.report import direction, sizes
from zoo.errors import ZooError
from zoo.report.markdown import NONE, code, milliseconds, table

_TABLE = re.compile(r"<!-- begin bench (\S+) -->.*?<!-- end bench -->", re.S)


def tables(content: Mapping[str, Any]) -> str:
    """Return the conditions of a measurement, and one table for each pass.

    Args:
        content: What `zoo.bench.report.as_json` returned.
    """
    setting, device, versions = (content[key] for key in ("setting", "device", "versions"))
    shaped = "shapes" in setting
    layer = "from q, k and v to the heads" if setting.get("core") else "a layer with projections"
    what = (
        sizes(setting)
        if shaped
        else f"B = {setting['batch']}, dim {setting['dim']}, {setting['heads']} heads, "
        f"{direction(setting)}; {layer}"
    )
    growth = "" if shaped else " Growth: exponent of the time over the last three lengths."
    lines = [
        f"{device['name']}, {setting['device']}, threads {setting['threads']}, PyTorch "
        f"{versions['torch']}, {setting['dtype']}; {what}. "
        f"Cells: {'processor' if setting['device'] == 'cpu' else 'elapsed'} time in ms, in "
        f"brackets the speed against {code(setting['baseline'])} (median over at least "
        f"{setting['rounds']} interleaved rounds, above 1 is faster).{growth} MiB: peak of a call "
        "beyond its input.",
    ]
    for kind in dict.fromkeys(row["kind"] for row in content["rows"]):
        lines += ["", f"**{kind}**", "", _one(content, kind).rstrip("\n")]
    return "\n".join(lines)


def _one(content: Mapping[str, Any], kind: str) -> str:
    shaped = "shapes" in content["setting"]
    shapes = ["x".join(map(str, shape)) for shape in content["setting"].get("shapes", ())]
    names = shapes if shaped else content["setting"]["lengths"]

    def case(row: Mapping[str, Any]) -> Any:
        return "x".join(map(str, row["shape"])) if shaped else row["length"]

    rows = {(r["spec"], case(r)): r for r in content["rows"] if r["kind"] == kind}
    columns = names if shaped else [f"N = {n}" for n in names]
    header = ["contender", "route", *columns, *(() if shaped else ("growth",))]
    header += [f"MiB at {n}" for n in names]
    cells = []
    for spec in content["setting"]["specs"]:
        own = [rows[spec, n] for n in names]
        growth = content["growth"][spec][kind]
        measured = [row["route"] for row in own if row["error"] is None]
        last = () if shaped else (NONE if growth is None else f"{growth:.2f}",)
        cells.append(
            [
                code(spec),
                ", ".join(dict.fromkeys(measured)) or NONE,
                *map(_time, own),
                *last,
                *(_memory(row["memory"]) for row in own),
            ]
        )
    return table(header, cells, left=2)


def _time(row: Mapping[str, Any]) -> str:
    if row["error"] is not None:
        return "left out" if row["error"].startswith("left out") else "failed"
    on_cpu = row["cpu"] is not None
    found, speed = (row["cpu"], row["speed_cpu"]) if on_cpu else (row["wall"], row["speed_wall"])
    return milliseconds(found) + (NONE if speed is None else f" ({speed:.2f})")


def _memory(size: int | None) -> str:
    return NONE if size is None else f"{size / 2**20:.0f}"


def renew(text: str, folder: Path) -> str:
    """Return a page with every table between its markers written anew.

    Args:
        text: The page.
        folder: Folder of the page.

    Raises:
        ZooError: The page has no markers, or a file that it names cannot be read.
    """

    def written(found: re.Match[str]) -> str:
        path = folder / found[1]
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("schema") == kernel_report.SCHEMA:
                body = kernel_report.tables(content)
            else:
                body = tables(content)
        except OSError as error:
            raise ZooError(f"{path}: {error.strerror or error}") from None
        except (ValueError, LookupError, TypeError) as error:
            raise ZooError(
                f"{path} is no measurement of 'zoo bench' or 'zoo kernels': {error!r}"
            ) from None
        return f"<!-- begin bench {found[1]} -->\n\n{body}\n\n<!-- end bench -->"

    result, count = _TABLE.subn(written, text)
    if not count:
        raise ZooError("the page has no table; mark one by '<!-- begin bench FILE.json -->'")
    return result


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m zoo.bench.pages docs/performance.md")
    try:
        page = Path(sys.argv[1])
        page.write_text(renew(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")
    except (OSError, ZooError) as problem:
        raise SystemExit(f"error: {problem}") from None
