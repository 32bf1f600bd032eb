"""Another golden file of the modules of residual attention."""

from __future__ import annotations

from typing import Any

import torch
from golden_files import Golden
from residual_names import golden_cases, kind_of, names_of_module, set_norms
from torch import Tensor, nn

from golden_forms import Source, gradients, metadata, prefixed, stored
from zoo.feature.residual import AttentionModule

CONFIG: dict[str, Any] = {
    "channels": 12,
    "pre3": "AttentionModule_pre: 3 poolings, no extra additions",
    "s1add": "AttentionModule_stage1: the same with extra additions",
    "s3add": "AttentionModule_stage3: 1 pooling plus trunk addition",
    "c3": "AttentionModule_stage3_cifar: no pooling",
    "bn_eps": 0.01,
    "bn_momentum": 0.3,
    "max_pool": "kernel 3 stride 2 padding 1",
}
SIZES = {3: (8, 12), 1: (6, 5), 0: (5, 3)}  # of maps, by the number of poolings


def make() -> Golden:
    """Every kind of module line by line, with running statistics and with those of the batch."""
    source = Source(25)
    found: dict[str, Tensor] = {}
    for case in golden_cases({}, {"config": CONFIG}):
        found |= module_of(source, case)
    return stored(found, torch.float32), metadata(CONFIG)


def module_of(source: Source, case: str) -> dict[str, Tensor]:
    """Outputs of a module and the gradient of its input."""
    channels, (depth, extra_adds) = CONFIG["channels"], kind_of(CONFIG, case)
    facts = {"pool": "pad", "extra_adds": extra_adds, "dtype": torch.float64}
    module = AttentionModule(channels, depth, **facts)
    fill(source, module)
    set_norms(module, CONFIG)
    module.route = "reference"
    theirs = {ours: name for name, ours in names_of_module(depth).items()}
    param = {}
    for name, value in module.state_dict().items():
        if "num_batches" not in name:
            (place,) = [p for p in theirs if name.startswith(f"{p}.")]
            param[theirs[place] + name.removeprefix(place)] = value.clone()
    x = source(3, channels, *SIZES[depth]).requires_grad_()
    w = source(*x.shape)
    y = module.eval()(x)
    return {
        f"in.{case}.x": x,
        f"in.{case}.w": w,
        f"out.{case}.eval": y,
        **gradients((y * w).sum(), {"x": x}, f"grad.{case}.eval."),
        f"out.{case}.train": module.train()(x),
        **prefixed(f"param.{case}.", param),
    }


def fill(source: Source, module: nn.Module) -> None:
    """Give all weights and statistics numbers of the size that keeps maps at theirs."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            drawn = source(*value.shape)
            if name.endswith("running_var"):
                drawn = 0.5 + drawn.abs()
            elif value.ndim > 1:
                drawn = drawn / value[0].numel() ** 0.5
            value.copy_(drawn)
