"""Auxiliary losses, captured passes and padding masks of whole models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import zoo


class Block(nn.Module):
    """Norm in front of attention, as in the zoo's and timm's blocks."""

    def __init__(self, spec: str = "mha") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.attn = zoo.create(spec, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))


class Model(nn.Module):
    """Two blocks and one bare attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = zoo.create("mha", 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_capture_records_every_layer_and_its_norm_input() -> None:
    model, x = Model(), torch.randn(2, 5, 8)
    with zoo.capture(model) as found:
        y = model(x)
    assert set(found) == {"blocks.0.attn", "blocks.1.attn", "last"}
    assert [len(passes) for passes in found.values()] == [1, 1, 1]
    (first,), (second,), (last,) = found.values()
    assert first.norm_input is not None
    assert torch.equal(first.norm_input, x)
    assert torch.equal(first.x, model.blocks[0].norm1(x))
    middle = model.blocks[0](x)
    assert second.norm_input is not None
    torch.testing.assert_close(second.norm_input, middle)
    assert last.norm_input is None
    for seen in (first, second, last):
        assert seen.pattern is not None
        assert seen.pattern.shape == (2, 2, 5, 5)
        assert seen.heads.shape == (2, 2, 5, 4)
    torch.testing.assert_close(model.last.combine(last.heads, last.x), y)


def test_capture_records_every_pass_in_order_and_cleans_up() -> None:
    model = Block()
    inputs = [torch.randn(1, n, 8) for n in (3, 5, 4)]
    with zoo.capture(model) as found:
        for x in inputs:
            model(x)
    (passes,) = found.values()
    assert [p.x.shape[1] for p in passes] == [3, 5, 4]
    for seen, x in zip(passes, inputs, strict=True):
        assert seen.norm_input is x
    model(inputs[0])
    assert len(passes) == 3, "recording goes on after the block"
    assert not model.norm1._forward_pre_hooks
    assert not model.attn._forward_hooks
    assert model.attn._recorder is None


def test_capture_nests_and_survives_errors() -> None:
    model, x = Block(), torch.randn(1, 3, 8)
    with zoo.capture(model) as outer:
        model(x)
        with zoo.capture(model) as inner:
            model(x)
        with pytest.raises(RuntimeError), zoo.capture(model):
            model(x[..., :3])
        model(x)
    assert len(inner["attn"]) == 1
    assert len(outer["attn"]) == 2
    assert model.attn._recorder is None


def test_captured_parts_take_part_in_the_graph() -> None:
    model, x = Block(), torch.randn(1, 4, 8)
    with zoo.capture(model) as found:
        model(x)
    (seen,) = found["attn"]
    assert seen.pattern is not None
    seen.pattern.square().sum().backward()
    assert model.attn.project.qkv.weight.grad is not None


def test_capture_without_attention() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(zoo.ZooError, match="Sequential has no attention layer"), zoo.capture(model):
        raise AssertionError("unreachable")


def test_capture_of_a_host_itself() -> None:
    host, x = zoo.create("mha", 8, 2), torch.randn(1, 3, 8)
    with zoo.capture(host) as found:
        host(x)
    assert len(found[""]) == 1


def test_auxiliary_losses_are_summed_by_name_and_follow_the_last_pass() -> None:
    model = Model()
    assert zoo.auxiliary_losses(model) == {}
    value = torch.tensor(2.0, requires_grad=True)
    model.blocks[0].attn.normalize.aux_losses["balance"] = value * 1
    model.blocks[1].attn.normalize.aux_losses["balance"] = value * 2
    model.last.combine.aux_losses["spread"] = value * 3
    found = zoo.auxiliary_losses(model)
    assert {name: float(v.detach()) for name, v in found.items()} == {"balance": 6.0, "spread": 6.0}
    found["balance"].backward()
    assert value.grad == 3.0
    model(torch.randn(1, 3, 8))
    assert zoo.auxiliary_losses(model) == {}, "losses of an earlier pass are left"


def test_losses_with_a_graph_do_not_hinder_copies() -> None:
    model = Block()
    model.attn.combine.aux_losses["a"] = torch.tensor(1.0, requires_grad=True) * 2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert zoo.auxiliary_losses(other) == {}
    assert set(zoo.auxiliary_losses(model)) == {"a"}


@pytest.mark.parametrize("length", [None, 5, 2])
def test_padding_mask(length: int | None) -> None:
    mask = zoo.padding_mask(torch.tensor([3, 0, 1]), length)
    size = 3 if length is None else length
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 1, 1, size)
    assert mask[:, 0, 0].tolist() == [[j < n for j in range(size)] for n in (3, 0, 1)]
