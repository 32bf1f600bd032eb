"""Another golden file of entmax and sparsemax."""

from __future__ import annotations

import torch
from golden_files import Golden

from golden_forms import Source, gradients, metadata, stored
from zoo.normalize.entmax import entmax_reference

CONFIG = {"shape": [2, 6, 3], "axis": 1, "dtype": "float64", "loss": "sum(y*cotangent)"}
ALPHAS = {"sparsemax": 2.0, "entmax15": 1.5, "entmax13": 1.3}


def make() -> Golden:
    """Weights along another axis."""
    source, axis = Source(16), CONFIG["axis"]
    scores = (2 * source(*CONFIG["shape"])).requires_grad_()
    cotangent = source(*CONFIG["shape"])
    found = {"in.scores": scores, "in.cotangent": cotangent}
    for name, alpha in ALPHAS.items():
        y = entmax_reference(scores.movedim(axis, -1), alpha).movedim(-1, axis)
        found[f"out.{name}"] = y
        found |= gradients((y * cotangent).sum(), {"in.scores": scores}, f"grad.{name}.")
    return stored(found, torch.float64), metadata(CONFIG)
