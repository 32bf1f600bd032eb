"""Growing entries, rolling windows, recurrent state, cropping and reordering."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from zoo import Cache, LayerCache, ZooError


def _pieces(sizes: list[int], batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, 3, n, 4) for n in sizes]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 20, [5, 1, 1, 9, 4], [3, 0, 2], [17]])
def test_growing_equals_concatenation(sizes: list[int], grad: bool) -> None:
    cache, pieces = LayerCache(), _pieces(sizes)
    with torch.set_grad_enabled(grad):
        for i, piece in enumerate(pieces):
            held = cache.extend("k", piece)
            assert torch.equal(held, torch.cat(pieces[: i + 1], -2))
            assert held.shape[-2] == sum(sizes[: i + 1])
    assert torch.equal(cache.get("k"), torch.cat(pieces, -2))


def test_spare_room_doubles() -> None:
    cache = LayerCache()
    places = set()
    with torch.no_grad():
        for piece in _pieces([1] * 256):
            places.add(cache.extend("k", piece).data_ptr())
    assert len(places) <= 10, "the buffer must not move at every step"
    assert cache.nbytes == 2 * 3 * 256 * 4 * 4, "spare room is not counted"


def test_what_was_returned_with_gradients_is_not_written_over() -> None:
    cache, pieces = LayerCache(), _pieces([4, 1, 1])
    pieces[0].requires_grad_()
    first = cache.extend("k", pieces[0])
    loss = first.square().sum()
    cache.extend("k", pieces[1])
    with torch.no_grad():
        cache.extend("k", pieces[2])
    loss.backward()  # fails if the saved tensor was changed in place
    assert torch.equal(pieces[0].grad, 2 * pieces[0].detach())
    assert torch.equal(cache.get("k"), torch.cat(pieces, -2))


def test_growing_does_not_write_into_the_callers_tensor() -> None:
    cache, base = LayerCache(), torch.zeros(2, 3, 8, 4)
    with torch.no_grad():
        cache.extend("k", base[:, :, :2])
        cache.extend("k", torch.ones(2, 3, 3, 4))
    assert not base.any()


def test_growing_after_a_crop_does_not_write_into_the_callers_tensor() -> None:
    cache, base = LayerCache(), torch.zeros(2, 3, 8, 4)
    with torch.no_grad():
        cache.extend("k", base)
        cache.length = 8
        cache.crop(4)
        held = cache.extend("k", torch.ones(2, 3, 1, 4))
    assert held.sum() == 2 * 3 * 4
    assert not base.any()


@pytest.mark.parametrize("keep", [1, 3, 100])
@pytest.mark.parametrize("sizes", [[1] * 9, [5, 1, 2], [2, 7, 1]])
def test_rolling_returns_old_and_new_then_keeps_the_latest(keep: int, sizes: list[int]) -> None:
    cache, pieces = LayerCache(), _pieces(sizes)
    kept = pieces[0][:, :, :0]
    for piece in pieces:
        full = torch.cat([kept, piece], -2)
        assert torch.equal(cache.extend("k", piece, keep=keep), full)
        kept = full[:, :, -keep:]
        assert torch.equal(cache.get("k"), kept)
    assert cache.nbytes == kept.numel() * 4


def test_other_token_axes() -> None:
    cache = LayerCache()
    with torch.no_grad():
        for start in (0, 3):
            held = cache.extend("p", torch.arange(start, start + 3), dim=-1, batched=False)
    assert held.tolist() == [0, 1, 2, 3, 4, 5]


def test_crop() -> None:
    cache, pieces = LayerCache(), _pieces([4, 1, 3])
    with torch.no_grad():
        for piece in pieces:
            cache.extend("k", piece)
            cache.length += piece.shape[-2]
        cache.crop(8)
        cache.crop(3)
        assert cache.length == 3
        assert torch.equal(cache.get("k"), pieces[0][:, :, :3])
        held = cache.extend("k", pieces[1])
        assert torch.equal(held, torch.cat([pieces[0][:, :, :3], pieces[1]], -2))


@pytest.mark.parametrize("length", [-1, 5])
def test_crop_outside(length: int) -> None:
    cache = LayerCache()
    cache.extend("k", torch.zeros(1, 1, 4, 2))
    cache.length = 4
    with pytest.raises(ZooError, match=f"crop length={length} must be a whole number from 0 to 4"):
        cache.crop(length)


def test_crop_refuses_what_cannot_go_back() -> None:
    cache = LayerCache()
    cache.extend("k", torch.zeros(1, 1, 4, 2), keep=2)
    cache.length = 4
    with pytest.raises(ZooError, match="'k' holds a window"):
        cache.crop(1)
    cache = LayerCache()
    cache.set_state("s", torch.zeros(1, 2))
    cache.length = 4
    with pytest.raises(ZooError, match="state 's' cannot be cropped"):
        cache.crop(3)
    cache.crop(4)
    assert cache.length == 4


def test_a_refused_crop_changes_nothing() -> None:
    cache = LayerCache()
    cache.extend("a", torch.zeros(1, 1, 4, 2))
    cache.extend("b", torch.zeros(1, 1, 4, 2), keep=2)
    cache.length = 4
    with pytest.raises(ZooError):
        cache.crop(3)
    assert (cache.length, cache.get("a").shape[-2], cache.get("b").shape[-2]) == (4, 4, 2)


def test_select_reorders_and_repeats_the_batch() -> None:
    cache, (piece,) = LayerCache(), _pieces([4])
    cache.extend("k", piece)
    cache.extend("p", torch.arange(4), dim=-1, batched=False)
    cache.set_state("s", torch.tensor([[1.0], [2.0]]))
    index = torch.tensor([1, 1, 0])
    cache.select(index)
    assert torch.equal(cache.get("k"), piece[index])
    assert cache.get("p").tolist() == [0, 1, 2, 3]
    assert cache.get_state("s").flatten().tolist() == [2.0, 2.0, 1.0]
    with torch.no_grad():
        assert cache.extend("k", torch.zeros(3, 3, 1, 4)).shape == (3, 3, 5, 4)


def test_absent_names() -> None:
    cache = LayerCache()
    assert cache.get("k") is None
    assert cache.get_state("k") is None
    assert (cache.nbytes, cache.length) == (0, 0)


def test_cache_of_a_model() -> None:
    cache = Cache()
    assert (len(cache), cache.length, cache.nbytes) == (0, 0, 0)
    for layer in (0, 1):
        cache[layer].extend("k", torch.randn(2, 1, 5, 2))
        cache[layer].length += 5
    cache[1].set_state("s", torch.zeros(2, 3))
    assert cache[0] is cache[0]
    assert (len(cache), cache.length) == (2, 5)
    assert cache.nbytes == 2 * (2 * 5 * 2 * 4) + 2 * 3 * 4
    cache.select(torch.tensor([0]))
    assert [c.get("k").shape[0] for c in (cache[0], cache[1])] == [1, 1]
    with pytest.raises(ZooError, match="recurrent state 's'"):
        cache.crop(2)


def test_a_refused_crop_leaves_all_layers_in_step() -> None:
    cache = Cache()
    for layer in (0, 1):
        cache[layer].extend("k", torch.randn(2, 1, 5, 2), keep=None if layer == 0 else 3)
        cache[layer].length += 5
    with pytest.raises(ZooError, match="holds a window"):
        cache.crop(2)
    assert {cache[layer].length for layer in (0, 1)} == {5}


def test_bytes_of_half_precision_and_of_every_entry() -> None:
    cache = LayerCache()
    for name, dtype in itertools.product("kv", [torch.bfloat16]):
        cache.extend(name, torch.zeros(2, 3, 7, 4, dtype=dtype))
    assert cache.nbytes == 2 * (2 * 3 * 7 * 4) * 2


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 1, 4), (2, 1, 1, 4), (2, 3, 1, 1)])
def test_new_tokens_of_another_shape_are_refused(shape: tuple[int, ...], grad: bool) -> None:
    cache = LayerCache()
    with torch.set_grad_enabled(grad):
        cache.extend("k", torch.zeros(2, 3, 4, 4))
        with pytest.raises(ZooError, match="k"):
            cache.extend("k", torch.zeros(shape))


@pytest.mark.parametrize("grad", [False, True])
def test_a_copy_goes_on_by_itself(grad: bool) -> None:
    cache, pieces = LayerCache(), _pieces([4, 1, 2, 3])
    with torch.set_grad_enabled(grad):
        for piece in pieces[:2]:
            cache.extend("k", piece)
            cache.length += piece.shape[-2]
        cache.set_state("s", torch.ones(2, 1))
        other = cache.copy()
        ours = cache.extend("k", pieces[2])
        theirs = other.extend("k", pieces[3])
        other.set_state("s", torch.zeros(2, 1))
    assert torch.equal(ours, torch.cat(pieces[:3], -2))
    assert torch.equal(theirs, torch.cat([*pieces[:2], pieces[3]], -2))
    assert other.length == cache.length == 5
    assert torch.equal(cache.get_state("s"), torch.ones(2, 1))
    whole = Cache()
    whole[1].extend("k", pieces[0])
    copied = whole.copy()
    copied[1].extend("k", pieces[1])
    assert torch.equal(whole[1].get("k"), pieces[0])


@pytest.mark.parametrize("grad", [False, True])
def test_new_tokens_of_another_type_are_refused_until_the_cache_is_converted(grad: bool) -> None:
    cache, (first, second) = Cache(), _pieces([4, 1])
    with torch.set_grad_enabled(grad):
        cache[0].extend("k", first.bfloat16())
        cache[0].extend("n", torch.arange(4), dim=-1, batched=False)
        cache[0].set_state("wide", torch.ones(2, 1))
        cache[0].set_state("narrow", torch.ones(2, 1, dtype=torch.bfloat16))
        with pytest.raises(ZooError, match=r"'k' holds torch.bfloat16, but .* torch.float32.*to"):
            cache[0].extend("k", second)
        held = cache.to(torch.float32)[0].extend("k", second)
    assert torch.equal(held, torch.cat([first.bfloat16().float(), second], -2))
    assert cache[0].get("n").dtype == torch.int64
    assert cache[0].get_state("narrow").dtype == torch.float32
    cache.to(torch.bfloat16)
    assert cache[0].get_state("wide").dtype == torch.float32
    assert cache[0].get("k").dtype == torch.bfloat16


def test_a_host_says_what_a_cache_holds_and_explains_without_touching_it() -> None:
    import zoo

    host = zoo.create("mha", 16, 4, causal=True)
    x = torch.randn(2, 5, 16, requires_grad=True)
    cache = LayerCache()
    host(x, cache=cache)
    before = cache.get("k").clone()
    assert host.explain(x, cache=cache).route == "sdpa_strips"
    assert torch.equal(cache.get("k"), before)
    assert cache.length == 5
    bf16 = LayerCache()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            host(x, cache=bf16)
        with pytest.raises(ZooError, match=r"cache entry 'k' holds torch.bfloat16"):
            host(x[:, :1], cache=bf16)
        assert bf16.length == 5
        y = host(x[:, :1], cache=bf16.to(torch.float32))
    assert y.dtype == torch.float32
    cross = zoo.create("mha", 16, 4)
    cache = LayerCache()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            cross(x, x, cache=cache)
        with pytest.raises(ZooError, match=r"'cross_k' holds torch.bfloat16"):
            cross(x, x, cache=cache)
