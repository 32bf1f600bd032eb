"""Contracts on decoding: step by step with a cache equals all at once, in the memory promised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import zoo
from zoo.host.attention import Attention
from zoo.parts import Part
from zoo.testing.subject import Build, counts
from zoo.testing.tolerances import assert_close

LENGTH = 11


def _decode(
    module: nn.Module, x: Tensor, pieces: Sequence[int], mask: Tensor | None = None
) -> tuple[Tensor, zoo.LayerCache]:
    cache = zoo.LayerCache()
    rows: list[Tensor] = []
    for size in pieces:
        first, last = cache.length, cache.length + size
        hidden = {} if mask is None else {"mask": mask[..., :last]}
        rows.append(module(x[:, first:last], cache=cache, **hidden))
        assert cache.length == last, f"cache.length is {cache.length} after {last} tokens"
    return torch.cat(rows, 1), cache


def check_decode(build: Build) -> None:
    """One token at a time, and a prefill with chunks, give the parallel outputs."""
    module = build(causal=True, dtype=torch.float64).eval()
    x = build.input(2, LENGTH)
    with torch.no_grad():
        y = module(x)
        for pieces in ([1] * LENGTH, [4, 0, 3, 1, 3], [LENGTH]):
            assert_close(_decode(module, x, pieces)[0], y, f"decoded in pieces of {pieces}")
    # With gradients the cache takes another path: it must not write in place.
    x.requires_grad_()
    found = _decode(module, x, [3, 1, 7])[0]
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    assert_close(gradient, expected, "gradient through a cached pass", gradient=True)


def check_decode_mask(build: Build) -> None:
    """A batch padded in front decodes as it runs in parallel; the mask names all tokens so far.

    Parts that count tokens refuse such padding; there other tokens are hidden.
    """
    module = build(causal=True, dtype=torch.float64).eval()
    x = build.input(2, LENGTH)
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    first = 1 if counts(module) else 0
    mask[1, ..., first : first + 3] = False
    with torch.no_grad():
        y = module(x, mask=mask)
        found = _decode(module, x, [4, *[1] * 7], mask)[0]
    assert_close(found[0], y[0], "decoded sample without padding")
    assert_close(found[1, first + 3 :], y[1, first + 3 :], "decoded sample with hidden tokens")


def check_cache(build: Build) -> None:
    """The cache can be reordered and cropped, or says that it cannot, and is no larger than due."""
    module = build(causal=True, dtype=torch.float64).eval()
    x = build.input(2, LENGTH)
    order = torch.tensor([1, 0, 1])
    with torch.no_grad():
        swapped = module(x[order])
        _, cache = _decode(module, x[:, :6], [4, 1, 1])
        cache.select(order)
        rest = [module(x[order, i : i + 1], cache=cache) for i in range(6, LENGTH)]
        assert_close(torch.cat(rest, 1), swapped[:, 6:], "decoded after the batch was reordered")
        _, cache = _decode(module, x[:, :6], [5, 1])
        try:
            cache.crop(4)
        except zoo.ZooError as error:
            assert "cropped" in str(error)  # noqa: PT017 (either outcome is right)
        else:
            assert_close(module(x[:, 4:], cache=cache), module(x)[:, 4:], "decoded after a crop")
        check_cache_size(build, module)


def check_cache_size(build: Build, module: nn.Module) -> None:
    """Bytes held are those of the keys and values still needed, or of a state of fixed size."""
    x = build.input(2, LENGTH)
    cache = zoo.LayerCache()
    held: list[int] = []
    kept: list[int | None] = []
    for i in range(LENGTH):
        module(x[:, i : i + 1], cache=cache)
        assert cache.length == i + 1, f"cache.length is {cache.length} after {i + 1} tokens"
        keys = cache.get("k")
        held.append(cache.nbytes)
        kept.append(None if keys is None else keys.shape[2])
    if not isinstance(module, Attention) or module.attend is not None:
        if build.entry.taxonomy.complexity == "linear":
            assert len(set(held[1:])) == 1, f"bytes of a recurrent state grow: {held}"
        return
    window = module.select.window()
    for entry in build.entries:
        if entry.kind == "select" and entry.taxonomy.complexity == "linear":
            assert window is not None, f"{entry.name!r} is linear, but its cache holds everything"
    for seen, number in enumerate(kept, 1):
        due = min(seen, window or seen)
        assert number == due, f"{number} keys held after {seen}, due {due}"
    if window is not None and window < LENGTH:
        assert held[window - 1] == held[-1], f"bytes of a rolling window grow: {held}"
    layout = module.layout
    numbers = layout.k_heads * layout.qk_dim + layout.v_heads * layout.v_dim
    due = min(LENGTH, window or LENGTH) * (2 * numbers * x.element_size() + 8)
    extra = held[-1] - due
    assert extra >= 0
    if all(type(part).prepare is Part.prepare for part in module.socket_parts()):
        assert extra == 0, f"{extra} bytes held beside keys, values and positions"
