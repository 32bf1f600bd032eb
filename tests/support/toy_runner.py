"""A run in small for the sweep: a journal, perhaps a checkpoint, a record made beforehand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

template, recipe, *words = sys.argv[1:]
at = words.index("--records")
overrides = words[:at]
records, runs = Path(words[at + 1]), Path(words[words.index("--runs") + 1])
name = "-".join([recipe, *overrides]).replace("(", "_").replace(")", "_")
folder = runs / name
folder.mkdir(parents=True, exist_ok=True)
do = dict(word.split("=", 1) for word in overrides).get("do", "well")
status, checkpoint = "finished", folder / "checkpoint"


def note(word):
    with open(folder / "journal", "a") as journal:
        print(word, time.monotonic_ns(), file=journal)


def wait(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            sys.exit(f"{path} never came")
        time.sleep(0.01)


note("start")
print("words", json.dumps(sys.argv[1:]))
print("threads", os.environ["OMP_NUM_THREADS"])
if do == "crash":
    print("\x1b[31mTraceback\x1b[0m", file=sys.stderr)
    print("\x1b[31m| ValueError: no such thing |\x1b[0m\n+----+\n", file=sys.stderr)
    sys.exit(1)
if do == "kill":
    if "--resume-if-possible" in words and checkpoint.exists():
        note("resumed")
    else:
        checkpoint.touch()
        print("half done", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
if do == "silent":
    sys.exit(0)
if do in ("nan", "failed"):
    status = do
if do == "meet":
    (runs / f"met-{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while len(list(runs.glob("met-*"))) < 2:
        if time.monotonic() > deadline:
            sys.exit("nobody came")
        time.sleep(0.01)
if do == "hold":
    wait(runs / "go")
if do == "open":
    (runs / "go").touch()
if do == "interrupt":
    subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(60)"])
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if do == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
    os.kill(os.getppid(), signal.SIGINT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.01)
record = json.loads(Path(template).read_text())
record.update(id=name, status=status, error=None if status != "failed" else "it broke")
records.mkdir(parents=True, exist_ok=True)
(records / f".{name}.tmp").write_text(json.dumps(record))
os.replace(records / f".{name}.tmp", records / f"{name}.json")
note("end")
