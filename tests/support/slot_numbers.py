"""Golden files of slot attention, with their names turned into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from golden_files import Golden, under
from torch import Tensor

DISTANCES = {"dot_prod": "dot", "l2": "l2", "cosine": "cosine"}


def sizes(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that all cases of a file share, as our modules take them."""
    ours = {
        "d_in": "dim_in",
        "d_slot": "dim",
        "n_slots": "slots",
        "d_mlp": "hidden",
        "n_sa_iters": "iterations",
    }
    return {"dtype": tensors["in.x"].dtype, **{own: config[name] for name, own in ours.items()}}


def state(tensors: Mapping[str, Tensor], case: str, kind: str = "param") -> dict[str, Tensor]:
    """Parameters or gradients of a case; module names are the official ones."""
    return under(tensors, f"{kind}.{case}.")


def slot_cases(tensors: Mapping[str, Tensor], metadata: object) -> list[str]:
    """Cases of modules in a file."""
    names = (name.removesuffix(".slots") for name in under(tensors, "out."))
    return [name for name in names if "." not in name]


def run(file: Golden, module: torch.nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the file's loss; none for slots that are cut off."""
    tensors, _ = file
    x, slots = (tensors[f"in.{name}"].clone().requires_grad_() for name in ("x", "slots"))
    y = module(x, slots, **inputs)
    (y * tensors["in.w"]).sum().backward()
    found = {"out": y.detach(), "x": x.grad, "slots": slots.grad}
    found.update((n, p.grad) for n, p in module.named_parameters())
    return {name: value for name, value in found.items() if value is not None}
