"""Golden files of residual attention, with their names turned into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Where the parts of the golden modules are here: by number of poolings, names of theirs and ours.
_PLACES = {
    3: {
        "softmax1_blocks": "mask_branch.down.0.0",
        "softmax2_blocks": "mask_branch.down.1.0",
        "softmax3_blocks.0": "mask_branch.bottom.0",
        "softmax3_blocks.1": "mask_branch.bottom.1",
        "skip1_connection_residual_block": "mask_branch.skip.0.0",
        "skip2_connection_residual_block": "mask_branch.skip.1.0",
        "softmax4_blocks": "mask_branch.up.0.0",
        "softmax5_blocks": "mask_branch.up.1.0",
    },
    1: {
        "softmax1_blocks.0": "mask_branch.bottom.0",
        "softmax1_blocks.1": "mask_branch.bottom.1",
    },
    0: {
        "middle_2r_blocks.0": "mask_branch.bottom.0",
        "middle_2r_blocks.1": "mask_branch.bottom.1",
    },
}
_TRUNK = {
    "first_residual_blocks": "pre.0",
    "trunk_branches.0": "trunk.0",
    "trunk_branches.1": "trunk.1",
    "last_blocks": "post.0",
}
_HEADS = {3: "softmax6_blocks", 1: "softmax2_blocks", 0: "conv1_1_blocks"}
_HEAD = {"0": "bn1", "2": "conv1", "3": "bn2", "5": "conv2"}
# Poolings and whether there are extra additions, by the official classes.
_CLASSES = {
    "AttentionModule_pre": (3, False),
    "AttentionModule_stage1": (3, True),
    "AttentionModule_stage3": (1, True),
    "AttentionModule_stage3_cifar": (0, False),
}


def golden_cases(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> list[str]:
    """Modules of a file: what it says about them begins with their class."""
    words = {name: str(value).partition(":")[0] for name, value in metadata["config"].items()}
    return [name for name, word in words.items() if word.startswith("AttentionModule")]


def kind_of(config: Mapping[str, Any], case: str) -> tuple[int, bool]:
    """Poolings of a module, and whether it has extra additions."""
    return _CLASSES[config[case].partition(":")[0]]


def names_of_module(depth: int) -> dict[str, str]:
    """Our parts by the names of theirs, for a module with `depth` poolings."""
    head = {f"{_HEADS[depth]}.{i}": f"mask_branch.head.{name}" for i, name in _HEAD.items()}
    return {**_TRUNK, **_PLACES[depth], **head}


def set_norms(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Let all BatchNorms go by the file; ours have no options for it."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = config["bn_eps"]
            part.momentum = config.get("bn_momentum", part.momentum)


def widths_of_net(tensors: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    """Channels of the four stages of a net."""
    units = ("pre_res_1", "pre_res_2", "pre_res_3", "post_res_4_1")
    a, b, c, d = (len(tensors[f"param.{unit}/branch1/conv3_1x1.weight"]) for unit in units)
    return a, b, c, d


def names_of_net() -> dict[str, str]:
    """Layers of the net, by name, and what the golden file calls them."""
    found = {
        "conv1": "conv1",
        "bn1": "conv1/bn",
        "norm": "post_res_4_3/bn",
        "fc": "classifier",
    }

    def unit(ours: str, theirs: str, source: str) -> None:
        found[f"{ours}.bn1"] = f"{source}/bn"
        for i, conv in enumerate(("conv1_1x1", "conv2_3x3", "conv3_1x1"), 1):
            found[f"{ours}.conv{i}"] = f"{theirs}/branch1/{conv}"
            if i < 3:
                found[f"{ours}.bn{i + 1}"] = f"{theirs}/branch1/{conv}/bn"
        found[f"{ours}.shortcut"] = f"{theirs}/branch2/conv1_1x1"

    source = "pool1_3x3_s2"
    for i, (letter, depth) in enumerate((("A", 3), ("B", 2), ("C", 1))):
        ours, theirs = f"stages.{i}.1", f"Attention{letter}_1"
        mask, branch = f"{theirs}/mask", f"{ours}.mask_branch"
        unit(f"stages.{i}.0", f"pre_res_{i + 1}", source)
        unit(f"{ours}.pre.0", f"{theirs}/trunk/res1", f"pre_res_{i + 1}")
        unit(f"{ours}.trunk.0", f"{theirs}/trunk/res2", f"{theirs}/trunk/res1")
        unit(f"{ours}.trunk.1", f"{theirs}/trunk/res3", f"{theirs}/trunk/res2")
        unit(f"{ours}.post.0", theirs, f"{theirs}/fusion")
        down, up = f"{mask}/down_sample", f"{mask}/up_sample"
        for level in range(1, depth):
            k = level - 1
            unit(f"{branch}.down.{k}.0", f"{down}/res{level}_1", f"{down}/pool{level}_3x3_s2")
            unit(f"{branch}.skip.{k}.0", f"{mask}/skip/res{level}", f"{down}/res{level}_1")
            unit(f"{branch}.up.{depth - 1 - level}.0", f"{up}/res{level}_1", f"{up}{level}")
        unit(f"{branch}.bottom.0", f"{down}/res{depth}_1", f"{down}/pool{depth}_3x3_s2")
        unit(f"{branch}.bottom.1", f"{down}/res{depth}_2", f"{down}/res{depth}_1")
        found[f"{branch}.head.bn1"] = f"{up}/interp_1/bn"
        found[f"{branch}.head.conv1"] = f"{mask}/linear_1"
        found[f"{branch}.head.bn2"] = f"{mask}/linear_1/bn"
        found[f"{branch}.head.conv2"] = f"{mask}/linear_2"
        source = theirs
    for i in range(3):
        unit(f"stages.3.{i}", f"post_res_4_{i + 1}", source)
        source = f"post_res_4_{i + 1}"
    return found
