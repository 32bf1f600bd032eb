"""A record to start from; each test changes what it is about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from zoo.runs.records import Record


def build(**changes: Any) -> Record:
    """A finished record; `report` and `select` set its figures, everything else is a field."""
    report = changes.pop("report", 0.5)
    select = changes.pop("select", report)
    fields: dict[str, Any] = {
        "recipe": "mqar",
        "track": "recall",
        "group": "g0",
        "config_hash": "c0",
        "attention": "mha",
        "seed": 0,
        "lr": 1e-3,
        "status": "finished",
        "metric": {
            "select": "val/accuracy",
            "report": "test/accuracy",
            "mode": "max",
            "solved": 0.99,
        },
        "metrics": {"val/accuracy": select, "test/accuracy": report},
        "history": [{"step": 100, "val/accuracy": 0.25}],
        "steps": 1200,
        "examples": 76800,
        "conv": True,
        "data": {"name": "mqar", "fingerprint": "f" * 64},
        "versions": {"python": "3.11.0", "torch": "2.11.0"},
        "device": {"type": "cpu", "name": "Some CPU", "threads": 1},
        "created": "2026-01-01T00:00:00+00:00",
        "config": {"attention": "mha", "model": {"dim": 64, "depth": 2}, "optim": {"lr": 1e-3}},
        "parameters": 18234,
        "flops": 1_234_567,
        "state_bytes": 16384,
        "step_time_cpu": 0.0123,
        "step_time_wall": 0.0246,
        "peak_memory_bytes": 300 * 2**20,
        "commit": "0123456789abcdef0123456789abcdef01234567",
    }
    fields |= changes
    if fields["status"] != "finished":
        fields.setdefault("error", "it went wrong")
        fields["metrics"] = changes.get("metrics", {})
    if "id" not in fields:
        fields["id"] = hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:16]
    return Record(**fields)


@pytest.fixture(scope="session")
def make() -> Callable[..., Record]:
    return build
