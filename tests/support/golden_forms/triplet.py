"""Another golden file of triplet attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from golden_files import Golden
from torch import Tensor

from golden_forms import Source, gradients, metadata, prefixed, stored

CONFIG: dict[str, Any] = {
    "B": 3,
    "C": 4,
    "H": 6,
    "W": 5,
    "kernel_size": 3,
    "bn_eps": 0.01,
    "bn_momentum": 0.2,
}
# Axis that is pooled, and how what is left, with the pooled pair in front, lies under the kernel.
AXES = {"cw": (2, (0, 1, 2, 3)), "hc": (3, (0, 1, 3, 2)), "hw": (1, (0, 1, 2, 3))}


def make() -> Golden:
    """All three branches and two, outside of training and in it."""
    source = Source(24)
    shape = tuple(CONFIG[n] for n in "BCHW")
    x, w = source(*shape).requires_grad_(), source(*shape)
    param, few = parameters(source, tuple(AXES)), parameters(source, ("cw", "hc"))
    y, _ = attend(x, param, training=False)
    trained, running = attend(x, param, training=True)
    other, _ = attend(x, few, training=False)
    learned = {name: p for name, p in param.items() if "running" not in name}
    found = {
        "in.x": x,
        "in.w": w,
        "out.eval": y,
        "out.train": trained,
        "out.nospatial.eval": other,
        **prefixed("param.", param),
        **prefixed("param.nospatial.", few),
        **prefixed("out.running_after_train.", running),
        **gradients((y * w).sum(), {"x": x, **learned}, "grad.eval."),
        **gradients((trained * w).sum(), {"x": x}, "grad.train."),
        **gradients((other * w).sum(), {"x": x}, "grad.nospatial.eval."),
    }
    return stored(found, torch.float64), metadata(CONFIG)


def parameters(source: Source, branches: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights by their official names, and statistics."""
    side, found = CONFIG["kernel_size"], {}
    for name in branches:
        found[f"{name}.conv.conv.weight"] = source(1, 2, side, side).requires_grad_()
        found |= {f"{name}.conv.bn.{n}": source(1).requires_grad_() for n in ("weight", "bias")}
        found[f"{name}.conv.bn.running_mean"] = source(1)
        found[f"{name}.conv.bn.running_var"] = 0.5 + source(1).abs()
    return found


def attend(x: Tensor, param: dict[str, Tensor], training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The gated map, and the running statistics afterwards."""
    total, count, running = torch.zeros_like(x), 0, {}
    side = CONFIG["kernel_size"]
    for name, (axis, order) in AXES.items():
        start = f"{name}.conv.bn."
        if f"{start}weight" not in param:
            continue
        statistics = {n: param[f"{start}{n}"].clone() for n in ("running_mean", "running_var")}
        pooled = torch.stack((x.amax(axis), x.mean(axis)), 1).permute(order)
        u = F.conv2d(pooled, param[f"{name}.conv.conv.weight"], padding=side // 2)
        u = F.batch_norm(
            u,
            *statistics.values(),
            param[f"{start}weight"],
            param[f"{start}bias"],
            training,
            CONFIG["bn_momentum"],
            CONFIG["bn_eps"],
        )
        total = total + x * u.permute(order).squeeze(1).sigmoid().unsqueeze(axis)
        count += 1
        running |= prefixed(start, statistics)
    return total / count, running
