"""A run of a claim in small: writes the record that the test has planned for its overrides.

    python claim_runner.py PLAN RECIPE OVERRIDES... --records DIR --runs DIR ...

PLAN is a JSON file: by overrides (joined with spaces) the record, or with "die" beside it a run
that is killed the first time and goes on the second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

plan, recipe, *words = sys.argv[1:]
at = words.index("--records")
planned = json.loads(Path(plan).read_text())[" ".join(words[:at])]
records, runs = Path(words[at + 1]), Path(words[words.index("--runs") + 1])
record = planned["record"]
with open(runs / record["id"] / "journal", "a") as journal:
    print("start", os.environ["OMP_NUM_THREADS"], file=journal)
once = runs / record["id"] / "once"
if planned.get("die") and not once.exists():
    once.touch()
    os.kill(os.getpid(), signal.SIGKILL)
assert "--resume-if-possible" in words
records.mkdir(parents=True, exist_ok=True)
draft = records / f".{record['id']}.tmp"
draft.write_text(json.dumps(record))
os.replace(draft, records / f"{record['id']}.json")
