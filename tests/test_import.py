"""Importing the zoo, and listing and building all of it, brings in torch and nothing heavier."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HEAVY = (
    *("lightning", "torchmetrics", "timm", "datasets", "triton", "omegaconf", "matplotlib"),
    *("typer", "rich", "sklearn", "scipy", "pandas", "transformers", "ray", "torchvision"),
)
STAGES = (
    "import zoo, zoo.host.attention, zoo.host.engine, zoo.host.routes",
    "assert 'mha' in zoo.list()",
    "zoo.create('gqa+none', 8, 2)(torch.zeros(1, 3, 8)).sum().backward()",
    "import omegaconf",  # heavy: to see that it would be seen
)


def _imported(stages: Sequence[str]) -> list[set[str]]:
    """Top-level packages imported on top of torch by the end of each stage, in a new process."""
    report = "print('now', *{name.split('.')[0] for name in set(sys.modules) - before})"
    lines = ["import sys, torch", "before = set(sys.modules)"]
    for stage in stages:
        lines += [stage, report]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines() if line.startswith("now")]


def test_imports_nothing_heavy() -> None:
    *found, heavy = _imported(STAGES)
    assert len(found) == 3
    for stage, names in zip(STAGES, found, strict=False):
        assert "zoo" in names
        assert not names.intersection(HEAVY), f"{stage!r} imports {names.intersection(HEAVY)}"
    assert "omegaconf" in heavy


def test_public_names() -> None:
    import zoo

    for name in zoo.__all__:
        assert getattr(zoo, name).__doc__, f"zoo.{name} has no docstring"
    assert zoo.__all__ == sorted(zoo.__all__)
