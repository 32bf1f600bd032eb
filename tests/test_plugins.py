"""Plug-ins: found through their entry points, and harmless where they are broken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from zoo import registry

PLUGIN = '''
from zoo.parts import Score
from zoo.registry import Paper, Taxonomy, register

_AXES = dict(sequences="self", levels="single", positions="global", representations="single")
_AXES.update(alignment="scaled_dot", distribution="inherited", complexity="quadratic")


@register("from_plugin", kind="score", taxonomy=Taxonomy(**_AXES))
class FromPlugin(Score):
    """Comes from outside."""


def later():
    register("from_call", kind="score", taxonomy=Taxonomy(**_AXES))(type("C", (Score,), {}))
'''


def _with_plugins(folder: Path, points: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code where a distribution with these entry points is installed."""
    (folder / "good_plugin.py").write_text(PLUGIN)
    (folder / "bad_plugin.py").write_text("raise RuntimeError('out of cheese')\n")
    info = folder / "some_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.PLUGIN_GROUP}]\n{points}\n")
    start = f"import sys; sys.path.insert(0, {str(folder)!r}); import zoo\n"
    return subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )


def test_plugins_are_discovered_and_broken_ones_warn(tmp_path: Path) -> None:
    done = _with_plugins(
        tmp_path,
        "a_broken = bad_plugin\nb_missing = no_such_plugin\n"
        "c_module = good_plugin\nd_call = good_plugin:later",
        "print(zoo.list('from_*'), zoo.create('from_plugin', 8, 2).spec, 'mha' in zoo.list())",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['from_call', 'from_plugin'] from_plugin True"
    assert re.search(r"UserWarning: plug-in 'a_broken' \(bad_plugin\).*out of cheese", done.stderr)
    assert "plug-in 'b_missing' (no_such_plugin) could not be loaded" in done.stderr
