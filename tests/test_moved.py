"""Old names of what has moved: each works, gives the very same thing, and warns once."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from zoo import _moved

FUNCTIONS = [(module, name) for module, names in _moved.FUNCTIONS.items() for name in names]


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Let every test import the old names for the first time."""
    for old in _moved.MODULES:
        monkeypatch.delitem(sys.modules, old, raising=False)


@pytest.mark.parametrize("old", _moved.MODULES)
def test_an_old_module_is_the_new_one_and_warns_once(old):
    with pytest.warns(FutureWarning) as caught:
        found = importlib.import_module(old)
    assert [str(item.message) for item in caught] == [f"{old} is called {_moved.MODULES[old]} now"]
    assert found is importlib.import_module(_moved.MODULES[old])
    assert found.__spec__.name == _moved.MODULES[old]
    assert importlib.import_module(old) is found  # a second warning would be an error


@pytest.mark.parametrize("package", _moved.PACKAGES)
def test_what_a_module_held_that_is_a_package_now(package):
    new = importlib.import_module(_moved.PACKAGES[package])
    held = importlib.import_module(package)
    name = next(
        key
        for key, value in vars(new).items()
        if getattr(value, "__module__", "") == new.__name__
        and not key.startswith("_")
        and key not in vars(held)
    )
    with pytest.warns(FutureWarning, match=f"{package}.{name} is called {new.__name__}.{name} now"):
        assert getattr(held, name) is getattr(new, name)
    assert getattr(held, name) is getattr(new, name)
    delattr(held, name)
    with pytest.raises(AttributeError, match="has no attribute 'unheard_of'"):
        _ = held.unheard_of


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_a_function_that_left_its_module(module, name):
    held = importlib.import_module(module)
    new = importlib.import_module(_moved.FUNCTIONS[module][name])
    if name in vars(held):  # the module uses it itself, so that it is there as before
        assert getattr(held, name) is getattr(new, name)
        return
    with pytest.warns(FutureWarning, match=f"is called {new.__name__}.{name} now"):
        assert getattr(held, name) is getattr(new, name)
    delattr(held, name)


def test_an_attribute_of_the_package_is_reached_without_an_import():
    code = "import zoo, warnings; warnings.simplefilter('ignore'); print(zoo.engine.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "zoo.host.engine"


def test_nothing_of_the_project_uses_an_old_name():
    code = (
        "import warnings; warnings.simplefilter('error');"
        "import zoo.cli, zoo.runs.train, zoo.leaderboard.page.html, zoo.doctor, zoo.sweeps.nursery;"
        "import zoo; zoo.list(); zoo.models.names(); zoo.datasets.list(); zoo.tasks.names()"
    )
    subprocess.run([sys.executable, "-W", "error::FutureWarning:__main__", "-c", code], check=True)
