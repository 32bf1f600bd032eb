"""docs/hosts.md: its Python runs, and its table of neutral settings is that of the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_timm_neutral import NEUTRAL

import zoo
from zoo.host.spec import DEFAULTS
from zoo.registry import SOCKETS

PAGE = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_of_the_page_runs(number: int) -> None:
    torch.manual_seed(0)
    exec(compile(BLOCKS[number], "docs/hosts.md", "exec"), {})


def test_the_page_has_python() -> None:
    assert len(BLOCKS) == 5


def test_the_page_lists_the_neutral_settings_that_are_tested() -> None:
    table = PAGE.split("equals softmax attention when |")[1].split("\n\n")[0]
    first = re.findall(r"^\| (`.+?) \|", table, re.M)
    listed = {name for cell in first for name in re.findall(r"`(\w+)", cell)}
    assert listed == set(NEUTRAL) - (set(DEFAULTS.values()) - {"mha"})
    assert listed <= set(zoo.list(kind=SOCKETS))
