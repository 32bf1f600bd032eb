"""Another golden file of the network with regional attention."""

from __future__ import annotations

import re
from typing import Any

import torch
from golden_files import Golden, read, under

from golden_forms import Source, metadata, stored
from golden_forms.residual_attention import fill
from zoo.models.vision.rasm import from_official, rasm

CONFIG: dict[str, Any] = {
    "embed_dim": 6,
    "depths": [1, 2, 1, 1, 1, 1, 2, 1, 1],
    "num_heads": [1, 1, 2, 4, 4, 4, 8, 2, 1],
    "kernel_size": 3,
    "dilation": 1,
    "mlp_ratio": 2,
    "token_mlp": "leff",
    "H": 24,
    "W": 32,
}
LEVELS = (0, 1, 2, 4, 6, 7, 8)  # the entries that the official code uses
ATTENDING = (2, 4, 6)


def make() -> Golden:
    """The whole network, with weights that float16 holds exactly."""
    source = Source(28)
    attention = f"regional(kernel={CONFIG['kernel_size']}, dilation={CONFIG['dilation']})"
    net = rasm(
        attention.replace(")", ", backend=reference)"),
        width=CONFIG["embed_dim"],
        depths=[CONFIG["depths"][n] for n in LEVELS],
        heads=[CONFIG["num_heads"][n] for n in ATTENDING],
        mlp_ratio=CONFIG["mlp_ratio"],
    )
    net = net.double().eval()
    fill(source, net)
    net.load_state_dict({name: x.half().double() for name, x in net.state_dict().items()})
    x = source(1, 3, CONFIG["H"], CONFIG["W"]).sigmoid().float().double()
    mask = (source(1, 1, CONFIG["H"], CONFIG["W"]) > 0.5).double()
    with torch.no_grad():
        found = stored({"in.x": x, "in.mask": mask, "out.y": net(x, mask)}, torch.float32)
    names = under(read("regional_rasm")[0], "param.")
    theirs = {ours: name for name, ours in zip(names, from_official(names), strict=True)}
    for name, value in net.state_dict().items():
        # Levels of the file have one layer each; further ones are counted behind their level.
        level = re.fullmatch(r"(levels\.\d)\.(\d)(\..+)", name)
        if level is None:
            found[f"param.{theirs[name]}"] = value.half()
        else:
            first = theirs[f"{level[1]}.0{level[3]}"]
            found[f"param.{first.replace('blocks.0', f'blocks.{level[2]}')}"] = value.half()
    return found, metadata(CONFIG)
