from __future__ import annotations

import socket
import subprocess
import threading
import time

import pytest

from zoo.errors import ZooError
from zoo.sweeps import cluster_address
from zoo.sweeps.cluster_address import parse, resolve


@pytest.fixture
def listener():
    """A port where somebody listens and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed():
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return port


@pytest.fixture
def trial(monkeypatch):
    """Replace the connection by another process: what it is given is kept."""
    given = []

    def answer(code=0, stderr=b"", late=False):
        def run(command, **options):
            given.append((command[-1], options["timeout"]))
            if late:
                raise subprocess.TimeoutExpired(command, options["timeout"], stderr=stderr)
            return subprocess.CompletedProcess(command, code, b"", stderr)

        monkeypatch.setattr(cluster_address.subprocess, "run", run)
        return given

    return answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("head:6379", ("head", 6379)),
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://a-b.example.org:10001", ("a-b.example.org", 10001)),
        ("[::1]:6379", ("::1", 6379)),
    ],
)
def test_addresses(text, found):
    assert parse(text) == found


@pytest.mark.parametrize(
    "text",
    ["", "head", "head:", ":6379", "http://head:80", "head:x", "head:123456", "a b:1", "ray://x"],
)
def test_a_malformed_address_is_refused_with_what_is_allowed(text):
    with pytest.raises(ZooError, match=r"cannot be read; allowed: HOST:PORT, ray://HOST:PORT"):
        resolve(text)


@pytest.mark.parametrize("port", [0, 65536, 99999])
def test_a_port_must_be_one(port):
    with pytest.raises(ZooError, match=f"has port {port}; allowed: 1 to 65535"):
        resolve(f"head:{port}")


def test_local_is_no_cluster():
    assert resolve("local") is None


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_dead_address_is_never_handed_to_ray(trial, closed, scheme):
    given = trial()
    address = f"{scheme}127.0.0.1:{closed}"
    with pytest.raises(ZooError, match=rf"{address}': cannot reach 127.0.0.1 port {closed}: "):
        resolve(address)
    assert given == []


def test_the_port_is_given_a_limit(monkeypatch):
    given = []

    def create_connection(address, timeout):
        given.append((address, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(cluster_address.socket, "create_connection", create_connection)
    with pytest.raises(ZooError, match="cannot reach head port 6379: timed out"):
        resolve("head:6379")
    assert given == [(("head", 6379), cluster_address._KNOCK)]


def test_a_name_that_is_looked_up_forever_is_given_up(monkeypatch):
    done = threading.Event()

    def create_connection(*_):
        done.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(cluster_address, "_KNOCK", 0.05)
    monkeypatch.setattr(cluster_address.socket, "create_connection", create_connection)
    with pytest.raises(ZooError, match=r"cannot reach head port 6379: no answer within 0\.05 s"):
        resolve("head:6379")
    done.set()


def test_an_address_that_answers_is_tried_for_what_is_left_of_the_limit(trial, listener):
    given = trial()
    address = f"127.0.0.1:{listener}"
    assert resolve(address) == address
    ((tried, limit),) = given
    assert tried == address
    assert 0 < limit <= cluster_address.LIMIT < 15


def test_the_limits_leave_time_for_a_trial_and_for_the_imports():
    assert cluster_address._KNOCK < cluster_address.LIMIT - 5
    assert cluster_address.LIMIT <= 12


def test_whoever_listens_may_be_no_cluster(trial, listener):
    trial(late=True)
    with pytest.raises(ZooError, match=r"listens there, but no Ray cluster let us in within"):
        resolve(f"127.0.0.1:{listener}")
    trial(
        late=True, stderr=b"[2026-01-01 W 1 1] gcs_client.cc:210: InvalidAuthToken: it is wrong\n"
    )
    with pytest.raises(ZooError, match=r"within 10 s: InvalidAuthToken: it is wrong$"):
        resolve(f"127.0.0.1:{listener}")


def test_what_ray_says_is_passed_on(trial, listener):
    trial(code=1, stderr=b"some noise\nanswer: Version mismatch: 2.40 and 2.60\n")
    with pytest.raises(ZooError, match=rf"{listener}': Version mismatch: 2\.40 and 2\.60$"):
        resolve(f"127.0.0.1:{listener}")


def test_a_client_address_takes_more_of_ray(trial, monkeypatch, listener):
    trial()
    monkeypatch.setattr(cluster_address.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ZooError, match=r"pip install 'ray\[client\]'"):
        resolve(f"ray://127.0.0.1:{listener}")
    assert resolve(f"127.0.0.1:{listener}") == f"127.0.0.1:{listener}"


def test_auto_is_what_ray_noted(trial, monkeypatch, tmp_path, listener):
    trial()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ZooError, match="'auto': no cluster was started on this machine"):
        resolve("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{listener}")
    assert resolve("auto") == f"127.0.0.1:{listener}"
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:0")
    with pytest.raises(ZooError, match="'elsewhere:0' has port 0"):
        resolve("auto")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ZooError, match="RAY_ADDRESS='auto' names no cluster"):
        resolve("auto")


@pytest.mark.slow
def test_a_silent_listener_is_given_up(monkeypatch, listener):
    pytest.importorskip("ray")
    monkeypatch.setattr(cluster_address, "LIMIT", 3.0)
    begun = time.monotonic()
    with pytest.raises(ZooError, match="no Ray cluster let us in within 3 s"):
        resolve(f"127.0.0.1:{listener}")
    assert time.monotonic() - begun >= 2.5  # it was tried, and left to the limit
