"""What becomes of a measurement of kernels: lines for the terminal, and a record in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zoo.bench.kernels import PASSES, Report
from zoo.report import environment
from zoo.report.files import replace_text
from zoo.report.markdown import NONE, table

SCHEMA = "kernels-1"


def as_json(report: Report) -> dict[str, Any]:
    """Everything about a measurement as plain data: seconds, bytes, operations a second."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": environment.device(report.plan.device),
        "versions": environment.versions(),
        "commit": environment.commit(),
        **report.as_dict(),
    }


def save(content: Mapping[str, Any], folder: str | Path) -> Path:
    """Write a record, named after device and time, into a folder, which is created."""
    words = f"kernels-{content['device']['name']}-{content['created']}"
    name = re.sub(r"[^A-Za-z0-9_.=-]+", "_", words)
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return replace_text(Path(folder) / f"{name}.json", text)


def tables(content: Mapping[str, Any]) -> str:
    """Tables of a record in Markdown: the machine, the checks, and one for each pass."""
    plan, peaks = content["plan"], content["peaks"]
    lines = [
        f"{content['device']['name']}, PyTorch {content['versions']['torch']}, {plan['dtype']}; "
        f"peaks in the same process: matrix product {peaks['matmul'] / 1e12:.3g} TFLOP/s, copy "
        f"{peaks['copy'] / 1e9:.3g} GB/s.",
    ]
    if plan["smoke"]:
        lines += ["", "**Smoke mode in Triton's interpreter: the times mean nothing.**"]
    lines += ["", "**Kernels against the reference in float64** (relative errors)", ""]
    lines.append(
        table(
            ["case", "dtype", "N", "output", "gradients", "verdict"],
            [
                [
                    *(check["case"], check["dtype"], str(check["length"])),
                    *(_figure(check[name], ".1e") for name in ("output", "gradient")),
                    "right" if check["right"] else f"WRONG{_because(check['error'])}",
                ]
                for check in content["checks"]
            ],
            left=2,
        ).rstrip("\n")
    )
    for kind in PASSES:
        lines += ["", f"**{kind}**", "", _times(content, kind).rstrip("\n")]
    failed = dict.fromkeys(
        f"{cell['case']}, {cell['contender']}: {cell['error']}"
        for cell in content["cells"]
        if cell["error"]
    )
    lines += ["", *(f"- {line}" for line in [*failed, *content["left_out"]])]
    return "\n".join(lines).rstrip("\n")


def _because(error: str | None) -> str:
    return f": {error}" if error else ""


def _times(content: Mapping[str, Any], kind: str) -> str:
    header = ["case", "contender", "N", "ms", "x sdpa", "TFLOP/s", "of matmul", "GB/s", "of copy"]
    order = list(dict.fromkeys(cell["case"] for cell in content["cells"]))
    cells = [c for c in content["cells"] if c["kind"] == kind and c["seconds"] is not None]
    cells.sort(key=lambda c: (order.index(c["case"]), c["length"]))
    rows = [
        [
            *(cell["case"], cell["contender"], str(cell["length"])),
            f"{1e3 * cell['seconds']:.3g}",
            _figure(cell["speed"], ".2f"),
            _figure(cell["tflops"], ".3g"),
            _figure(cell["of_matmul"], ".1%"),
            _figure(cell["gbytes"], ".3g"),
            _figure(cell["of_copy"], ".1%"),
            NONE if cell["memory"] is None else f"{cell['memory'] / 2**20:.0f}",
        ]
        for cell in cells
    ]
    return table([*header, "MiB"], rows, left=2)


def _figure(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"
