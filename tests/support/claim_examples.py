"""A claim in small: on the digits, three steps of a model of some hundred parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

RECIPE: dict[str, Any] = {
    "name": "tiny_claim",
    "description": "A claim in small, for tests of the machinery.",
    "track": "vision",
    "task": "classification",
    "attention": "mha",
    "data": {"name": "digits", "batch_size": 8},
    "model": {"name": "vit", "patch": 4, "dim": 8, "depth": 1, "heads": 2, "mlp_ratio": 1.0},
    "optim": {"lr": 3.0e-3, "warmup": 0.0, "clip": 1.0},
    "trainer": {"max_steps": 3, "eval_every": 3},
    "metrics": {"select": "val/accuracy", "report": "test/accuracy", "mode": "max"},
    "budget": {"lrs": [3.0e-3], "seeds": 2},
    "claim": {
        "statement": "Differential attention has at most twice the loss of softmax attention.",
        "mechanism": "differential",
        "source": "Table 1",
        "variants": {
            "ours": ["attention=differential"],
            "softmax": [],
            "narrow": ["attention=mha", "model.heads=1"],
        },
        "seeds": 2,
        "figures": {
            "loss": "test/loss",
            "noisy": "test_noise/accuracy",
            "size": "parameters",
            "time": "step_time_cpu",
        },
        "requires": ["ours.noisy >= 0"],
        "criterion": ["ours.loss < 2 * min(softmax.loss, narrow.loss)", "ours.size > 0"],
    },
}
GONE = object()


def write(folder: Path, **changes: Any) -> Path:
    """Write the recipe with changes by dotted key (`__` for the dot); GONE leaves a key out."""
    content = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = content
        for name in sections:
            place = place[name]
        if value is GONE:
            del place[last]
        else:
            place[last] = value
    path = folder / "tiny_claim.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
