"""Another golden file of differential attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden_files import Golden
from torch import Tensor

from golden_forms import (
    Source,
    gradients,
    join_heads,
    metadata,
    prefixed,
    split_heads,
    stored,
    turn,
)
from zoo.normalize.differential import differential_attention_reference, initial_lambda

CONFIG = {
    "batch": 1,
    "seq": 8,
    "num_heads": 6,
    "head_dim": 2,
    "depth": 5,
    "gqa_kv_heads": 2,
    "rope": "interleaved theta 3e2",
    "eps": 1e-2,
    "dtype": "float32",
    "loss": "sum(y*cotangent)",
}
BASE = 300.0


def make() -> Golden:
    """A layer with as many key heads as query heads, and one with groups."""
    source = Source(15)
    found = {"out.mha.lambda_init": torch.tensor([initial_lambda(CONFIG["depth"])])}
    for case, groups in (("mha", CONFIG["num_heads"]), ("gqa", CONFIG["gqa_kv_heads"])):
        found |= layer(source, case, groups)
    return stored(found, torch.float32), metadata(CONFIG)


def layer(source: Source, case: str, groups: int) -> dict[str, Tensor]:
    """A layer with `groups` pairs of key heads."""
    heads, width = CONFIG["num_heads"], CONFIG["head_dim"]
    dim, depth = 2 * heads * width, CONFIG["depth"]
    rows = {"q": dim, "k": 2 * groups * width, "v": 2 * groups * width, "out": dim}
    param = {f"{n}_proj.weight": 0.4 * source(count, dim) for n, count in rows.items()}
    param |= {f"lambda_{n}": 0.5 * source(width) for n in ("q1", "k1", "q2", "k2")}
    param["subln.weight"] = 1 + 0.3 * source(2 * width)
    x = source(CONFIG["batch"], CONFIG["seq"], dim).requires_grad_()
    for value in param.values():
        value.requires_grad_()
    counts = {"q": 2 * heads, "k": 2 * groups, "v": groups}
    q, k, v = (split_heads(F.linear(x, param[f"{n}_proj.weight"]), counts[n]) for n in "qkv")
    products = [param[f"lambda_q{i}"] @ param[f"lambda_k{i}"] for i in (1, 2)]
    start = initial_lambda(depth)
    factor = products[0].exp() - products[1].exp() + start
    y = differential_attention_reference(
        turn(q, BASE), turn(k, BASE), v, factor, causal=True, grouping="official"
    )
    y = F.rms_norm(y, y.shape[-1:], param["subln.weight"], CONFIG["eps"]) * (1 - start)
    y = F.linear(join_heads(y), param["out_proj.weight"])
    cotangent = source(*y.shape)
    of = {"in.x": x, **prefixed("param.", param)}
    return {
        f"in.{case}.x": x,
        f"in.{case}.cotangent": cotangent,
        f"out.{case}.y": y,
        **prefixed(f"param.{case}.", param),
        **gradients((y * cotangent).sum(), of, f"grad.{case}."),
    }
