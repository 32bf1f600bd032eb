from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import sys
import types
from pathlib import Path

import pytest
from fake_ray import FakeRay, GetTimeoutError, RayError, TaskCancelledError
from tiny import tiny

from zoo.errors import ZooError
from zoo.runs import config, records
from zoo.sweeps import cluster, remote
from zoo.sweeps.cluster import RaySpawner
from zoo.sweeps.sweep import sweep, sweep_cells


@pytest.fixture
def ray(monkeypatch):
    """Put a stand-in in the place of Ray, and of what runs on its machines."""

    def install(*machines, execute=None, **options):
        fake = FakeRay(*machines, **options)
        strategies = types.SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *a, **k: a)
        monkeypatch.setitem(sys.modules, "ray", fake)
        monkeypatch.setitem(sys.modules, "ray.util", types.SimpleNamespace())
        monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
        resolved = {"local": None, "head:1": "head:1"}
        monkeypatch.setattr(cluster.cluster_address, "resolve", resolved.__getitem__)
        if execute is not None:
            monkeypatch.setattr(remote, "execute", execute)
        return fake

    return install


@pytest.fixture
def start(tmp_path):
    """Start one run of a spawner as a sweep does."""

    def call(spawner, recipe="mqar", overrides=()):
        words = [recipe, *overrides, "--records", str(tmp_path / "records"), "--runs", "runs"]
        with open(tmp_path / "log", "ab") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return spawner.start(words, log, {"OMP_NUM_THREADS": "7", "HOME": "/nowhere"})

    return call


def locked(path):
    with open(path, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def done(task):
    return {"code": 0, "output": b"well\n", "record": "{}"}


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ZooError, match=r"pip install 'attention-zoo\[ray\]'"):
        RaySpawner()


def test_an_instance_of_its_own_is_quiet_and_ends_with_it(ray, monkeypatch):
    fake = ray()
    monkeypatch.setattr(cluster, "cores", lambda: 6)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with RaySpawner():
        assert "shutdown" not in fake.calls
    ((address, options),) = fake.inits
    assert address == "local"
    assert options["num_cpus"] == 6
    assert (options["include_dashboard"], options["log_to_driver"]) == (False, False)
    assert fake.calls == ["register", "unregister", "shutdown"]
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


def test_a_cluster_is_given_no_options_of_an_instance(ray):
    fake = ray()
    RaySpawner("head:1").close()
    assert fake.inits == [("head:1", {"logging_level": "error", "log_to_driver": False})]


def test_there_is_room_for_what_every_machine_has(ray):
    ray({"CPU": 2.0}, {"CPU": 5.0}, {})
    with RaySpawner("head:1") as spawner:
        assert spawner.places == 7
    with RaySpawner("head:1", cpus=2) as spawner:
        assert spawner.places == 3


def test_machines_that_run_things_are_asked_for_their_source(ray, monkeypatch):
    fake = ray({"CPU": 2.0}, {}, {"CPU": 4.0})
    RaySpawner("head:1").close()
    assert [task.options["scheduling_strategy"] for task in fake.tasks] == [("0",), ("2",)]
    monkeypatch.setattr(remote, "source_hash", lambda package: str(len(fake.tasks)) * 64)
    fake.tasks.clear()
    with pytest.raises(ZooError, match=r"has not the same attention-zoo as this one, which is 0\."):
        RaySpawner("head:1")
    assert fake.calls[-1] == "shutdown"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GetTimeoutError("x"), "has not answered within"),
        (RayError("it\nfell"), "RayError: it fell"),
    ],
)
def test_a_machine_that_cannot_be_asked_is_refused(ray, monkeypatch, error, message):
    def locate(ours):
        raise error

    fake = ray()
    monkeypatch.setattr(remote, "locate", locate)
    with pytest.raises(ZooError, match=message):
        RaySpawner("head:1")
    assert fake.calls[-1] == "shutdown"


def test_machines_without_cores_are_of_no_use(ray):
    ray({"GPU": 1.0})
    with pytest.raises(ZooError, match="no machine of the cluster has 1 cores"):
        RaySpawner("head:1")


def test_a_connection_that_there_is_already_is_left_alone(ray, monkeypatch):
    fake = ray()
    monkeypatch.setattr(fake, "is_initialized", lambda: True)
    with pytest.raises(ZooError, match="connected to Ray already"):
        RaySpawner()
    assert fake.calls == []


def test_ray_that_fails_is_one_line(ray, monkeypatch):
    fake = ray()

    def init(address, **options):
        raise RuntimeError("no\n  way")

    monkeypatch.setattr(fake, "init", init)
    with pytest.raises(ZooError, match="cannot start or reach Ray: RuntimeError: no way"):
        RaySpawner()


def test_a_run_travels_as_its_resolved_recipe(ray, start, tmp_path):
    fake = ray(execute=lambda task: {**done(task), "output": repr(sorted(task)).encode()})
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(config._find("mqar").read_text())
    overrides = tiny(attention="linear")
    with RaySpawner() as spawner:
        handle = start(spawner, str(recipe), overrides)
        recipe.unlink()
        assert handle.wait() == 0
    assert (tmp_path / "log").read_text() == str(["config", "environment", "folder", "id", "ours"])
    name = config.run_id("mqar", overrides)
    assert fake.tasks[-1].options == {"name": name, "num_cpus": 1, "num_gpus": 0, "max_retries": 0}
    assert (tmp_path / "records" / f"{name}.json").read_text() == "{}"


def test_a_worker_reads_the_same_run_from_what_travels(ray, start, tmp_path):
    sent = []
    ray(execute=lambda task: sent.append(task) or done(task))
    with RaySpawner() as spawner:
        start(spawner, "mqar", tiny(attention="linear")).wait()
    (task,) = sent
    (tmp_path / "config.yaml").write_text(task["config"])
    before, after = config.load("mqar", tiny(attention="linear")), tmp_path / "config.yaml"
    assert config.identify(config.load(after)) == config.identify(before)
    assert config.run_id(after) == task["id"]
    # The variables are the worker's own, but for these.
    assert task["environment"] == {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize(
    ("overrides", "machine", "cpus", "gpus"),
    [
        ([], {"CPU": 2.0, "GPU": 1.0}, 1, 0),
        (["trainer.accelerator=cuda"], {"CPU": 2.0, "GPU": 1.0}, 1, 1),
        (["trainer.accelerator=auto"], {"CPU": 2.0, "GPU": 1.0}, 1, 1),
        (["trainer.accelerator=auto"], {"CPU": 2.0}, 1, 0),
        (["trainer.devices=2", "trainer.strategy=ddp"], {"CPU": 2.0}, 2, 0),
    ],
)
def test_a_run_asks_for_what_it_takes(ray, start, overrides, machine, cpus, gpus):
    fake = ray(machine, execute=done)
    with RaySpawner("head:1") as spawner:
        start(spawner, "mqar", overrides).wait()
    assert (fake.tasks[-1].options["num_cpus"], fake.tasks[-1].options["num_gpus"]) == (cpus, gpus)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.accelerator=cuda"], r"has 1 cores and 1 cards \(GPU\)"),
        (["trainer.devices=4", "trainer.strategy=ddp"], "has 4 cores$"),
        (["nonsense=1"], "unknown override 'nonsense'"),
    ],
)
def test_what_no_machine_has_is_not_waited_for(ray, start, overrides, message):
    ray({"CPU": 2.0}, {"CPU": 2.0})
    with RaySpawner("head:1") as spawner, pytest.raises(OSError, match=message):
        start(spawner, "mqar", overrides)


def test_the_log_is_locked_as_long_as_the_run_lasts(ray, start, tmp_path):
    fake = ray(ready=False, execute=done)
    with RaySpawner() as spawner:
        handle = start(spawner)
        assert (handle.poll(), handle.returncode, handle.pid) == (None, None, None)
        assert locked(tmp_path / "log")
        assert (tmp_path / "log").read_text() == ""
        fake.tasks[-1].ready = True
        assert handle.poll() == 0
        assert not locked(tmp_path / "log")
        assert (tmp_path / "log").read_text() == "well\n"


def test_a_run_is_asked_to_end_and_then_ended(ray, start, tmp_path):
    def execute(task):
        raise TaskCancelledError

    fake = ray(ready=False, execute=execute)
    with RaySpawner() as spawner:
        handle = start(spawner)
        handle.terminate()
        handle.kill()
        assert fake.tasks[-1].cancelled == [False, True]
        fake.tasks[-1].ready = True
        assert handle.wait() == -signal.SIGTERM
        handle.terminate()
        assert fake.tasks[-1].cancelled == [False, True]
    assert not locked(tmp_path / "log")


def test_a_run_whose_worker_died_failed_with_the_reason(ray, start, tmp_path):
    def execute(task):
        raise RayError("The worker died\nunexpectedly")

    ray(execute=execute)
    with RaySpawner() as spawner:
        assert start(spawner).wait() == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last == "the run was lost on the cluster: RayError: The worker died unexpectedly"


def test_a_record_that_cannot_be_written_fails_its_run_alone(ray, start, tmp_path):
    ray(execute=done)
    (tmp_path / "records").write_text("not a folder")
    with RaySpawner() as spawner:
        assert start(spawner).wait() == 1
    text = (tmp_path / "log").read_text()
    assert text.startswith("well\n")
    assert "cannot write mqar-mha-s0-" in text


def test_a_sweep_goes_on_past_what_fails_and_skips_what_is_done(ray, make, tmp_path):
    def execute(task):
        if "seed: 1" in task["config"]:
            raise RayError("gone")
        if "seed: 2" in task["config"]:
            return {"code": 2, "output": b"noise\nzoo: error: no\n", "record": None}
        record = make(id=task["id"]).to_json()
        return {"code": 0, "output": b"", "record": record}

    fake = ray(execute=execute)
    folders = {"records": tmp_path / "records", "runs": tmp_path / "runs"}
    grid = [[f"seed={seed}"] for seed in range(4)]
    options = {"identify": config.run_id, "progress": False, "jobs": 2, **folders}
    with RaySpawner() as spawner:
        result = sweep("mqar", grid, spawner=spawner, **options)
        assert [cell.overrides for cell in result.finished] == [["seed=0"], ["seed=3"]]
        assert [cell.error for cell in result.failed] == [
            "the run was lost on the cluster: RayError: gone",
            "zoo: error: no",
        ]
        assert "shutdown" not in fake.calls
        again = sweep("mqar", grid, spawner=spawner, **options)
        assert len(again.skipped) == len(again.failed) == 2


# What only Ray itself can show.


@pytest.fixture(scope="module")
def cluster_of_one():
    pytest.importorskip("ray")
    with RaySpawner() as spawner:
        yield spawner


PLACE = ("created", "device", "commit", "peak_memory_bytes", "step_time_cpu", "step_time_wall")


@pytest.mark.slow
@pytest.mark.timeout(900)  # a machine that is busy starts Ray slowly
def test_records_are_those_of_a_local_sweep(cluster_of_one, tmp_path):
    cells = [("mqar", tiny(attention="mha")), ("mqar", tiny(attention="linear"))]
    there, here = tmp_path / "ray", tmp_path / "local"
    common = {"identify": config.run_id, "jobs": 2, "runs": tmp_path / "runs"}
    result = sweep_cells(cells, records=there, spawner=cluster_of_one, **common)
    assert (len(result.finished), result.failed) == (2, [])
    assert len(sweep_cells(cells, records=here, **common).finished) == 2
    ours, theirs = records.read_all(there), records.read_all(here)
    for one, other in zip(ours, theirs, strict=True):
        same = {name: getattr(other, name) for name in PLACE}
        assert dataclasses.replace(one, **same) == other
        assert one.device["type"] == other.device["type"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a machine that is busy starts Ray slowly
def test_a_worker_that_is_killed_fails_its_run_alone(cluster_of_one, monkeypatch, make, tmp_path):
    text = make(id="NAME").to_json()

    # It is nested so that Ray sends it as it stands.
    def execute(task):
        import os
        import signal

        if "seed: 1" in task["config"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"code": 0, "output": b"", "record": text.replace("NAME", task["id"])}

    monkeypatch.setattr(remote, "execute", execute)
    folders = {"records": tmp_path / "records", "runs": tmp_path / "runs"}
    cells = [("mqar", [f"seed={seed}"]) for seed in range(3)]
    result = sweep_cells(cells, identify=config.run_id, spawner=cluster_of_one, **folders)
    assert [cell.overrides for cell in result.finished] == [["seed=0"], ["seed=2"]]
    (failed,) = result.failed
    assert failed.error.startswith("the run was lost on the cluster: WorkerCrashedError: ")


@pytest.mark.slow
@pytest.mark.timeout(900)  # a machine that is busy starts Ray slowly
def test_a_cancelled_run_leaves_its_place(cluster_of_one, start, tmp_path, monkeypatch):
    handle = start(cluster_of_one, "mqar", tiny(steps=10**7, trainer__eval_every=10**6))
    while not list(_leashed()):
        assert handle.poll() is None
    (run,) = _leashed()
    handle.terminate()
    assert handle.wait() == -signal.SIGTERM
    assert not list(_leashed())
    assert not os.path.exists(os.path.dirname(run))
    assert not locked(tmp_path / "log")


def _leashed():
    """Yield the recipe of every run of a cluster that is on the way on this machine."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = place.read_bytes().decode().split("\0")
            if "zoo.sweeps.leash" in words:
                yield words[words.index("run") + 1]
