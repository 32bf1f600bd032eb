"""A pytest plugin that says which test files cost most processor time, with workers and children.

    pytest -n 2 --processor-time table.md

Wall time depends on what else the machine does; the processor time of a test hardly does.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROWS = 25


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--processor-time", metavar="FILE", help="write the dearest test files to FILE (Markdown)"
    )


class ProcessorTime:
    """Adds up what every phase of every test takes, in seconds by file."""

    def __init__(self) -> None:
        self.before = self.now()
        self.files: Counter[str] = Counter()
        self.tests: Counter[str] = Counter()
        self.count: Counter[str] = Counter()

    @staticmethod
    def now() -> float:
        """Seconds that this process and the children it has waited for have computed."""
        return sum(os.times()[:4])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> None:
        self.before = self.now()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self) -> Any:
        outcome = yield
        now = self.now()
        # xdist carries what a report holds from the worker to the controller.
        outcome.get_result().processor = now - self.before
        self.before = now

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = getattr(report, "processor", 0.0)
        file = report.nodeid.partition("::")[0]
        self.files[file] += seconds
        self.tests[report.nodeid] += seconds
        self.count[file] += report.when == "call"

    def table(self) -> str:
        """The dearest files as a table in Markdown."""
        total = sum(self.files.values())
        lines = ["| file | tests | processor seconds | share |", "| --- | ---: | ---: | ---: |"]
        for file, seconds in self.files.most_common(ROWS):
            share = seconds / total if total else 0.0
            lines.append(f"| {file} | {self.count[file]} | {seconds:.0f} | {share:.1%} |")
        lines.append(f"| all | {sum(self.count.values())} | {total:.0f} | 100 % |")
        return "\n".join(lines) + "\n"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ProcessorTime(), "processor_time_meter")


def pytest_terminal_summary(config: pytest.Config) -> None:
    path = config.getoption("--processor-time")
    meter = config.pluginmanager.get_plugin("processor_time_meter")
    if path and meter is not None and meter.count:
        Path(path).write_text(meter.table(), encoding="utf-8")
