"""README.md: its Python runs, its table is the registry's, its commands exist."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo import registry
from zoo.docs import catalogue

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_catalogue_is_that_of_the_registry():
    assert catalogue.renew(README) == README, "run: make readme"


def test_missing_markers_are_refused():
    with pytest.raises(zoo.ZooError, match="markers"):
        catalogue.renew("no table here")


@pytest.mark.parametrize("block", [b for b in BLOCKS if "@register" not in b], ids=lambda b: b[:20])
def test_python_of_the_readme_runs(block):
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})


def test_the_mechanism_of_the_readme_works_as_promised(tmp_path, monkeypatch):
    block = next(b for b in BLOCKS if "@register" in b)
    path = tmp_path / "squared_relu.py"
    path.write_text(block, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("squared_relu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "squared_relu", module)
    spec.loader.exec_module(module)
    try:
        attn = zoo.create("squared_relu+rope", 16, 2, causal=True)
        x = torch.randn(2, 7, 16)
        cache = zoo.LayerCache()
        steps = [attn(x[:, i : i + 1], cache=cache) for i in range(7)]
        torch.testing.assert_close(torch.cat(steps, 1), attn(x))
        _, weights = attn(x, need_weights=True)
        assert (weights >= 0).all()
        assert (weights.triu(1) == 0).all()
    finally:
        registry.unregister("squared_relu")


def test_commands_of_the_readme_exist():
    targets = re.findall(r"^make (\w[\w-]*)", README, re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_of_the_readme_and_docs_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
