"""Another golden file of neural attention."""

from __future__ import annotations

import torch
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, gradients, join_heads, metadata, prefixed, stored
from zoo.score.neural import neural_scores_reference

CONFIG = {
    "batch": 3,
    "seq": 5,
    "heads": 3,
    "dim_head": 4,
    "projection_dim": 6,
    "dtype": "float64",
    "loss": "sum(y*cotangent)",
    "qkv_layout": "to_qkv output features are ordered (dim_head, 3, heads)",
}
HIDDEN = (5, 3)


def make() -> Golden:
    """A causal layer and one that sees all."""
    source = Source(22)
    found = {**layer(source, "causal"), **layer(source, "full")}
    return stored(found, torch.float64), metadata(CONFIG)


def layer(source: Source, case: str) -> dict[str, Tensor]:
    """Outputs and gradients."""
    heads, width, inner = CONFIG["heads"], CONFIG["dim_head"], CONFIG["projection_dim"]
    dim = heads * width
    maps = {
        "q_proj": (inner, width),
        "k_proj": (inner, width),
        "linear1": (HIDDEN[0], 2 * inner),
        "linear2": (HIDDEN[1], HIDDEN[0]),
        "linear3": (1, HIDDEN[1]),
    }
    shapes = {f"{name}.weight": shape for name, shape in maps.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in maps.items()}
    shapes |= {"to_qkv.weight": (3 * dim, dim), "W_out.weight": (dim, dim)}
    param = {name: 0.6 * source(*shape).requires_grad_() for name, shape in shapes.items()}
    x = source(CONFIG["batch"], CONFIG["seq"], dim).requires_grad_()
    rows = x @ param["to_qkv.weight"].T
    # (B, N, D, 3, H) to three of (B, H, N, D)
    q, k, v = rows.unflatten(-1, (width, 3, heads)).permute(3, 0, 4, 1, 2)
    layers = {name: (param[f"{name}.weight"], param[f"{name}.bias"]) for name in maps}
    query, key, *network = layers.values()
    scores = neural_scores_reference(q, k, query, key, network)
    if case == "causal":
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    y = join_heads(scores.softmax(-1) @ v) @ param["W_out.weight"].T
    cotangent = source(*y.shape)
    of = {"in.x": x, **prefixed("param.", param)}
    return {
        f"in.{case}.x": x,
        f"in.{case}.cotangent": cotangent,
        f"out.{case}.y": y,
        **prefixed(f"param.{case}.", param),
        **gradients((y * cotangent).sum(), of, f"grad.{case}."),
    }
