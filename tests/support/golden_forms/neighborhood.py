"""Another golden file of neighborhood attention."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, gradients, metadata, stored

CASES: list[dict[str, Any]] = [
    {
        "shape": [9],
        "kernel_size": [3],
        "stride": [2],
        "dilation": [1],
        "is_causal": [False],
        "heads": 3,
        "head_dim": 2,
    },
    {
        "shape": [11],
        "kernel_size": [2],
        "stride": [1],
        "dilation": [4],
        "is_causal": [True],
        "heads": 1,
        "head_dim": 5,
    },
    {
        "shape": [4, 7],
        "kernel_size": [2, 3],
        "stride": [1, 2],
        "dilation": [2, 1],
        "is_causal": [False, True],
        "heads": 2,
        "head_dim": 3,
    },
]
CONFIG = {"cases": CASES, "seed": 19, "scale": "head_dim**-0.5", "loss": "(o*w).sum()"}
SAMPLES = 3


def per_query(shape, kernel, dilation, stride, causal):
    """Rows of the mask in words of the paper: a loop over queries, an axis at a time."""
    axes = []
    for n, w, d, s, c in zip(shape, kernel, dilation, stride, causal, strict=True):
        rows = []
        for i in range(n):
            own = [j for j in range(n) if j % d == i % d]  # the residue class
            at = own.index(i)
            if c:
                lead = min(at // s * s + s - 1, len(own) - 1)
                seen = [j for m, j in enumerate(own) if m <= at and lead - m < w]
            else:
                lead = min(at // s * s + s // 2, len(own) - 1)
                first = min(max(lead - w // 2, 0), len(own) - w)
                seen = own[first : first + w]
            rows.append(set(seen))
        axes.append(rows)
    places = list(itertools.product(*map(range, shape)))
    return [
        [all(b in axes[x][a] for x, (a, b) in enumerate(zip(i, j, strict=True))) for j in places]
        for i in places
    ]


def make() -> Golden:
    """Dense attention under the mask of the loop."""
    source = Source(CONFIG["seed"])
    found: dict[str, Tensor] = {}
    for i, case in enumerate(CASES):
        rule = (case[n] for n in ("shape", "kernel_size", "dilation", "stride", "is_causal"))
        mask = torch.tensor(per_query(*rule))
        shape = (SAMPLES, *case["shape"], case["heads"], case["head_dim"])
        given = {name: source(*shape).requires_grad_() for name in "qkv"}
        weight = source(*shape)
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in given.values())
        scores = (q @ k.mT * case["head_dim"] ** -0.5).masked_fill(~mask, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(shape)
        found |= {f"in.c{i}.{name}": x for name, x in {**given, "w": weight}.items()}
        found |= {f"out.c{i}.o": y, f"out.c{i}.mask": mask.byte()}
        found |= gradients((y * weight).sum(), given, f"grad.c{i}.")
    return stored(found, torch.float32), metadata(CONFIG)
