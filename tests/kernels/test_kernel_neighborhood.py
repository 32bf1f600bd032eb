"""Neighborhood attention as Triton kernels, against all pairs under a mask in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.testing.tolerances import assert_close

triton = pytest.importorskip("triton", reason="the kernels are written in Triton")

import triton.language as tl  # noqa: E402

from zoo.errors import ZooError  # noqa: E402
from zoo.kernels import _neighborhood_tiles as tiles  # noqa: E402
from zoo.kernels import neighborhood  # noqa: E402
from zoo.kernels.common import INTERPRET  # noqa: E402
from zoo.kernels.neighborhood import neighborhood_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("shift", "causal", "clip")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small boxes, so that small grids have many; no overflow checks, half of the time here."""
    monkeypatch.setattr(neighborhood, "ROWS", 16)
    monkeypatch.setattr(neighborhood, "KEYS", 16)
    monkeypatch.setattr(neighborhood, "EXACT", 16)
    if INTERPRET:
        from triton.runtime import interpreter

        options = interpreter.interpreter_builder.options
        options = dataclasses.replace(options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


def axis_mask(x: int, w: int, d: int = 1, s: int = 1, kind: str = "shift") -> Tensor:
    """(X, X) visibility on one axis, key by key, from the definition."""
    mask = torch.zeros(x, x, dtype=torch.bool)
    for i, j in itertools.product(range(x), range(x)):
        if i % d != j % d:
            continue
        length = len(range(i % d, x, d))
        i_, j_ = i // d, j // d
        if kind == "causal":
            leader = min(i_ // s * s + s - 1, length - 1)
            mask[i, j] = j_ <= i_ and leader - j_ < w
        elif kind == "clip":
            mask[i, j] = abs(i_ - j_) <= w // 2
        else:
            leader = min(i_ // s * s + s // 2, length - 1)
            start = min(max(leader - w // 2, 0), length - w)
            mask[i, j] = start <= j_ < start + w
    return mask


def full_mask(
    shape: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    clip: bool = False,
) -> Tensor:
    """(N, N), the product of the axes."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for x, w, d, s, c in zip(shape, kernel, dilation, stride, causal, strict=True):
        one = axis_mask(x, w, d, s, "causal" if c else "clip" if clip else "shift")
        mask = (mask[:, None, :, None] & one[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    return mask


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """All pairs, in the type of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * scale).masked_fill(~mask.to(q.device), -torch.inf)
    return scores.softmax(-1) @ v


def inputs(
    tokens: int, *, b: int = 1, h: int = 1, g: int = 1, d: int = 16, e: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """q, k, v with gradients, as leaves."""
    sizes = ((h, d), (g, d), (g, d if e is None else e))
    made = (torch.randn(b, n, tokens, width) for n, width in sizes)
    return [x.to(DEVICE, dtype).requires_grad_() for x in made]


def compare(
    leaves: list[Tensor],
    rule: tuple[Any, ...],
    *,
    scale: float = 0.25,
    clip: bool = False,
) -> None:
    """Output and every gradient, against the oracle."""
    out = neighborhood_attention(*leaves, *rule, scale, clip)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = oracle(*exact, full_mask(*rule, clip), scale)
    assert out.dtype == leaves[0].dtype
    assert_close(out, expected, "out", backend="triton", dtype=out.dtype)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for name, a, b in zip("qkv", found, wanted, strict=True):
        assert_close(a, b, f"grad {name}", gradient=True, backend="triton", dtype=out.dtype)


NO = (False, False, False)
GRIDS = {
    # name: shape, kernel, dilation, stride, causal, clip
    "band causal": ((70,), (33,), (1,), (1,), (True,), False),
    "band causal longer than the sequence": ((37,), (64,), (1,), (1,), (True,), True),
    "band clip": ((50,), (33,), (1,), (1,), (False,), True),
    "band clip even dilated": ((37,), (8,), (2,), (1,), (False,), True),
    "band shift even": ((45,), (22,), (1,), (1,), (False,), False),
    "band strided dilated": ((53,), (9,), (3,), (4,), (False,), False),
    "band causal strided dilated": ((41,), (9,), (2,), (4,), (True,), False),
    "wide rows": ((70,), (45,), (1,), (1,), (False,), False),
    "everything": ((20,), (20,), (1,), (1,), (False,), False),
    "one token": ((1,), (1,), (1,), (1,), (False,), False),
    "plane": ((6, 7), (5, 4), (1, 1), (1, 1), NO[:2], False),
    "plane strided": ((7, 9), (4, 7), (1, 1), (2, 3), NO[:2], False),
    "plane dilated mixed": ((7, 5), (3, 2), (3, 2), (1, 1), (True, False), False),
    "plane clip": ((5, 7), (3, 6), (1, 1), (1, 1), NO[:2], True),
    "plane of full boxes": ((6, 8), (5, 8), (1, 1), (1, 1), NO[:2], False),
    "line in a plane": ((1, 30), (1, 7), (1, 1), (1, 1), NO[:2], False),
    "space": ((2, 3, 5), (2, 3, 3), (1, 1, 1), (1, 1, 1), (True, False, False), False),
    "space dilated strided": ((2, 4, 4), (2, 2, 3), (1, 2, 1), (1, 1, 2), NO, False),
    "space of full boxes": ((3, 4, 5), (3, 4, 4), (1, 1, 1), (1, 1, 1), NO, False),
}


@pytest.mark.parametrize("name", GRIDS)
def test_equals_the_oracle_in_outputs_and_gradients(name: str) -> None:
    *rule, clip = GRIDS[name]
    compare(inputs(math.prod(rule[0])), tuple(rule), clip=clip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["band causal", "plane", "plane of full boxes"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    *rule, clip = GRIDS[name]
    compare(inputs(math.prod(rule[0]), dtype=dtype), tuple(rule), clip=clip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """No further from the truth than twice what plain operations in the same type are."""
    *rule, _ = GRIDS["plane"]
    leaves = inputs(42, dtype=dtype)
    with torch.no_grad():
        leaves[0].mul_(30)
    mask = full_mask(*rule)
    out = neighborhood_attention(*leaves, *rule, 0.25)
    plain = oracle(*leaves, mask, 0.25)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = oracle(*exact, mask, 0.25)
    assert_close(out, expected, "out", backend="triton", dtype=dtype)
    grad = torch.randn_like(out)
    found, usual = (torch.autograd.grad(y, leaves, grad) for y in (out, plain))
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for name, a, b, c in zip("qkv", found, usual, wanted, strict=True):
        floor = 1e-5 * c.norm()
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + floor, name


@pytest.mark.parametrize(
    ("h", "g", "d", "e"), [(4, 2, 16, 16), (3, 1, 48, 40), (2, 2, 5, 33), (1, 1, 128, 128)]
)
def test_grouped_heads_and_odd_widths(h: int, g: int, d: int, e: int) -> None:
    *rule, _ = GRIDS["everything"]
    compare(inputs(20, b=2, h=h, g=g, d=d, e=e), tuple(rule))


def test_masks_and_numbers_of_the_official_code(
    golden: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighborhood, "EXACT", 32)  # as in use
    tensors, metadata = golden("neighborhood")
    for number, case in enumerate(metadata["config"]["cases"]):
        names = ("shape", "kernel_size", "dilation", "stride", "is_causal")
        rule = tuple(tuple(case[name]) for name in names)
        assert torch.equal(full_mask(*rule), tensors[f"out.c{number}.mask"].bool())

        def flat(name: str) -> Tensor:
            """Heads before the tokens of the flattened grid."""
            return tensors[name.replace(".", f".c{number}.", 1)].flatten(1, -3).transpose(1, 2)  # noqa: B023

        leaves = [flat(f"in.{n}").to(DEVICE).requires_grad_() for n in "qkv"]
        out = neighborhood_attention(*leaves, *rule, case["head_dim"] ** -0.5)
        assert_close(out, flat("out.o"), f"case {number}", backend="triton")
        (out * flat("in.w").to(DEVICE)).sum().backward()
        for x, n in zip(leaves, "qkv", strict=True):
            what = f"case {number}, grad {n}"
            assert_close(x.grad, flat(f"grad.{n}"), what, gradient=True, backend="triton")


@triton.jit
def _probe(out, length, RULE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    first, last = tiles.window(i, length, RULE, 2)
    tl.store(out + i, first)
    tl.store(out + SIZE + i, last)
    tl.store(out + 2 * SIZE + i, tiles.first_query(i, length, RULE, 2))
    tl.store(out + 3 * SIZE + i, tiles.last_query(i, length, RULE, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_their_inverse_are_exact(kind: str) -> None:
    """Neither a missing key or query, nor one in vain."""
    sizes = [(7, 3, 1), (7, 4, 1), (7, 7, 1), (12, 1, 1), (13, 5, 2), (13, 6, 3), (16, 8, 8)]
    sizes += [(11, 7, 4), (14, 9, 7), (10, 2, 2), (1, 1, 1), (15, 4, 4), (9, 8, 8)]
    if kind != "shift":
        sizes += [(5, 12, 1)]
    for x, w, s in sizes:
        s = 1 if kind == "clip" else s
        rule = tiles.Rule((1, 1, w), (1, 1, 1), (1, 1, s), (*NO[:2], kind == "causal"), True, 1)
        rule = rule._replace(clip=kind == "clip")
        found = torch.full((4, 16), -1, dtype=torch.int32, device=DEVICE)
        _probe[(1,)](found, x, rule, 16)
        mask = axis_mask(x, w, 1, s, kind)
        for i in range(x):
            keys, queries = mask[i].nonzero()[:, 0].tolist(), mask[:, i].nonzero()[:, 0].tolist()
            assert found[:2, i].tolist() == [keys[0], keys[-1]], (x, w, s, i)
            assert found[2:, i].tolist() == [queries[0], queries[-1]], (x, w, s, i)


@triton.jit
def _count(out, a, b, c, RULE: tl.constexpr, SIZE: tl.constexpr, SOME: tl.constexpr):
    t = tl.arange(0, SIZE)
    x, y, z = tiles.other_tile(t, a, b, c, RULE)
    tl.store(out + t, t * 0 + x)
    tl.store(out + SIZE + t, t * 0 + y)
    tl.store(out + 2 * SIZE + t, t * 0 + z)
    if SOME:
        p, q, r = tiles.full_tile(t, a, b, c, RULE)
        tl.store(out + 3 * SIZE + t, t * 0 + p)
        tl.store(out + 4 * SIZE + t, t * 0 + q)
        tl.store(out + 5 * SIZE + t, t * 0 + r)


@pytest.mark.parametrize(
    "spans",
    [
        # tiles, first full one and full ones on each axis
        [(3, 1, 1), (4, 1, 2), (5, 0, 3)],
        [(2, 0, 2), (3, 1, 2), (4, 1, 2)],
        [(2, 0, 2), (3, 0, 3), (4, 1, 3)],
        [(2, 0, 2), (2, 0, 2), (2, 0, 2)],
        [(2, 5, 0), (3, 1, 1), (4, 2, 2)],
        [(2, 0, 1), (3, 0, 0), (4, 0, 4)],
        [(1, 0, 1), (3, 1, 1), (4, 0, 0)],
        [(1, 0, 1), (1, 0, 1), (6, 2, 3)],
    ],
)
def test_every_box_is_visited_once(spans: list[tuple[int, int, int]]) -> None:
    axes = 3 - sum(span == (1, 0, 1) for span in spans[:2])
    rule = tiles.Rule((1, 1, 1), (1, 1, 1), (1, 1, 1), NO, False, axes)
    found = torch.full((6, 64), -1, dtype=torch.int32, device=DEVICE)
    some = all(full for _, _, full in spans)
    _count[(1,)](found, *((0, *span) for span in spans), rule, 64, some)
    every = set(itertools.product(*(range(count) for count, _, _ in spans)))
    inner = set(itertools.product(*(range(skip, skip + full) for _, skip, full in spans)))
    rest = [tuple(t) for t in found[:3, : len(every) - len(inner)].T.tolist()]
    filled = [tuple(t) for t in found[3:, : len(inner)].T.tolist()]
    assert sorted(rest) == sorted(every - inner)
    assert sorted(filled) == sorted(inner)


def test_full_boxes_skip_the_mask() -> None:
    """The boxes of these grids include full ones: without `full` another kernel is compiled."""
    for name in ("band causal", "plane of full boxes", "space of full boxes"):
        *rule, clip = GRIDS[name]
        assert tiles.with_boxes(*neighborhood._rule(*rule, clip), 16, 16).full, name
    assert not tiles.with_boxes(*neighborhood._rule(*GRIDS["plane"][:5], False), 64, 64).full


@pytest.mark.parametrize(
    ("shape", "kernel", "rows", "keys"),
    [
        ((4096,), (256,), (1, 1, 64), (1, 1, 64)),
        ((64, 64), (7, 7), (1, 8, 8), (1, 4, 16)),
        ((2, 500), (2, 9), (1, 2, 32), (1, 1, 64)),
    ],
)
def test_boxes_fit_the_windows(
    shape: tuple[int, ...], kernel: tuple[int, ...], rows: tuple[int, ...], keys: tuple[int, ...]
) -> None:
    ones = (1,) * len(shape)
    grid, rule = neighborhood._rule(shape, kernel, ones, ones, NO[: len(shape)], False)
    rule = tiles.with_boxes(grid, rule, 64, 64)
    assert (rule.rows, rule.keys) == (rows, keys)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same values in other strides: as a projection leaves them, and with holes."""
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.stack([x, x], -1).flatten(-2)[..., ::2]
    yield torch.cat([x, x], 2)[:, :, : x.shape[2]]


def test_strides_do_not_matter() -> None:
    rule = ((3, 4), (3, 2), (1, 1), (1, 1), NO[:2])
    leaves = inputs(12, b=2, h=2, g=2)
    out = neighborhood_attention(*leaves, *rule, 0.25)
    wanted = torch.autograd.grad(out.sum(), leaves)  # a gradient of stride 0
    with torch.no_grad():
        made = [list(layouts(x)) for x in leaves]
    for q, k, v in zip(*made, strict=True):
        others = [x.detach().requires_grad_() for x in (q, k, v)]
        assert not all(x.is_contiguous() for x in others)
        again = neighborhood_attention(*others, *rule, 0.25)
        assert torch.equal(again, out)
        grads = torch.autograd.grad(again, others, torch.ones_like(again))
        for a, b in zip(grads, wanted, strict=True):
            assert torch.equal(a, b)


def test_the_same_numbers_in_every_run() -> None:
    *rule, _ = GRIDS["everything"]
    leaves = inputs(20, h=2, g=1)
    runs = []
    for _ in range(2):
        out = neighborhood_attention(*leaves, *rule, 0.25)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("which", range(3))
def test_one_input_with_gradient(which: int) -> None:
    *rule, _ = GRIDS["everything"]
    leaves = inputs(20)
    wanted = torch.autograd.grad(neighborhood_attention(*leaves, *rule, 0.25).sum(), leaves)
    some = [x.detach().requires_grad_(n == which) for n, x in enumerate(leaves)]
    neighborhood_attention(*some, *rule, 0.25).sum().backward()
    assert torch.equal(some[which].grad, wanted[which])
    assert all(x.grad is None for n, x in enumerate(some) if n != which)


def test_gradients_may_be_kept_but_not_derived_again() -> None:
    *rule, _ = GRIDS["one token"]
    leaves = inputs(1)
    out = neighborhood_attention(*leaves, *rule, 0.25)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(ZooError, match="no second derivative"):
        torch.autograd.grad(grads[2].sum(), leaves[2])


@pytest.mark.parametrize(("b", "tokens"), [(0, 9), (2, 0)])
def test_nothing_in_nothing_out(b: int, tokens: int) -> None:
    leaves = inputs(tokens, b=b)
    out = neighborhood_attention(*leaves, (tokens,), (3,), (1,), (1,), (False,), 0.25)
    assert out.shape == (b, 1, tokens, 16)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves)


def test_autocast_takes_half_precision_and_its_backward_too() -> None:
    *rule, _ = GRIDS["plane"]
    leaves = inputs(42)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = neighborhood_attention(*leaves, *rule, 0.25)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = oracle(*exact, full_mask(*rule), 0.25)
    assert_close(out, expected, backend="autocast", dtype=torch.bfloat16)
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for a, b in zip(grads, wanted, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, gradient=True, backend="autocast", dtype=torch.bfloat16)


def op_arguments(grads: bool) -> tuple[Any, ...]:
    """Arguments of the operator for a plane, without the scale."""
    q, k, v = (x.detach().requires_grad_(grads) for x in inputs(6, h=2))
    return q, k, v, [2, 3], [2, 2], [1, 1], [1, 1], [False, True], False, 0.25


# opcheck looks for gradients of tensors that it has made itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck() -> None:
    arguments = op_arguments(grads=True)
    torch.library.opcheck(torch.ops.zoo.neighborhood_fwd, arguments)
    q, k, v, *rule = op_arguments(grads=False)
    out, lse = torch.ops.zoo.neighborhood_fwd(q, k, v, *rule)
    torch.library.opcheck(
        torch.ops.zoo.neighborhood_bwd, (torch.randn_like(out), q, k, v, out, lse, *rule)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return neighborhood_attention(q * 2, k, v, (n,), (5,), (1,), (1,), (False,), 0.5) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (17, 23) if dynamic else (17,):
        leaves = inputs(tokens)
        a, b = compiled(*leaves), layer(*leaves)
        assert torch.equal(a, b)
        for x, y in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (a, b)), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", GRIDS)
def test_operations_are_those_of_the_pairs_that_meet(name: str) -> None:
    *rule, clip = GRIDS[name]
    meta = [x.detach().to("meta").requires_grad_() for x in inputs(math.prod(rule[0]), d=4, e=6)]
    with FlopCounterMode(display=False) as forward:
        out = torch.ops.zoo.neighborhood_fwd(*meta, *(list(x) for x in rule), clip, 1.0)[0]
    pairs = int(full_mask(*rule, clip).sum())
    assert forward.get_total_flops() == 2 * pairs * (4 + 6)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * pairs * (3 * 4 + 2 * 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (4, 6)}, "24"),
        ({"shape": (1, 1, 4, 5)}, "one to three"),
        ({"kernel_size": (3,)}, "kernel_size"),
        ({"causal": (False,)}, "causal"),
        ({"kernel_size": (3, 6)}, "axis 1"),
        ({"dilation": (1, 3)}, "axis 1"),
        ({"kernel_size": (0, 2)}, "kernel_size=0"),
        ({"dilation": (0, 1)}, "dilation=0"),
        ({"stride": (4, 1)}, "stride=4"),
        ({"stride": (2, 1), "clip": True}, "clip"),
        ({"q": (1, 2, 20)}, "4"),
        ({"q": (1, 3, 20, 16)}, "divisors"),
        ({"k": (2, 2, 20, 16)}, "do not fit"),
        ({"v": (1, 2, 19, 16)}, "do not fit"),
        ({"q": (1, 2, 20, 8)}, "do not fit"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    tensors = dict.fromkeys("qkv", (1, 2, 20, 16))
    rule = {"shape": (4, 5), "kernel_size": (3, 2), "dilation": (1, 1), "stride": (1, 1)}
    every: dict[str, Any] = {**tensors, **rule, "causal": (False, False), "scale": 1.0, **change}
    for name in "qkv":
        every[name] = torch.randn(every[name], device=DEVICE)
    with pytest.raises(ZooError, match=message):
        neighborhood_attention(**every)


def test_what_the_kernel_cannot_take_is_refused() -> None:
    *rule, _ = GRIDS["one token"]
    with pytest.raises(ZooError, match="float64"):
        neighborhood_attention(*(x.double() for x in inputs(1)), *rule, 1.0)
    with pytest.raises(ZooError, match="129"):
        neighborhood_attention(*inputs(1, d=129), *rule, 1.0)
    q, k, v = inputs(1)
    with pytest.raises(ZooError, match="float16"):
        neighborhood_attention(q, k.half(), v, *rule, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["video", "image", "text"])
def test_at_the_sizes_of_use(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    rule, clip = {
        "video": (((9, 17, 23), (3, 7, 7), (1, 2, 1), (1, 1, 2), (True, False, False)), False),
        "image": (((61, 47), (13, 13), (1, 1), (1, 1), (False, False)), False),
        "text": (((3001,), (701,), (1,), (1,), (True,)), True),
    }[name]
    leaves = inputs(math.prod(rule[0]), h=4, g=2, d=64, dtype=dtype)
    compare(leaves, rule, scale=0.125, clip=clip)


# What the interpreter never sees: that the kernels compile for a GPU, and fit it.
COMPILE = """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    from zoo.kernels import neighborhood

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                made = self.kernel.warmup(*args, grid=grid, **options)
                assert made.metadata.shared <= 227 * 1024, made.metadata.shared
                print(self.kernel.__name__, "wgmma" in made.asm["ptx"])
            return launch

    for name in ("_forward", "_backward_queries", "_backward_keys"):
        setattr(neighborhood, name, Compiled(getattr(neighborhood, name)))
    neighborhood.INTERPRET = True  # there is no card, and nothing is launched

    def build(dtype, width, *rule):
        tokens = torch.Size(rule[0]).numel()
        q, k, v = (torch.empty(1, h, tokens, width, dtype=dtype) for h in (4, 2, 2))
        out, lse = neighborhood._neighborhood_fwd._init_fn(q, k, v, *rule)
        neighborhood._neighborhood_bwd._init_fn(out, q, k, v, out, lse, *rule)

    build(torch.bfloat16, 64, [64, 64], [7, 7], [1, 1], [1, 1], [False, False], False, 1.0)
    build(torch.float16, 128, [4096], [1024], [1], [1], [True], True, 1.0)
    build(torch.float32, 128, [9, 20, 30], [4, 9, 9], [1, 2, 1], [1, 1, 3], [True, False, False],
          False, 1.0)
"""


@pytest.mark.slow
def test_compiles_for_a_gpu_that_is_not_there() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.split("\n")[:-1]
    assert len(lines) == 9
    assert all(line.endswith("True") for line in lines[:6]), "half precision misses tensor cores"
