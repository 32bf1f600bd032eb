"""Another golden file of regional attention, and of the layers of its network."""

from __future__ import annotations

from typing import Any

import torch
from golden_files import Golden, read, under
from torch import Tensor

from golden_forms import Source, gradients, metadata, prefixed, stored
from golden_forms.residual_attention import fill
from zoo.feature.regional import RegionalAttention
from zoo.models.vision._rasm_blocks import RASMBlock
from zoo.models.vision.rasm import from_official

CONFIG: dict[str, Any] = {
    "cases": [
        {"tag": "wide", "dim": 6, "heads": 3, "kernel_size": 3, "dilation": 2, "H": 8, "W": 10},
        {"tag": "filled", "dim": 4, "heads": 1, "kernel_size": 3, "dilation": 3, "H": 5, "W": 11},
    ],
    "ral": {
        "dim": 12,
        "heads": 3,
        "kernel_size": 3,
        "dilation": 1,
        "H": 6,
        "W": 5,
        "mlp": "leff",
        "mlp_ratio": 2,
    },
    "cab": {"dim": 8, "H": 4, "W": 7, "mlp": "leff", "mlp_ratio": 3},
}


def make() -> Golden:
    """Attention that copies its keys, and layers around it."""
    source = Source(27)
    found: dict[str, Tensor] = {}
    for case in CONFIG["cases"]:
        found |= attention(source, case)
    for tag in ("ral", "cab"):
        found |= layer(source, tag, CONFIG[tag])
    return stored(found, torch.float32), metadata(CONFIG)


def module_of(case: dict[str, Any]) -> RegionalAttention:
    """The attention of a case."""
    sizes = (case["dim"], case["heads"], case["kernel_size"], case["dilation"])
    return RegionalAttention(*sizes, backend="reference", dtype=torch.float64)


def attention(source: Source, case: dict[str, Any]) -> dict[str, Tensor]:
    """Attention alone, on maps whose channels come last."""
    tag, module = case["tag"], module_of(case)
    fill(source, module)
    x = source(2, case["H"], case["W"], case["dim"]).requires_grad_()
    w = source(*x.shape)
    y = module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert module.rpb is not None
    return {
        f"in.{tag}.x": x,
        f"in.{tag}.w": w,
        f"out.{tag}.y": y,
        **prefixed(f"param.{tag}.", module.state_dict()),
        **gradients((y * w).sum(), {"x": x, "rpb": module.rpb}, f"grad.{tag}."),
    }


def layer(source: Source, tag: str, case: dict[str, Any]) -> dict[str, Tensor]:
    """A layer on tokens, with attention or without."""
    attn = module_of(case) if "heads" in case else None
    block = RASMBlock(case["dim"], attn, case["mlp_ratio"]).double()
    fill(source, block)
    names = under(read("regional")[0], f"param.{tag}")
    theirs = {ours: name for name, ours in zip(names, from_official(names), strict=True)}
    x = source(2, case["dim"], case["H"], case["W"])
    y = block(x)
    found = {f"param.{tag}{theirs[f'.{ours}']}": v for ours, v in block.state_dict().items()}
    return {f"in.{tag}.x": x.flatten(2).mT, f"out.{tag}.y": y.flatten(2).mT, **found}
