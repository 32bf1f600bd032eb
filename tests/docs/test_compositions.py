"""Parts of different sockets work together or say why not, and the page says which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zoo.docs import compositions
from zoo.docs.compositions import Composition
from zoo.host.collect import auxiliary_losses

PAIRS = list(compositions.pairs())
TRIPLES = list(compositions.triples())
PAGE = Path(__file__).parents[2] / "docs" / "compositions.md"


def test_the_page_is_that_of_the_registry() -> None:
    assert PAGE.read_text(encoding="utf-8") == compositions.page(), "run: make docs"


def test_pairs_cover_all_parts_of_different_sockets() -> None:
    sizes = [len(names) for names in compositions.parts().values()]
    assert len(PAIRS) == (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2
    assert len({frozenset(item.names) for item in PAIRS}) == len(PAIRS)


def test_the_sample_of_triples_is_fixed_and_varied() -> None:
    assert [item.names for item in compositions.triples()] == [item.names for item in TRIPLES]
    assert len(TRIPLES) == compositions.TRIPLES
    assert len({name for item in TRIPLES for name in item.names}) > 10
    other = [item.names for item in compositions.triples(seed=1)]
    assert other != [item.names for item in TRIPLES]


@pytest.mark.parametrize("item", [*PAIRS, *TRIPLES], ids=lambda item: item.spec)
def test_a_combination_trains_one_step_or_says_why_not(item: Composition) -> None:
    if item.reason is not None:
        assert sum(repr(name) in item.reason for name in item.names) >= 2, item.reason
        return
    assert item.modes == tuple(compositions.promised(item.names))
    for mode in item.modes:
        host = compositions.build(item.names, mode)
        x = torch.randn(2, 11, host.dim, generator=torch.Generator().manual_seed(0))
        before = host(x)
        optimizer = torch.optim.SGD(host.parameters(), lr=1e-2)
        loss = before.square().mean() + sum(auxiliary_losses(host).values())
        loss.backward()
        gradients = [p.grad for p in host.parameters() if p.grad is not None]
        assert all(bool(g.isfinite().all()) for g in gradients)
        assert any(float(g.abs().max()) > 0 for g in gradients)
        optimizer.step()
        after = host(x)
        assert bool(after.isfinite().all())
        assert not torch.equal(after, before)
