from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import zoo
from zoo.sweeps import remote

PACKAGE = Path(zoo.__file__).parent


def package(folder, text='__version__ = "1.2"\n', **files):
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(text)
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content)
    return str(folder)


def ours(folder):
    return {
        "package": folder,
        "version": remote.version_of(folder),
        "hash": remote.source_hash(folder),
    }


def gone(pid):
    """Wait until a process has ended; one that nobody waited for has ended too."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_the_hash_is_of_names_and_contents_wherever_they_are(tmp_path):
    first = remote.source_hash(package(tmp_path / "a" / "zoo", b="x = 1\n"))
    assert remote.source_hash(package(tmp_path / "b" / "zoo", b="x = 1\n")) == first
    for i, files in enumerate([{"b": "x = 2\n"}, {"c": "x = 1\n"}, {}]):
        assert remote.source_hash(package(tmp_path / f"c{i}" / "zoo", **files)) != first
    # What is no source does not count, nor how lines end.
    same = Path(package(tmp_path / "d" / "zoo", b="x = 1\r\n"))
    (same / "notes.txt").write_text("other")
    assert remote.source_hash(str(same)) == first


def test_the_version_is_read_without_an_import(tmp_path):
    assert remote.version_of(str(PACKAGE)) == zoo.__version__
    assert remote.version_of(package(tmp_path / "zoo", "raise SystemExit\n")) == "unknown"


def test_the_same_source_is_found_in_its_own_place_or_where_it_is_installed(tmp_path):
    here = ours(str(PACKAGE))
    assert remote.locate(here) == (str(PACKAGE), "")
    assert remote.locate({**here, "package": str(tmp_path / "nowhere")}) == (str(PACKAGE), "")


def test_another_source_is_refused_by_name(tmp_path, monkeypatch):
    theirs = package(tmp_path / "theirs" / "zoo")
    wanted = {**ours(theirs), "hash": "f" * 64, "version": "9.9"}
    place, said = remote.locate({**wanted, "package": theirs})
    assert place is None
    assert said.startswith(f"there it is {zoo.__version__}, source ")
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    _, said = remote.locate({**wanted, "package": theirs})
    assert said == f"there it is 1.2, source {remote.source_hash(theirs)[:12]}"
    _, said = remote.locate({**wanted, "package": str(tmp_path / "nowhere")})
    assert said == "it is not installed there"
    done = remote.execute({"ours": {**wanted, "package": str(tmp_path / "nowhere")}})
    assert (done["code"], done["record"]) == (2, None)
    assert done["output"].decode() == (
        "a machine of the cluster has not the same attention-zoo as this one, which is 9.9, source "
        "ffffffffffff: it is not installed there"
    )


def script(tmp_path, text):
    """A package whose run is a few lines; what `execute` is given for it."""
    root = tmp_path / "pkg"
    place = package(root / "zoo")
    (root / "zoo" / "sweeps").mkdir()
    (root / "zoo" / "sweeps" / "__init__.py").write_text("")
    (root / "zoo" / "sweeps" / "leash.py").write_text(text)
    return {
        "ours": ours(place),
        "config": "name: toy\n",
        "id": "toy-1",
        "folder": str(tmp_path),
        "environment": {"OMP_NUM_THREADS": "1"},
    }


RUN = """
import os, pathlib, sys
words = sys.argv[1:]
print(os.getcwd(), os.environ["OMP_NUM_THREADS"], words[0], words[2])
assert pathlib.Path(words[1]).read_text() == "name: toy\\n"
records = pathlib.Path(words[words.index("--records") + 1])
records.mkdir()
(records / "toy-1.json").write_text("{}")
print(pathlib.Path(words[1]).parent, file=sys.stderr)
sys.exit(3)
"""


def test_a_run_gives_back_code_output_and_record_and_leaves_nothing(tmp_path):
    done = remote.execute(script(tmp_path, RUN))
    first, folder = done["output"].decode().splitlines()
    assert first == f"{tmp_path} 1 run --quiet"
    assert (done["code"], done["record"]) == (3, "{}")
    assert not Path(folder).exists()


def test_a_run_without_a_record_and_far_too_much_output(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_OUTPUT", 10)
    done = remote.execute(script(tmp_path, "print('x' * 100 + 'the end')"))
    assert done == {"code": 0, "output": b"xxthe end\n", "record": None}


def test_a_run_that_is_killed_says_by_what(tmp_path):
    done = remote.execute(script(tmp_path, "import os; os.kill(os.getpid(), 9)"))
    assert done["code"] == -signal.SIGKILL


STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
place = pathlib.Path("pids")
place.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
place.with_suffix(".new").rename(place)
time.sleep(600)
"""


def test_a_cancelled_run_ends_with_all_it_has_started(tmp_path, monkeypatch):
    end = remote._end

    def interrupted(process):
        os.kill(os.getpid(), signal.SIGINT)  # as Ray does while a cancelled task goes on
        end(process)

    monkeypatch.setattr(remote, "_GRACE", 0.2)
    monkeypatch.setattr(remote, "_end", interrupted)
    monkeypatch.setattr(remote.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    task = script(tmp_path, STUBBORN)

    def cancel():
        while not (tmp_path / "pids").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    worker = threading.Thread(target=cancel)
    worker.start()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in what a shell puts aside
    try:
        with pytest.raises(KeyboardInterrupt):
            remote.execute(task)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    worker.join()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert all(gone(pid) for pid in (tmp_path / "pids").read_text().split())


# The leash itself, with another command line at its end.
LEASHED = """
import importlib.util, subprocess, sys, time, types
spec = importlib.util.spec_from_file_location("leash", sys.argv[1])
leash = importlib.util.module_from_spec(spec)
spec.loader.exec_module(leash)

def main():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(float(sys.argv[2]))
    child.kill()

sys.modules["zoo"] = types.ModuleType("zoo")
sys.modules["zoo.cli"] = types.SimpleNamespace(main=main)
leash.main()
"""


def leashed(seconds, folder):
    command = [sys.executable, "-S", "-c", LEASHED, str(PACKAGE / "sweeps" / "leash.py"), seconds]
    return subprocess.Popen(
        command,
        env={**os.environ, "ZOO_LEASH_FOLDER": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )


def test_a_run_ends_with_whoever_holds_its_leash(tmp_path):
    (tmp_path / "zoo-x").mkdir()
    with leashed("600", tmp_path / "zoo-x") as process:
        child = int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(60) == -signal.SIGKILL
    assert gone(child)
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_a_leash_ends_by_itself(tmp_path):
    with leashed("0", tmp_path) as process:
        child = int(process.stdout.readline())
        assert process.wait(60) == 0
    assert gone(child)
