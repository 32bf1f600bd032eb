"""What checkpoints of the language models hold: a renamed parameter would leave them unreadable."""

from __future__ import annotations

import pytest

from zoo import models

SIZES = {"vocab_size": 5, "dim": 8, "depth": 2, "heads": 2, "max_len": 6}


def blocks(**shapes):
    """Shapes by name in each of two blocks; dots are written as double underscores."""
    return {
        f"blocks.{i}.{name.replace('__', '.')}": shape
        for i in range(2)
        for name, shape in shapes.items()
    }


HELD = {
    "decoder_lm": {
        **blocks(
            attn__combine__proj__weight=(8, 8),
            attn__project__qkv__weight=(24, 8),
            conv__conv__weight=(8, 1, 3),
            mlp__down__weight=(8, 16),
            mlp__up__weight=(32, 8),
            norm1__weight=(8,),
            norm2__weight=(8,),
        ),
        "embedding.weight": (5, 8),
        "head.weight": (5, 8),
        "norm.weight": (8,),
        "position.table.weight": (6, 8),
    },
    "transnormer": {
        **blocks(
            attn__attend__gate__weight=(8, 8),
            attn__combine__proj__weight=(8, 8),
            attn__project__qkv__weight=(24, 8),
            mlp__down__weight=(8, 16),
            mlp__up__weight=(32, 8),
        ),
        "blocks.0.attn.attend.theta": (2, 4),  # LRPE of the first layer
        "embedding.weight": (5, 8),
        "head.weight": (5, 8),
    },
}
OPTIONS = {"decoder_lm": {"conv": 3, "mlp": 2}, "transnormer": {}}


@pytest.mark.parametrize("name", HELD)
def test_parameters_keep_their_names_and_shapes(name):
    model = models.create(name, **SIZES, **OPTIONS[name])
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert sorted(found.items()) == sorted(HELD[name].items())


def test_without_mlp_and_convolution_a_block_holds_a_norm_and_its_mixer():
    model = models.create("decoder_lm", **SIZES, mlp=0)
    held = {key.split(".")[2] for key in model.state_dict() if key.startswith("blocks.0.")}
    assert held == {"norm1", "attn"}
