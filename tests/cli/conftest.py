"""The command line called in the same process, and one tiny trained run to look into."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from zoo.cli import app

Call = Callable[..., Result]
TINY = [
    *("steps=2", "trainer.eval_every=2", "batch=4", "data.eval_batch_size=8"),
    *("model.dim=16", "model.depth=1", "model.heads=2", "data.seq_len=16"),
]
TEXT = [*TINY, "data.max_bytes=200000", "data.val_windows=8", "data.test_windows=8"]
RECALL = [*TINY, "data.val_size=16", "data.test_size=16", "data.pairs=2", "data.vocab_size=32"]


@pytest.fixture
def zoo_cli() -> Call:
    """Call ``zoo`` with some words and return what came of it."""

    def call(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return call


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call ``python -m zoo`` as a process of its own."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "zoo", *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "80"},
        )

    return call


@dataclass(frozen=True)
class Trained:
    """Where a trained run is."""

    records: Path
    runs: Path
    id: str

    @property
    def options(self) -> list[str]:
        """Options that point the command line there."""
        return ["--records", str(self.records), "--runs", str(self.runs)]


def _train(folder: Path, recipe: str, overrides: list[str]) -> Trained:
    from zoo.runs.train import run

    record = run(recipe, overrides, records=folder / "records", runs=folder, quiet=True)
    return Trained(folder / "records", folder, record.id)


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A language model after two steps."""
    return _train(tmp_path_factory.mktemp("text"), "bytes", TEXT)


@pytest.fixture(scope="session")
def recall_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model of a tagging task after two steps."""
    return _train(tmp_path_factory.mktemp("recall"), "mqar", RECALL)


@pytest.fixture
def recall() -> list[str]:
    """Overrides of the tagging run."""
    return RECALL


@pytest.fixture
def only_line() -> Callable[[Result], str]:
    """Take the one line on standard error."""

    def take(result: Result) -> str:
        lines = result.stderr.splitlines()
        assert len(lines) == 1, lines
        assert "Traceback" not in result.output
        return lines[0]

    return take
