"""The hub: a clear and quick refusal without network, and what happens with one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import datasets as hf
import huggingface_hub.constants
import pytest

from zoo import datasets
from zoo.datasets import hub
from zoo.datasets.vision import fashion_mnist
from zoo.errors import ZooError

NEEDS_HUB = {
    "wikitext103": ("Salesforce/wikitext", "bytes_stdlib"),
    "cifar10": ("uoft-cs/cifar10", "digits"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "digits"),
}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the offline switch that the tests run under; nothing here downloads."""
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf, "load_dataset", lambda *_, **__: pytest.fail("tried to download"))


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "none")


@pytest.mark.parametrize("name", NEEDS_HUB)
def test_without_network_the_error_names_what_to_use_instead(name, online, no_package, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    repository, instead = NEEDS_HUB[name]
    data = datasets.create(name)
    with pytest.raises(ZooError) as caught:
        data.setup()
    message = str(caught.value)
    assert message.startswith(f"data set {name!r} needs {repository!r} from the hub: ")
    assert f"use {instead!r}, which needs no network" in message
    assert "root=FOLDER" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert instead in datasets.list()


@pytest.mark.parametrize("name", NEEDS_HUB)
def test_offline_mode_is_refused_without_a_look_at_the_network(name, no_package, monkeypatch):
    # The tests run with the switches of the libraries set, see the conftest above.
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("looked at the network"))
    with pytest.raises(ZooError, match=r"HF_HUB_OFFLINE and .* is set and there is no copy in the"):
        datasets.create(name).setup()


def test_a_fresh_process_in_offline_mode_names_the_way_out(tmp_path):
    # Lightning takes most of the time to start and plays no part, so an empty class stands in.
    code = (
        "import sys, types\n"
        "stand_in = types.SimpleNamespace(LightningDataModule=type('Base', (), {}))\n"
        "sys.modules['lightning'] = stand_in\n"
        "import zoo.datasets as d\n"
        "try:\n    d.create('cifar10').setup()\n"
        "except ValueError as error:\n    print(error)\n"
    )
    switches = ("HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key not in switches}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert "data set 'cifar10' needs 'uoft-cs/cifar10' from the hub: HF_HUB_OFFLINE is set and" in (
        result.stdout
    )
    assert "use 'digits'" in result.stdout


def test_what_the_hub_has_is_returned(online, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: True)
    asked = []
    monkeypatch.setattr(hf, "load_dataset", lambda *names: asked.append(names) or "data")
    loaded = hub.load("owner/name", "large", name="mine", instead="digits", local="root=FOLDER")
    assert loaded == "data"
    assert asked == [("owner/name", "large")]


def test_a_failed_download_keeps_its_reason(online, monkeypatch):
    def fail(*_: object) -> None:
        raise ConnectionError("the cable was cut")

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(hf, "load_dataset", fail)
    with pytest.raises(ZooError, match="from the hub: the cable was cut; use 'digits'"):
        hub.load("owner/name", name="mine", instead="digits", local="root=FOLDER")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch):
    """Point the hub at an address, with no proxy in between."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def point(address: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)

    return point


def test_a_listening_hub_is_reachable_and_a_closed_one_is_not(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        endpoint(f"http://127.0.0.1:{port}")
        assert hub.reachable()
    assert not hub.reachable()


def test_a_name_that_is_looked_up_for_ever_does_not_hold_us_up(endpoint, monkeypatch):
    release = threading.Event()

    def hang(*_: object, **__: object) -> None:
        release.wait(60)
        raise OSError("released")

    endpoint("https://hub.invalid")
    monkeypatch.setattr(socket, "create_connection", hang)
    assert not hub.reachable(timeout=0.05)
    assert not release.is_set()
    release.set()


def test_behind_a_proxy_the_download_itself_decides(endpoint, monkeypatch):
    endpoint("https://hub.invalid")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    assert hub.reachable()


def test_the_check_is_quicker_than_two_seconds():
    assert hub.TIMEOUT < 2
