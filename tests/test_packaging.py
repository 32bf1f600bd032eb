"""The wheel: it carries recipes and data, and an installation finds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoo import resources
from zoo.errors import ZooError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder into which a wheel of this checkout has been installed, without its dependencies."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "zoo"
    # Building writes into the tree, so build a copy of what git would ship.
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    quiet = {"cwd": source, "check": True, "capture_output": True, "text": True}
    build = ["--no-build-isolation", "--no-deps", "-w", str(wheels), str(source)]
    subprocess.run([*pip, "wheel", *build], **quiet)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], **quiet)
    return target


def run(code: str, installed: Path, tmp_path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_checkout_finds_its_folders():
    assert resources.folder("recipes") == ROOT / "recipes"
    assert resources.folder("data") == ROOT / "data"


def test_an_unknown_folder_is_refused():
    with pytest.raises(ZooError, match="nothing_here"):
        resources.folder("nothing_here")


@pytest.mark.slow
def test_an_installed_wheel_finds_them_too(installed, tmp_path):
    code = (
        "import zoo, zoo.resources as r; print(zoo.__file__);"
        "print(r.folder('recipes')); print(r.folder('data'));"
        "from zoo.runs.config import recipes; print(' '.join(recipes()))"
    )
    where, recipes, data, names = run(code, installed, tmp_path).splitlines()
    assert Path(where).is_relative_to(installed)
    assert Path(recipes) == installed / "zoo" / "_recipes"
    assert Path(data) == installed / "zoo" / "_data"
    assert {"mqar", "bytes", "digits"} <= set(names.split())
    shipped = {p.relative_to(recipes).as_posix() for p in Path(recipes).rglob("*.yaml")}
    assert shipped == {p.relative_to(ROOT / "recipes").as_posix() for p in tracked("recipes")}
    for name in ("runs", "bench"):
        held = {p.relative_to(data).as_posix() for p in (Path(data) / name).rglob("*.*")}
        there = tracked(f"data/{name}")
        assert held == {p.relative_to(ROOT / "data").as_posix() for p in there}


@pytest.mark.slow
def test_an_installed_wheel_makes_the_html_page(installed, tmp_path):
    code = (
        "from pathlib import Path; from zoo.runs import html;"
        "text = html.render([], draw=None)['index.html']; print(html.__file__);"
        "names = {'page.css', 'page.js', 'index.html.jinja', 'mechanism.html.jinja'};"
        "there = {path.name for path in (Path(html.__file__).parent / '_html').iterdir()};"
        "print(names <= there, '<style>' in text)"
    )
    where, found = run(code, installed, tmp_path).splitlines()
    assert Path(where).is_relative_to(installed)
    assert found == "True True"


@pytest.mark.slow
def test_an_installed_wheel_trains(installed, tmp_path):
    code = (
        "from zoo.cli import main; import sys; sys.argv = ['zoo', 'run', 'mqar', 'steps=2',"
        "'trainer.eval_every=2', 'data.batch_size=4', 'model.dim=16', '--quiet']; main()"
    )
    run(code, installed, tmp_path)
    assert list((tmp_path / "runs" / "records").glob("*.json"))


def tracked(folder: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [ROOT / line for line in listed.stdout.splitlines() if line.endswith((".yaml", ".json"))]
