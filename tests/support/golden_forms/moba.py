"""Another golden file of MoBA."""

from __future__ import annotations

from itertools import pairwise

import torch
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, gradients, metadata, stored
from zoo.select.moba import moba_attention_reference

CASES = [  # some blocks of packed sequences, some of one alone, and all there are
    ([0, 10, 15, 34], {"moba_chunk_size": 4, "moba_topk": 2, "heads": 3, "head_dim": 4}),
    ([0, 29], {"moba_chunk_size": 3, "moba_topk": 4, "heads": 1, "head_dim": 6}),
    ([0, 3, 11], {"moba_chunk_size": 5, "moba_topk": 3, "heads": 2, "head_dim": 2}),
]
CONFIG = {
    "cases": [{"cu_seqlens": bounds, **options} for bounds, options in CASES],
    "seed": 20,
    "loss": "(o*w).sum()",
}


def make() -> Golden:
    """Outputs, gradients and chosen blocks."""
    source = Source(CONFIG["seed"])
    found: dict[str, Tensor] = {}
    for i, case in enumerate(CONFIG["cases"]):
        bounds = torch.tensor(case["cu_seqlens"])
        block, topk = case["moba_chunk_size"], case["moba_topk"]
        shape = (int(bounds[-1]), case["heads"], case["head_dim"])
        given = {name: source(*shape).requires_grad_() for name in "qkv"}
        weight = source(*shape)
        q, k, v = (x.transpose(0, 1)[None] for x in given.values())
        y = moba_attention_reference(q, k, v, block, topk, cu_seqlens=bounds)[0].transpose(0, 1)
        found |= {f"in.c{i}.{name}": x for name, x in {**given, "w": weight}.items()}
        found |= {f"in.c{i}.cu_seqlens": bounds.int(), f"out.c{i}.o": y}
        found |= gradients((y * weight).sum(), given, f"grad.c{i}.")
        for n, (a, b) in enumerate(pairwise(case["cu_seqlens"])):
            chosen = choices(q[0, :, a:b], k[0, :, a:b], block, topk)
            found[f"out.c{i}.selected_seq{n}"] = chosen.byte()
    return stored(found, torch.float32), metadata(CONFIG)


def choices(q: Tensor, k: Tensor, block: int, topk: int) -> Tensor:
    """The best blocks of each row, (H, N, blocks), with later ones where too few are past."""
    means = torch.stack([x.mean(1) for x in k.split(block, 1)], 1)
    own = torch.arange(q.shape[1])[:, None] // block
    every = torch.arange(means.shape[1])
    gates = (q @ means.mT).masked_fill(every > own, -torch.inf).masked_fill(every == own, torch.inf)
    best = gates.topk(min(topk, means.shape[1]), -1).indices
    return torch.zeros_like(gates, dtype=torch.bool).scatter(-1, best, True)
