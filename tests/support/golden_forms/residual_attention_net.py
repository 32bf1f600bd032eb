"""Another golden file of a residual attention network."""

from __future__ import annotations

from typing import Any

import torch
from golden_files import Golden
from residual_names import names_of_net, set_norms

from golden_forms import Source, metadata, stored
from golden_forms.residual_attention import fill
from zoo.feature.residual import AttentionModule, attention_module_reference
from zoo.models.vision.residual_attention import ResidualAttentionNet

CONFIG: dict[str, Any] = {
    "description": "Attention-56, other channel counts, 3 classes",
    "input": 48,
    "channel_divisor": "none for all: see the shapes",
    "max_pool": "kernel 3 stride 2 pad 0 ceil_mode",
    "interp": "bilinear align_corners to the size of the 2nd bottom",
    "bn_eps": 0.001,
    "avg_pool": "global",
}


def make() -> Golden:
    """What the stages of the net give, with its masks."""
    source, names = Source(26), names_of_net()
    net = (
        ResidualAttentionNet((1, 1, 1), (8, 12, 20, 24), num_classes=3, in_chans=2).double().eval()
    )
    fill(source, net)
    net.load_state_dict({k: v.float().double() for k, v in net.state_dict().items()})
    set_norms(net, CONFIG)
    found = {"in.x": source(1, 2, CONFIG["input"], CONFIG["input"]).float().double()}
    for name, value in net.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if kind != "num_batches_tracked":
            found[f"param.{names[layer]}.{kind.removeprefix('running_')}"] = value
    with torch.no_grad():
        x = net.maxpool(net._stem(found["in.x"]))
        for letter, stage in zip("ABC", net.stages, strict=False):
            unit, module = stage
            assert isinstance(module, AttentionModule)
            x, mask = attention_module_reference(unit(x), module)
            found |= {f"out.Attention{letter}_1": x, f"out.Attention{letter}_1/mask": mask}
        x = net.stages[3](x)
        found["out.post_res_4_3"] = x
        found["out.classifier"] = net.fc(net.norm(x).relu().mean((2, 3)))
    return stored(found, torch.float32), metadata(CONFIG)
