"""Retrieval of landmark attention: what is kept, what is found, and where it is put."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.normalize._landmark_memory import MARKS, Memory
from zoo.testing.subject import draw, tiny_strips
from zoo.testing.tolerances import assert_close

LENGTH = 23


def build(options="", position="", **facts):
    torch.manual_seed(0)
    spec = f"landmark(block=3{options})" + (f"+{position}" if position else "")
    facts = {"dim": 32, "heads": 4, "causal": True, "dtype": torch.float64, **facts}
    return zoo.create(spec, **facts).eval()


def pair(options, position="", **facts):
    """A retrieving host and the plain one with the same parameters."""
    found, plain = build(options, position, **facts), build("", position, **facts)
    plain.load_state_dict(found.state_dict())
    return found, plain


def feed(attn, x, sizes):
    """Outputs in pieces of these sizes, and the cache."""
    cache = zoo.LayerCache()
    assert sum(sizes) == x.shape[1]
    with torch.no_grad():
        return torch.cat([attn(p, cache=cache) for p in x.split(sizes, 1)], 1), cache


PIECES = ([1] * LENGTH, [LENGTH], [4] * 5 + [3], [3, 5, 1, 7, 7], [8, 8, 7])


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("selection", ["token_head", "max_heads", "max_tokens"])
def test_all_blocks_retrieved_without_rotation_is_the_parallel_form(selection, kv_heads):
    options = f", retrieve=9, selection={selection}"
    attn, plain = pair(options, kv_heads=kv_heads)
    x = draw(2, LENGTH, 32)
    for sizes in PIECES:
        assert_close(feed(attn, x, sizes)[0], plain(x), f"{sizes}")


def test_fewer_blocks_than_retrieved_stand_where_they_were():
    attn, plain = pair(", retrieve=9", "rope")
    x = draw(2, LENGTH, 32)
    assert_close(feed(attn, x, [5, 1, 10, 7])[0], plain(x), "rotated")


@pytest.mark.parametrize("selection", ["token_head", "max_heads"])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("position", ["", "rope", "fope"])
def test_pieces_inside_blocks_do_not_matter(position, k, selection):
    """Each token sees its block so far and what it finds, however it was fed."""
    attn = build(f", retrieve={k}, selection={selection}", position, max_len=64)
    x = draw(2, LENGTH, 32)
    expected = feed(attn, x, [4] * 5 + [3])[0]
    for sizes in ([1] * LENGTH, [2, 2] * 5 + [3], [3, 1] * 5 + [1, 2], [3, *[4] * 5]):
        assert_close(feed(attn, x, sizes)[0], expected, f"{sizes}")


def test_nothing_retrieved_leaves_the_current_block():
    attn, plain = pair(", retrieve=0", "rope")
    x = draw(2, LENGTH, 32)
    y, _ = feed(attn, x, [4] * 5 + [3])
    alone = torch.cat([plain(p) for p in x.split(4, 1)], 1)
    assert_close(y, alone, "blocks on their own")


@pytest.mark.parametrize("selection", ["token_head", "max_heads", "max_tokens"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_against_a_search_written_out(k, kv_heads, selection):
    """Rows of the last chunk, one head and token after the other."""
    attn = build(f", retrieve={k}, selection={selection}", "rope", kv_heads=kv_heads)
    x, first = draw(2, LENGTH, 32), 20
    with attn.capture() as passes:
        feed(attn, x, [4] * 5 + [3])
    found = passes[-1].heads
    q, keys, v = attn.project(x, None, None)
    repeats = 4 // kv_heads
    turn = attn.position.rotate
    blocks, scale = first // 4, attn.scale
    at = torch.arange(3) + 4 * (k + 1)
    slots = [max(0, b - (blocks - k) + 1) for b in range(blocks)]
    for b in range(2):
        rotated, shares = [], []
        for h in range(4):
            g = h // repeats
            query = turn(q[b : b + 1, h : h + 1, first:], q[:1, :1, :0], at, at[:0])[0][0, 0]
            marks = keys[b, g, 3:first:4]
            place = torch.tensor([4 * s + 3 for s in slots])
            marks = turn(marks[None, None], marks[None, None], place, place)[0][0, 0]
            rotated.append(query)
            shares.append((query @ marks.T * scale).softmax(-1))
        share = torch.stack(shares)
        if selection == "max_heads":
            share = share.amax(0, keepdim=True).expand(4, -1, -1)
        if selection == "max_tokens":
            share = share.amax(1, keepdim=True).expand(-1, 3, -1)
        for h in range(4):
            g = h // repeats
            own = turn(keys[b, g, first:][None, None], q[:1, :1, :0], at, at[:0])[0][0, 0]
            for i in range(3):
                chosen = sorted(share[h, i].topk(k).indices.tolist())
                level, inner = [own[j] @ rotated[h][i] * scale for j in range(i + 1)], []
                for j, c in enumerate(chosen):
                    slot = j + (c >= blocks - k)
                    place = torch.arange(4) + 4 * slot
                    block = keys[b, g, 4 * c : 4 * c + 4][None, None]
                    s = turn(block, block, place, place)[0][0, 0] @ rotated[h][i] * scale
                    level.append(s[3])
                    inner.append(s[:3].softmax(-1))
                p = torch.stack(level).softmax(-1)
                y = p[: i + 1] @ v[b, g, first : first + i + 1]
                for j, c in enumerate(chosen):
                    y = y + p[i + 1 + j] * (inner[j] @ v[b, g, 4 * c : 4 * c + 3])
                assert_close(found[b, h, i], y, f"{b} {h} {i}")


def test_cache_of_few_blocks_forgets_the_oldest():
    x = draw(2, LENGTH, 32)
    attn = build(", retrieve=2, cache_blocks=2", "rope")
    y, cache = feed(attn, x, [4] * 5 + [3])
    assert cache.get("landmark_keys").shape == (2, 2, 4, 8)
    other = x.clone()
    other[:, :12] += 1  # forgotten by the last rows
    z, _ = feed(attn, other, [4] * 5 + [3])
    assert_close(z[:, 20:], y[:, 20:], "rows that see the latest two blocks only")
    assert float((z - y)[:, 16:20].abs().max()) > 1e-3
    assert cache.nbytes < feed(build(", retrieve=2", "rope"), x, [4] * 5 + [3])[1].nbytes


@pytest.mark.parametrize("selection", ["token_head", "max_tokens"])
def test_offloading_changes_where_blocks_lie_alone(selection):
    x, sizes = draw(2, LENGTH, 32), [4] * 5 + [3]
    options = f", retrieve=2, selection={selection}"
    y, cache = feed(build(options, "rope"), x, sizes)
    z, away = feed(build(options + ", offload=True", "rope"), x, sizes)
    assert torch.equal(z, y)
    assert away.nbytes == cache.nbytes == cache.device_nbytes
    # 5 landmarks' keys and 3 unfinished tokens of 2 samples, 4 heads of width 8, in float64.
    assert away.device_nbytes == 2 * 4 * 8 * 8 * (5 + 2 * 3)
    assert away.nbytes - away.device_nbytes == 2 * 4 * 8 * 8 * 2 * 15


def test_caches_can_be_reordered_but_not_cropped():
    attn, x, order = build(", retrieve=2", "rope"), draw(3, LENGTH, 32), torch.tensor([2, 0, 2, 1])
    expected = feed(attn, x[order], [8, 8, 7])[0]
    _, cache = feed(attn, x[:, :16], [8, 8])
    cache.select(order)
    with torch.no_grad():
        assert_close(attn(x[order, 16:], cache=cache), expected[:, 16:], "reordered")
    with pytest.raises(zoo.ZooError, match="cannot be cropped"):
        cache.crop(8)
    assert cache.length == LENGTH


def test_rows_a_few_at_a_time():
    attn, x = build(", retrieve=2", "rope"), draw(2, LENGTH, 32)
    whole = feed(attn, x, [8, 8, 7])[0]
    with tiny_strips():
        assert_close(feed(attn, x, [8, 8, 7])[0], whole, "a few rows")


def test_gradients_flow_outside_training():
    attn, plain = pair(", retrieve=9", "rope")
    x = draw(2, LENGTH, 32).requires_grad_()
    cache = zoo.LayerCache()
    y = torch.cat([attn(p, cache=cache) for p in x.split(6, 1)], 1)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert_close(found, expected, "x", gradient=True)


def test_small_shares_still_have_an_order():
    """The best share is all there is in numbers, yet the second best block is found."""
    attn = build(", retrieve=2")
    likings = torch.tensor([100.0, 300.0, -50.0, 700.0, 900.0], dtype=torch.float64)
    marks = torch.zeros(1, 5, 4, 8, dtype=torch.float64)
    marks[..., 0] = likings[:, None]
    q = torch.zeros(1, 4, 1, 8, dtype=torch.float64)
    q[..., 0] = 8**0.5
    for order in range(5):
        cache = zoo.LayerCache()
        cache.extend(MARKS, marks.roll(order, 1), dim=1)
        found = Memory(attn.normalize, attn, cache)._choose(q).index
        best = sorted(((3 + order) % 5, (4 + order) % 5))
        assert found.tolist() == [[[best]] * 4]


@pytest.mark.parametrize("position", ["", "rope"])
@pytest.mark.parametrize("selection", ["token_head", "max_tokens"])
def test_no_samples(selection, position):
    attn = build(f", retrieve=1, selection={selection}", position)
    y, cache = feed(attn, draw(0, LENGTH, 32), [8, 8, 7])
    assert y.shape == (0, LENGTH, 32)
    assert cache.length == LENGTH


def test_tensors_without_values():
    attn = build(", retrieve=1", "rope", device="meta")
    y, _ = feed(attn, torch.empty(2, LENGTH, 32, device="meta", dtype=torch.float64), [8, 8, 7])
    assert y.shape == (2, LENGTH, 32)


def test_without_a_cache_nothing_is_retrieved():
    attn, plain = pair(", retrieve=1", "rope")
    x = draw(2, LENGTH, 32)
    assert torch.equal(attn(x), plain(x))
    assert torch.equal(attn.train()(x), plain(x))
    assert attn.eval().explain(x, cache=zoo.LayerCache()).route == "landmark (recall)"
    empty, cache = feed(attn, x[:, :0], [0])
    assert empty.shape == (2, 0, 32)
    assert cache.nbytes == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"mask": torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)}, "no mask"),
        ({"bias": torch.zeros(LENGTH, LENGTH, dtype=torch.float64)}, "no bias"),
        ({"positions": torch.arange(LENGTH) + 1}, "no positions"),
        ({"need_weights": True}, "weights"),
    ],
)
def test_what_a_recalling_pass_does_not_take(inputs, message):
    with pytest.raises(zoo.ZooError, match=message):
        build(", retrieve=1")(draw(2, LENGTH, 32), cache=zoo.LayerCache(), **inputs)


def test_training_does_not_retrieve():
    with pytest.raises(zoo.ZooError, match=r"retrieve=1.*outside training"):
        build(", retrieve=1").train()(draw(2, LENGTH, 32), cache=zoo.LayerCache())


@pytest.mark.parametrize("other", ["alibi", "sliding_window(window=4)", "neural"])
def test_what_retrieval_does_not_go_with(other):
    with pytest.raises(zoo.CompatibilityError, match=r"retrieve=1"):
        zoo.create(f"landmark(retrieve=1)+{other}", 64, 2, causal=True)
