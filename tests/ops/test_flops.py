"""Operations are counted, whoever computes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.ops import flops


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_on_a_processor_is_two_products_and_its_backward_five(causal):
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 5, 5))
    product = 2 * 2 * 3 * 5 * 5 * 8

    def both():
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()

    with torch.no_grad():
        forward = flops.count(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    assert forward == 2 * product
    assert flops.count(both) == 7 * product


def test_products_added_in_place_count_as_those_that_are_not():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    into = torch.zeros(3, 5)
    assert flops.count(lambda: into.addmm_(a, b)) == flops.count(lambda: a @ b) == 2 * 3 * 4 * 5
    a, b, into = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.zeros(2, 3, 5)
    assert flops.count(lambda: into.baddbmm_(a, b)) == flops.count(lambda: a @ b) == 240
    assert flops.count(lambda: torch.baddbmm(into, a, b, out=into)) == 240


def test_the_call_is_made_once():
    calls = []
    assert flops.count(lambda: calls.append(1)) == 0
    assert calls == [1]
