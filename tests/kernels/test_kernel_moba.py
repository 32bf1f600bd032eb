"""MoBA's kernel against a dense float64 oracle: in Triton's interpreter, or on a card."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.testing.tolerances import assert_close, rms

pytest.importorskip("triton", reason="the kernels need triton")

from zoo.kernels import _moba_launch as launch
from zoo.kernels import moba
from zoo.kernels.moba import moba_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A card's tiles are longer than the interpreter's 32 rows, so it gets longer sequences.
LONG = 5 if DEVICE == "cuda" else 1


def bounds(tokens: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    ends = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    return list(pairwise(ends))


def choose(
    batch: int, heads: int, tokens: int, picks: int, block: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Random different past blocks, as many as there are, -1 scattered between them."""
    chosen = torch.full((batch, heads, tokens, picks), -1, dtype=torch.int32)
    for start, stop in bounds(tokens, cu_seqlens):
        for row in range(start, stop):
            own = (row - start) // block
            count = min(picks, own)
            for b in range(batch):
                for h in range(heads):
                    at = torch.randperm(picks)[:count]
                    chosen[b, h, row, at] = torch.randperm(own)[:count].int()
    return chosen


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    block: int,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """One softmax over the union of what each row may see, row by row."""
    heads, tokens = q.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    seen = torch.zeros(*q.shape[:3], tokens, dtype=torch.bool)
    for start, stop in bounds(tokens, cu_seqlens):
        for row in range(start, stop):
            own = (row - start) // block
            seen[:, :, row, start + own * block : row + 1] = True
            for past in range(own):
                hit = (chosen[:, :, row] == past).any(-1, keepdim=True)
                seen[:, :, row, start + past * block : start + (past + 1) * block] |= hit
    scores = (q @ k.mT * scale).masked_fill(~seen.to(q.device), -torch.inf)
    return scores.softmax(-1) @ v


def make(
    batch: int, heads: int, groups: int, tokens: int, width: int, value: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v that want gradients, and a gradient of the output."""
    shapes = ((heads, width), (groups, width), (groups, value), (heads, value))
    q, k, v, grad = (torch.randn(batch, h, tokens, d).to(DEVICE, dtype) for h, d in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def compare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    chosen: Tensor,
    block: int,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Hold output and gradients to the oracle, and to what half precision does by itself."""
    on_device = chosen.to(DEVICE)
    ends = None if cu_seqlens is None else cu_seqlens.to(DEVICE)
    inputs = (q, k, v)
    out = moba_attention(q, k, v, on_device, block, scale, ends)
    found = (out.detach(), *torch.autograd.grad(out, inputs, grad))
    assert out.dtype == q.dtype
    assert [x.dtype for x in found[1:]] == [x.dtype for x in inputs]

    def reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = dense(*wide, chosen, block, scale, cu_seqlens)
        return out.detach(), *torch.autograd.grad(out, wide, grad.to(dtype))

    wanted = reference(torch.float64)
    plain = reference(q.dtype)
    for name, x, y, p in zip(("out", "dq", "dk", "dv"), found, wanted, plain, strict=True):
        assert_close(x, y, name, gradient=name != "out", backend="triton", dtype=q.dtype)
        ours, theirs = rms(x.double() - y), rms(p.double() - y)
        assert ours <= 2 * theirs + 1e-5 * rms(y), f"{name}: {ours:.3g} against {theirs:.3g}"


@pytest.mark.parametrize(
    ("block", "picks"),
    [
        pytest.param(24, 2, id="smaller than a tile"),
        pytest.param(32, 2, id="one tile"),
        pytest.param(40, 1, id="a tile and a piece"),
        pytest.param(64, 1, id="two tiles"),
        pytest.param(104 * LONG, 2, id="all in one block"),
        pytest.param(4000, 2, id="longer than the sequence"),
        pytest.param(40, 0, id="own block only"),
    ],
)
def test_equals_the_dense_form(block: int, picks: int) -> None:
    tokens = 105 * LONG
    q, k, v, grad = make(1, 1, 1, tokens, 16, 16, torch.float32)
    compare(q, k, v, grad, choose(1, 1, tokens, picks, block), block, 0.3)


@pytest.mark.parametrize("block", [1, 3])
def test_tiny_blocks(block: int) -> None:
    tokens = 9 * block + 1
    q, k, v, grad = make(1, 1, 1, tokens, 16, 16, torch.float32)
    compare(q, k, v, grad, choose(1, 1, tokens, 3, block), block, 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_dense_form_in_it(dtype: torch.dtype) -> None:
    q, k, v, grad = make(1, 2, 1, 70, 32, 32, dtype)
    compare(q, k, v, grad, choose(1, 2, 70, 2, 20), 20, 32**-0.5)


def test_grouped_heads_samples_and_uneven_widths() -> None:
    q, k, v, grad = make(2, 4, 2, 20, 24, 40, torch.float32)
    compare(q, k, v, grad, choose(2, 4, 20, 2, 8), 8, 0.2)


@pytest.mark.parametrize("width", [48, 128])
def test_widths_of_heads(width: int) -> None:
    q, k, v, grad = make(1, 1, 1, 50, width, width, torch.float32)
    compare(q, k, v, grad, choose(1, 1, 50, 1, 20), 20, width**-0.5)


def test_widest_heads() -> None:
    q, k, v, grad = make(1, 1, 1, 40, 256, 256, torch.float16)
    compare(q, k, v, grad, choose(1, 1, 40, 1, 16), 16, 1 / 16)


def test_large_scores_do_not_overflow() -> None:
    q, k, v, grad = make(1, 2, 2, 60, 16, 16, torch.float32)
    compare(q, k, v, grad, choose(1, 2, 60, 2, 16), 16, 30 * 0.25)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences(dtype: torch.dtype) -> None:
    cu = torch.tensor([0, 0, 37, 38, 38, 70, 70], dtype=dtype)
    q, k, v, grad = make(1, 2, 1, 70, 16, 16, torch.float32)
    compare(q, k, v, grad, choose(1, 2, 70, 2, 16, cu), 16, 0.3, cu)


def test_packed_sequences_equal_single_ones() -> None:
    cu = torch.tensor([0, 21, 60])
    q, k, v, _ = make(1, 1, 1, 60, 16, 16, torch.float32)
    chosen = choose(1, 1, 60, 1, 8, cu).to(DEVICE)
    packed = moba_attention(q, k, v, chosen, 8, 0.3, cu.to(DEVICE))
    for start, stop in ((0, 21), (21, 60)):
        part = [x[:, :, start:stop] for x in (q, k, v, chosen)]
        assert_close(packed[:, :, start:stop], moba_attention(*part, 8, 0.3), backend="triton")


def test_many_packed_tokens_of_one() -> None:
    q, k, v, _ = make(1, 1, 1, 9, 16, 16, torch.float32)
    chosen = torch.zeros(1, 1, 9, 2, dtype=torch.int32, device=DEVICE)
    cu = torch.arange(10, device=DEVICE)
    assert_close(moba_attention(q, k, v, chosen, 4, 0.3, cu), v, backend="triton")


def test_a_block_that_everyone_chose_and_one_that_nobody_did() -> None:
    chosen = torch.full((1, 1, 105, 1), -1, dtype=torch.int32)
    chosen[:, :, 16:] = 0
    q, k, v, grad = make(1, 1, 1, 105, 16, 16, torch.float32)
    compare(q, k, v, grad, chosen, 16, 0.3)


def test_numbers_of_no_past_block_are_no_choice() -> None:
    """The raw top-k of early rows names blocks of the future: they must not leak."""
    q, k, v, _ = make(1, 2, 2, 50, 16, 16, torch.float32)
    chosen = choose(1, 2, 50, 3, 16)
    wild = chosen.clone()
    wild[..., 0] = torch.where(chosen[..., 0] < 0, 7, chosen[..., 0])
    wild[..., 1] = torch.where(chosen[..., 1] < 0, -9, chosen[..., 1])
    own = (torch.arange(50) // 16).int().expand(1, 2, 50)
    wild[..., 2] = torch.where(chosen[..., 2] < 0, own, chosen[..., 2])
    assert not torch.equal(wild, chosen)
    expected = moba_attention(q, k, v, chosen.to(DEVICE), 16, 0.3)
    assert torch.equal(moba_attention(q, k, v, wild.to(DEVICE), 16, 0.3), expected)


def test_the_future_has_no_say() -> None:
    q, k, v, _ = make(1, 1, 1, 70, 16, 16, torch.float32)
    chosen = choose(1, 1, 70, 2, 16).to(DEVICE)
    before = moba_attention(q, k, v, chosen, 16, 0.3)
    k2, v2 = (torch.cat([x[:, :, :40], x[:, :, 40:] + 9], 2) for x in (k, v))
    after = moba_attention(q, k2, v2, chosen, 16, 0.3)
    assert torch.equal(after[:, :, :40], before[:, :, :40])
    assert not torch.allclose(after[:, :, 40:], before[:, :, 40:])


def test_inputs_in_any_layout() -> None:
    q, k, v, grad = make(1, 2, 2, 20, 16, 16, torch.float32)
    chosen = choose(1, 2, 20, 2, 8).to(DEVICE)

    def shuffled(x: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT]

    def run(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out = moba_attention(q, k, v, chosen, 8, 0.3)
        return (out, *torch.autograd.grad(out, (q, k, v), grad))

    expected = run(q, k, v, chosen, grad)
    for i in range(2):
        found = run(*(shuffled(x)[i] for x in (q, k, v, chosen, grad)))
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
    out = moba_attention(q, k, v, chosen, 8, 0.3)
    spread = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]  # a gradient of strides 0
    assert torch.equal(spread, torch.autograd.grad(out, q, torch.ones_like(out))[0])


def test_the_same_bits_every_time() -> None:
    q, k, v, grad = make(1, 2, 1, 50, 16, 16, torch.float32)
    chosen = choose(1, 2, 50, 2, 16).to(DEVICE)
    runs = []
    for _ in range(2):
        out = moba_attention(q, k, v, chosen, 16, 0.3)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_some_inputs_want_gradients(wanted: int) -> None:
    q, k, v, grad = make(1, 1, 1, 40, 16, 16, torch.float32)
    chosen = choose(1, 1, 40, 1, 16).to(DEVICE)
    inputs = [q, k, v]
    full = torch.autograd.grad(moba_attention(q, k, v, chosen, 16, 0.3), inputs, grad)
    some = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    moba_attention(*some, chosen, 16, 0.3).backward(grad)
    for i, x in enumerate(some):
        assert (x.grad is not None) == (i == wanted)
    assert torch.equal(some[wanted].grad, full[wanted])


@pytest.mark.parametrize(
    ("batch", "heads", "tokens"), [(0, 2, 20), (1, 2, 0)], ids=["no samples", "no tokens"]
)
def test_nothing_in_nothing_out(batch: int, heads: int, tokens: int) -> None:
    q, k, v, grad = make(batch, heads, heads, tokens, 16, 16, torch.float32)
    chosen = torch.zeros(batch, heads, tokens, 2, dtype=torch.int32, device=DEVICE)
    out = moba_attention(q, k, v, chosen, 8, 0.3)
    assert out.shape == q.shape
    for x, y in zip(torch.autograd.grad(out, (q, k, v), grad), (q, k, v), strict=True):
        assert x.shape == y.shape


def test_nothing_packed() -> None:
    q, k, v, _ = make(1, 2, 2, 0, 16, 16, torch.float32)
    chosen = torch.zeros(1, 2, 0, 2, dtype=torch.int32, device=DEVICE)
    cu = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert moba_attention(q, k, v, chosen, 8, 0.3, cu).shape == q.shape


def test_no_second_derivative() -> None:
    q, k, v, _ = make(1, 1, 1, 20, 16, 16, torch.float32)
    chosen = choose(1, 1, 20, 1, 8).to(DEVICE)
    out = moba_attention(q, k, v, chosen, 8, 0.3)
    first = torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]
    with pytest.raises(ZooError, match="no second derivative"):
        first.square().sum().backward()


def test_autocast_works_in_its_type() -> None:
    q, k, v, _ = make(1, 1, 1, 40, 16, 16, torch.float32)
    chosen = choose(1, 1, 40, 1, 16).to(DEVICE)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    expected = moba_attention(*half, chosen, 16, 0.3)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = moba_attention(q, k, v, chosen, 16, 0.3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own clones
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_operators_keep_their_promises(packed: bool) -> None:
    q, k, v, grad = make(1, 2, 1, 20, 16, 16, torch.float32)
    cu = torch.tensor([0, 7, 20], device=DEVICE) if packed else None
    chosen = choose(1, 2, 20, 1, 8, None if cu is None else cu.cpu()).to(DEVICE)
    opcheck(moba.moba_fwd, (q, k, v, chosen, cu, 8, 0.3))
    with torch.no_grad():
        out, lse, slots, ends = moba.moba_fwd(q, k, v, chosen, cu, 8, 0.3)
    plain = [x.detach() for x in (q, k, v)]
    opcheck(moba.moba_bwd, (grad, *plain, chosen, cu, out, lse, slots, ends, 8, 0.3))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole(dynamic: bool) -> None:
    """Static with the default compiler, dynamic with the part of it that traces shapes."""

    def run(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        return moba_attention(q, k, v, chosen, 8, 0.3)

    torch._dynamo.reset()
    backend = "aot_eager" if dynamic else "inductor"
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (20, 24) if dynamic else (20,):
        q, k, v, grad = make(1, 2, 1, tokens, 16, 16, torch.float32)
        chosen = choose(1, 2, tokens, 1, 8).to(DEVICE)
        results = []
        for function in (run, compiled):
            out = function(q, k, v, chosen)
            results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
        for x, y in zip(*results, strict=True):
            assert_close(x, y, backend="triton")
    torch._dynamo.reset()


def test_counts_operations() -> None:
    q, k, v, grad = make(1, 2, 1, 50, 16, 32, torch.float32)
    chosen = torch.full((1, 2, 50, 2), -1, dtype=torch.int32, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        out = moba_attention(q, k, v, chosen, 16, 0.3)
        forward = counter.get_total_flops()
        out.backward(grad)
    pairs = 2 * 50 * 3 * 16
    assert forward == 2 * pairs * (16 + 32)
    assert counter.get_total_flops() - forward == 2 * pairs * (3 * 16 + 2 * 32)


def test_lists_name_every_choice_once() -> None:
    chosen = choose(2, 3, 50, 2, 8)
    tables = launch.tables(50, 8, None, torch.device("cpu"))
    slots, ends = launch.lists(chosen, tables)
    for head in range(6):
        flat = chosen.flatten(0, 1)[head].flatten()
        for block in range(7):
            listed = slots[ends[head, block] : ends[head, block + 1]].tolist()
            assert listed == (flat == block).nonzero().flatten().tolist()


def test_tiles_stay_inside_their_bound() -> None:
    for choices in ([31, 1, 0, 64], [0, 0, 0, 96], [33, 32, 31, 0]):
        ends = torch.tensor([0, *choices]).cumsum(0)[None]
        tiles, block, until = launch.gather_tiles(ends, 96, 32)
        needed = [-(-c // 32) for c in choices]
        assert int(until[0, -1]) == sum(needed) <= tiles
        wanted = [j for j, n in enumerate(needed) for _ in range(n)]
        assert block[0].tolist() == wanted + [4] * (tiles - len(wanted))


def _inputs() -> dict[str, object]:
    x = torch.zeros(2, 4, 20, 16, device=DEVICE)
    chosen = torch.zeros(2, 4, 20, 1, dtype=torch.int32, device=DEVICE)
    return {"q": x, "k": x, "v": x, "chosen": chosen, "block": 8, "scale": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"block": 0}, "block is 0"),
        (lambda a: {"q": a["q"][0]}, "3, 4 and 4 axes"),
        (lambda a: {"k": a["k"][:, :, :9]}, "k of shape"),
        (lambda a: {"k": a["k"][:, :3], "v": a["v"][:, :3]}, "k has 3 heads"),
        (lambda a: {"v": a["v"][:, :2]}, "v of shape"),
        (lambda a: {"chosen": a["chosen"].float()}, "chosen is torch.float32"),
        (lambda a: {"chosen": a["chosen"][:1]}, "chosen is torch.int32 of shape"),
        (lambda a: {"chosen": a["chosen"].to("meta")}, "chosen is on meta"),
        (lambda a: {"q": a["q"].double()}, "backend 'triton': dtype torch.float64"),
        (lambda a: {"k": a["k"].half()}, "backend 'triton': tensors are of"),
        (lambda a: {"cu_seqlens": torch.tensor([0, 20], device=DEVICE)}, "a batch of 2"),
        (
            lambda a: {"cu_seqlens": torch.tensor([0.0, 20.0], device=DEVICE)},
            "cu_seqlens is torch.float32",
        ),
        (
            lambda a: {"cu_seqlens": torch.tensor([0], device=DEVICE)},
            r"cu_seqlens is torch.int64 of shape \(1,\)",
        ),
    ],
)
def test_bad_input_is_named(
    change: Callable[[dict[str, object]], dict[str, object]], message: str
) -> None:
    inputs = _inputs()
    with pytest.raises(ZooError, match=message):
        moba_attention(**{**inputs, **change(inputs)})
