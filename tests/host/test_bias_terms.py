"""What is added to scores: masks made of numbers, penalties of positions, and biases of callers."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo import inputs
from zoo.host import engine
from zoo.normalize.cog import cog_attention_reference
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

LOWEST = [torch.finfo(t).min for t in (torch.float16, torch.bfloat16, torch.float32)]


def distance(host: zoo.Attention, x: torch.Tensor) -> float:
    """Mean of |i - j| over the last row's keys, by the size of their weights."""
    with torch.no_grad():
        _, weights = host(x, need_weights=True)
    sizes = weights[..., -1, :].abs()
    away = torch.arange(x.shape[1] - 1, -1, -1)
    return float((sizes * away).sum() / sizes.sum())


MODES = [
    (name, causal)
    for name in zoo.list(kind="normalize", traits={"bias": True})
    for causal, trait in ((True, "causal"), (False, "bidirectional"))
    if getattr(zoo.info(name).traits, trait)
]


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_a_penalty_on_distance_brings_every_normalizer_nearer(name, causal):
    x = 3 * draw(2, 256, 32)
    options = {"dim": 32, "heads": 4, "causal": causal, "dtype": torch.float64}
    torch.manual_seed(0)
    plain = zoo.create(name, **options)
    near = zoo.create(f"{name}+alibi", **options)
    near.load_state_dict(plain.state_dict())
    assert distance(near, x) < 0.75 * distance(plain, x)


@pytest.mark.parametrize("position", zoo.list(kind="position", traits={"bias": True}))
def test_cog_adds_what_depends_on_places_alone_to_the_exponent(position):
    """Against the equation with the position's own term, or scores that hold it already."""
    host = zoo.create(f"cog+{position}", 16, 4, causal=True, max_len=32, dtype=torch.float64)
    if not host.position.biases:
        return
    with torch.no_grad():
        for parameter in host.position.parameters():
            parameter.add_(0.3 * draw(*parameter.shape))
    x = draw(2, 9, 16)
    plain = zoo.create(f"softmax+{position}", 16, 4, causal=True, max_len=32, dtype=torch.float64)
    plain.load_state_dict(host.state_dict())
    call = host.begin(x)
    products = call.q @ call.k.transpose(-1, -2) * call.scale
    # A softmax shows score plus term up to a constant of each row; the diagonal sets it.
    with torch.no_grad():
        _, shown = plain(x, need_weights=True)
        _, weights = host(x, need_weights=True)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    summed = shown.clamp(min=1e-300).log()
    term = summed - products
    if host.position.static:
        sign, exponent = products.sign(), products.abs() + term
    else:
        own = term - term.diagonal(dim1=-2, dim2=-1)[..., None]
        scores = products + own + host_diagonal(host, x)[..., None]
        sign, exponent = scores.sign(), scores.abs()
    expected = sign * exponent.masked_fill(~seen, -torch.inf).softmax(-1)
    assert_close(weights, expected)


def host_diagonal(host: zoo.Attention, x: torch.Tensor) -> torch.Tensor:
    """The position's term of each token with itself, (B, H, N), from a pass of one row each."""
    rows = []
    for i in range(x.shape[1]):
        cache = zoo.LayerCache()
        if i:
            host(x[:, :i], cache=cache)
        call = host.begin(x[:, i : i + 1], cache=cache)
        (strip,) = engine.strips(call, host.select)
        strip.mask = engine.strip_mask(strip, host.select)
        zero = torch.zeros(2, 4, 1, i + 1, dtype=torch.float64)
        scores = host.score(strip)
        rows.append((host.position.bias(strip, scores + zero) - scores)[..., 0, -1])
    return torch.stack(rows, -1)


@pytest.mark.parametrize("hidden", [-torch.inf, -1e4, -1e9, *LOWEST])
def test_cog_gives_no_weight_to_keys_that_numbers_hide(hidden):
    host = zoo.create("cog", 16, 4, dtype=torch.float64)
    x = draw(2, 7, 16)
    seen = torch.tensor([True, True, False, True, False, True, True])
    with torch.no_grad():
        y, weights = host(
            x, bias=torch.zeros(7).masked_fill(~seen, hidden).expand(7, 7), need_weights=True
        )
    assert float(weights[..., ~seen].abs().max()) == 0
    q, k, v = host.project(x, None, None)
    heads = cog_attention_reference(q, k, v, mask=seen.expand(1, 1, 7, 7), scale=host.scale)
    assert_close(y, host.combine(heads, x))


def test_what_is_only_a_mask_leaves_no_bias():
    mask, rest = inputs.split_bias(torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]))
    assert rest is None
    assert mask is not None
    assert mask.tolist() == [[True, False], [True, True]]
    bias = torch.tensor([[0.5, -9999.0]])
    assert inputs.split_bias(bias) == (None, bias)
    mask, rest = inputs.split_bias(torch.tensor([[0.5, -1e4, torch.nan]]))
    assert mask is not None
    assert rest is not None
    assert mask.tolist() == [[True, False, True]]
    assert rest[0, :2].tolist() == [0.5, 0.0]
    assert bool(rest[0, 2].isnan())


def test_a_learned_bias_keeps_its_gradient_where_it_hides_nothing():
    bias = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    mask, rest = inputs.split_bias(bias)
    assert mask is not None
    assert rest is not None
    rest.sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("name", zoo.list(kind="attend"))
def test_parts_that_take_a_mask_and_no_bias_take_a_mask_of_numbers(name):
    traits = zoo.info(name).traits
    host = zoo.create(name, 16, 4, causal=not traits.bidirectional, dtype=torch.float64)
    x = draw(2, 7, 16)
    numbers = torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    numbers[1, ..., 5:] = -torch.inf
    if traits.mask == "none":
        with pytest.raises(zoo.ZooError, match=f"{name!r} takes no mask"):
            host(x, bias=numbers)
        return
    assert_close(host(x, bias=numbers), host(x, mask=numbers == 0))
    if not traits.bias:
        with pytest.raises(zoo.ZooError, match="forms no scores that a bias could be added to"):
            host(x, bias=numbers + 0.5)


def test_the_error_for_a_mask_of_numbers_says_where_it_goes():
    host = zoo.create("mha", 16, 4)
    with pytest.raises(zoo.ZooError, match=r"mask has dtype.*argument 'bias'.*-10000 hide a pair"):
        host(torch.zeros(1, 3, 16), mask=torch.zeros(3, 3))


def test_explain_sees_the_mask_too():
    host = zoo.create("mha", 16, 4)
    x = torch.zeros(1, 3, 16)
    padding = torch.tensor([0.0, 0.0, -torch.inf])[None, None, None]
    assert host.explain(x, bias=padding).route == "sdpa"
    assert host.explain(x, bias=padding).route == host.explain(x, mask=padding == 0).route
