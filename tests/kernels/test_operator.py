"""Operators of named tuples: schemas, gradients that are asked for, second derivatives."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import infer_schema

from zoo.errors import ZooError
from zoo.kernels._operator import refuse_second, spread, wanted


class Pair(NamedTuple):
    a: Tensor
    b: Tensor | None


class Options(NamedTuple):
    factor: float
    size: int


def mixed(x: Tensor, pair: Pair, options: Options) -> tuple[Tensor, Tensor]:
    assert isinstance(pair, Pair)
    assert isinstance(options, Options)
    second = pair.a if pair.b is None else pair.b
    return x * options.factor, second * options.size


def test_fields_stand_in_the_place_of_their_tuple():
    flat = spread(mixed)
    found = infer_schema(flat, mutates_args=())
    wanted = "(Tensor x, Tensor a, Tensor? b, float factor, SymInt size) -> (Tensor, Tensor)"
    assert found == wanted
    x, a, b = torch.randn(3, 4)
    for second, other in ((b, b), (a, None)):
        y, z = flat(x, a, other, 0.5, 3)
        assert torch.equal(y, x * 0.5)
        assert torch.equal(z, second * 3)
    with pytest.raises(TypeError):
        flat(x, a, b, 0.5)


def test_only_gradients_that_are_asked_for_and_only_once():
    calls = []

    @torch.library.custom_op("zoo_test::product", mutates_args=())
    @spread
    def product(pair: Pair) -> Tensor:
        return pair.a * pair.b

    @torch.library.custom_op("zoo_test::product_bwd", mutates_args=())
    @spread
    def product_bwd(grad: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
        return grad * pair.b, grad * pair.a

    def backward(ctx, grad):
        calls.append(wanted(ctx, product_bwd(grad, *ctx.saved_tensors)))
        return calls[-1]

    product.register_autograd(
        backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    refuse_second(product_bwd, "only once")

    a, b = torch.randn(2, 3)
    a.requires_grad_()
    (grad,) = torch.autograd.grad(product(a, b).sum(), a, create_graph=True)
    assert torch.equal(grad, b)
    assert calls[0][1] is None
    b.requires_grad_()
    (grad,) = torch.autograd.grad(product(a, b).sum(), a, create_graph=True)
    with pytest.raises(ZooError, match="only once"):
        grad.sum().backward()
