"""Starts runs that kill themselves with SIGKILL at a chosen moment; `test_resume.py` resumes them.

    python kills.py '[{"kill": "step", "number": 7, "runs": "...", "overrides": [...]}, ...]'

Every case is a process of its own, forked after the imports, which are the slow part. A case is
killed when a step of that number begins ("step"), with half of checkpoint number n written
("write"), right after checkpoint number n took its place ("replace"), or before the record is
written ("record"). The signals that ended the cases are printed as a JSON list.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from zoo.runs import training
from zoo.runs.callbacks import Keeper
from zoo.runs.train import run


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(kind: str, number: int) -> None:
    counts = {"write": 0, "replace": 0}
    start, fsync, replace = Keeper.on_train_batch_start, os.fsync, os.replace

    def step(self, trainer, *args):
        if trainer.global_step == number:
            die()
        start(self, trainer, *args)

    def half(descriptor):
        if "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
            counts["write"] += 1
            if counts["write"] == number:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                die()
        fsync(descriptor)

    def replaced(source, target):
        replace(source, target)
        if Path(target).suffix == ".ckpt":
            counts["replace"] += 1
            if counts["replace"] == number:
                die()

    if kind == "step":
        Keeper.on_train_batch_start = step
    elif kind == "write":
        os.fsync = half
    elif kind == "replace":
        os.replace = replaced
    else:
        training.write = die


def main() -> None:
    torch.set_num_threads(1)
    signals = []
    for case in json.loads(sys.argv[1]):
        child = os.fork()
        if not child:
            arrange(case["kill"], case["number"])
            folder = Path(case["runs"])
            run("mqar", case["overrides"], records=folder / "records", runs=folder, quiet=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        signals.append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
    print(json.dumps(signals))


if __name__ == "__main__":
    main()
