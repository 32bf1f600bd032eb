"""What a decoder tells whole modules in place of attention, and asks of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.mixers._base import Mixer
from zoo.models.language.decoder_lm import DecoderLM


class Told(Mixer):
    """Remembers what it was told, starts at ones and shares its weights between layers."""

    kind = "mixer"
    name = "told"
    special_init = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        dropout: float = 0.0,
        max_len: int | None = None,
        depth: int = 0,
        layers: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, dropout=dropout, device=device, dtype=dtype)
        self.facts = (max_len, depth, layers)

    def make_layers(self, made: dict[str, Any]) -> None:
        self.proj = nn.Linear(self.dim, self.dim, **made)

    def mix(self, x, seen, cache):
        return self.proj(x)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.proj.weight)

    def tie(self, first: Mixer) -> None:
        self.proj.weight = first.proj.weight


SPEC = f"{__name__}:Told"


def test_a_mixer_is_told_what_it_asks_for():
    model = DecoderLM(7, dim=8, heads=2, depth=3, attention=SPEC, dropout=0.25, max_len=16)
    mixers = [block.attn for block in model.blocks]
    assert [mixer.facts for mixer in mixers] == [(16, 0, 3), (16, 1, 3), (16, 2, 3)]
    assert {mixer.dropout for mixer in mixers} == {0.25}
    assert all(mixer.causal for mixer in mixers)


def test_its_own_start_and_its_sharing_are_kept():
    model = DecoderLM(7, dim=8, heads=2, depth=2, attention=SPEC)
    first, second = (block.attn for block in model.blocks)
    assert torch.equal(first.proj.weight, torch.ones(8, 8))
    assert second.proj.weight is first.proj.weight


@pytest.mark.parametrize("name", zoo.list(kind="mixer"))
def test_dropout_reaches_every_mixer(name):
    model = DecoderLM(7, dim=8, heads=2, depth=2, attention=name, dropout=0.25)
    assert {block.attn.dropout for block in model.blocks} == {0.25}


@pytest.mark.parametrize(("option", "value"), [("kv_heads", 1), ("head_dim", 4), ("qk_norm", True)])
def test_what_a_mixer_lacks_is_refused(option, value):
    with pytest.raises(zoo.ZooError, match=f"{option}={value}: .*Told' is a whole module"):
        DecoderLM(7, dim=8, heads=2, attention=SPEC, **{option: value})
