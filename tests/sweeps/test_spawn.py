"""Runs as forks of one process that has imported what they need."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import time

import pytest

from zoo.sweeps.spawn import Nursery

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
TINY = ["trainer.max_steps=2", "trainer.eval_every=1", "data.val_size=8", "data.test_size=8"]


@pytest.fixture(scope="module")
def nursery():
    found = Nursery()
    yield found
    found.close()


@pytest.fixture
def go(nursery, tmp_path):
    """Start a run and return its handle, its log and the folder of the records."""

    numbers, handles = itertools.count(), []

    def start(*words, **environment):
        log, records = tmp_path / f"log{next(numbers)}", tmp_path / "records"
        options = ["--records", str(records), "--runs", str(tmp_path / "runs"), "--quiet"]
        with open(log, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            handle = nursery.start([*words, *options], file, {**ENVIRONMENT, **environment})
        handles.append(handle)
        return handle, log, records

    yield start
    for handle in handles:
        handle.kill()


def is_locked(path):
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_run_leaves_its_record_and_lets_go_of_its_log(go):
    handle, log, records = go("flip_flop", *TINY)
    assert os.getpgid(handle.pid) == handle.pid
    assert handle.wait() == handle.returncode == handle.poll() == 0
    assert log.read_text() == ""
    (path,) = records.glob("*.json")
    assert json.loads(path.read_text())["status"] == "finished"
    assert not is_locked(log)


def test_a_run_that_fails_says_why_in_its_log(go):
    handle, log, records = go("flip_flop", "model.dmi=3")
    assert handle.wait() == 2
    assert log.read_text().startswith("zoo: error: ")
    assert "model.dim" in log.read_text()
    assert not records.exists()


def test_a_run_has_the_environment_it_is_given(go):
    handle, log, _ = go("no_such_recipe", COLUMNS="40", ZOO_TEST="1")
    assert handle.wait() == 2
    assert "unknown recipe" in log.read_text()


def test_a_run_that_is_killed_is_told_by_its_signal(go):
    handle, log, _ = go("flip_flop", "trainer.max_steps=100000", "trainer.eval_every=100000")
    assert handle.poll() is None
    assert is_locked(log)
    handle.kill()
    assert handle.wait() == -signal.SIGKILL
    assert not is_locked(log)


def test_two_runs_at_once_are_told_apart(go):
    slow, *_ = go("flip_flop", "trainer.max_steps=100000", "trainer.eval_every=100000")
    quick, *_ = go("no_such_recipe")
    assert quick.wait() == 2
    assert slow.poll() is None
    slow.terminate()
    assert slow.wait() != 0


@pytest.mark.slow
def test_without_the_nursery_a_run_counts_as_killed_and_the_next_one_starts(tmp_path):
    nursery = Nursery()
    try:
        with open(tmp_path / "log", "ab") as log:
            words = ["flip_flop", "trainer.max_steps=100000", "trainer.eval_every=100000"]
            words += ["--records", str(tmp_path), "--runs", str(tmp_path), "--quiet"]
            handle = nursery.start(words, log, ENVIRONMENT)
            os.kill(nursery._server.pid, signal.SIGKILL)
            nursery._server.wait()
            assert handle.poll() == -signal.SIGKILL
            os.killpg(handle.pid, signal.SIGKILL)
            assert nursery.start(["no_such_recipe"], log, ENVIRONMENT).wait() == 2
    finally:
        nursery.close()


@pytest.mark.slow
def test_a_closed_nursery_leaves_its_runs_alone(tmp_path):
    nursery = Nursery()
    with open(tmp_path / "log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        words = ["flip_flop", "trainer.max_steps=100000", "trainer.eval_every=100000"]
        words += ["--records", str(tmp_path), "--runs", str(tmp_path), "--quiet"]
        handle = nursery.start(words, log, ENVIRONMENT)
    nursery.close()
    try:
        os.kill(handle.pid, 0)  # raises if there is no such process
        assert is_locked(tmp_path / "log")
    finally:
        os.killpg(handle.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while is_locked(tmp_path / "log"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
