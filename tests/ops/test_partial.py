"""Partial softmax results against attention to all keys at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zoo
from zoo.ops import partial
from zoo.ops.partial import flash, flash_backward, merge, partial_attention
from zoo.testing.tolerances import assert_close


@pytest.fixture(params=["fused", "plain"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the CPU's flash kernel and without it."""
    if request.param == "plain":
        monkeypatch.setattr(partial, "_fused", lambda: False)


def _inputs(
    rows: int = 7, keys: int = 11, dtype: torch.dtype = torch.float64, width: int = 5
) -> list[Tensor]:
    shapes = ((2, 3, rows, 5), (2, 3, keys, 5), (2, 3, keys, width))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _grads(out: Tensor, lse: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    a, b = (torch.randn(x.shape, dtype=x.dtype) for x in (out, lse))  # whatever the strides
    loss = (out * a).sum() + (lse * b).sum()
    return list(torch.autograd.grad(loss, inputs))


def test_this_torch_has_the_fused_kernel() -> None:
    assert partial._fused()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("form", ["all", "causal", "mask", "causal mask", "wide values"])
def test_output_lse_and_gradients(form: str) -> None:
    inputs = _inputs(11, 11, width=6 if form == "wide values" else 5)
    causal = "causal" in form
    mask = torch.rand(2, 1, 11, 11) < 0.7 if "mask" in form else None
    if mask is not None:
        mask.diagonal(dim1=-2, dim2=-1).fill_(True)
    seen = torch.ones(11, 11, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    out, lse = partial_attention(*inputs, scale=0.3, causal=causal, mask=mask)
    wanted = _dense(*inputs, seen if mask is None else seen & mask)
    assert_close(out, wanted[0], "output")
    assert_close(lse, wanted[1], "lse")
    pairs = zip("qkv", _grads(out, lse, inputs), _grads(*wanted, inputs), strict=True)
    for name, found, right in pairs:
        assert_close(found, right, f"gradient of {name}", gradient=True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("cut", [[11], [4, 7], [1, 1, 9], [3, 0, 8]])
def test_pieces_merge_to_the_whole(cut: list[int]) -> None:
    q, k, v = _inputs()
    pieces = [
        partial_attention(q, a, b, scale=0.3)
        for a, b in zip(k.split(cut, 2), v.split(cut, 2), strict=True)
    ]
    found = merge([out for out, _ in pieces], [lse for _, lse in pieces])
    wanted = _dense(q, k, v)
    assert_close(found[0], wanted[0], "merged output")
    assert_close(found[1], wanted[1], "merged lse")
    for a, b in zip(_grads(*found, [q, k, v]), _grads(*wanted, [q, k, v]), strict=True):
        assert_close(a, b, "gradient", gradient=True)


@pytest.mark.usefixtures("kernel")
def test_gradients_of_a_piece_by_the_merged_result() -> None:
    q, k, v = _inputs()
    out, lse = _dense(q, k, v)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (q, k, v), grad)
    halves = [
        flash_backward(grad, q, a, b, out, lse, scale=0.3)
        for a, b in zip(k.split([4, 7], 2), v.split([4, 7], 2), strict=True)
    ]
    assert_close(halves[0][0] + halves[1][0], wanted[0], "dq", gradient=True)
    assert_close(torch.cat([h[1] for h in halves], 2), wanted[1], "dk", gradient=True)
    assert_close(torch.cat([h[2] for h in halves], 2), wanted[2], "dv", gradient=True)


@pytest.mark.usefixtures("kernel")
def test_rows_that_see_nothing() -> None:
    inputs = _inputs()
    mask = torch.ones(2, 1, 7, 11, dtype=torch.bool)
    mask[0, :, 2] = False
    out, lse = partial_attention(*inputs, mask=mask)
    assert not out[0, :, 2].any()
    assert bool((lse[0, :, 2] == -torch.inf).all())
    grads = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert not grads[0][0, :, 2].any()
    assert all(bool(g.isfinite().all()) for g in grads)
    both = merge([out, out], [lse, lse])
    assert_close(both[0], out, "a result merged with itself")
    assert bool((both[1][0, :, 2] == -torch.inf).all())
    again = torch.autograd.grad(merge([out, out], [lse, lse])[0].sum(), inputs[0])[0]
    assert bool(again.isfinite().all())


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype=dtype)
    out, lse = partial_attention(*inputs, scale=0.3)
    wanted = _dense(*(x.detach().double() for x in inputs))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close(out, wanted[0], "output", dtype=dtype)
    assert_close(lse, wanted[1], "lse", dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        held = flash(*inputs, scale=0.3)
    assert torch.equal(held[0], out)


@pytest.mark.parametrize("shape", [(0, 3, 7, 11), (2, 3, 0, 11), (2, 3, 7, 0)])
def test_nothing_to_attend_to(shape: tuple[int, int, int, int]) -> None:
    samples, heads, rows, keys = shape
    q = torch.randn(samples, heads, rows, 5, requires_grad=True)
    k = torch.randn(samples, heads, keys, 5, requires_grad=True)
    out, lse = partial_attention(q, k, k, causal=True)
    assert out.shape == (samples, heads, rows, 5)
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    out.sum().backward()
    assert q.grad is not None
    assert not q.grad.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(7, 11), (3, 1, 11), (11,)])
def test_masks_of_fewer_axes_broadcast(kernel: None, shape: tuple[int, ...], causal: bool) -> None:
    inputs = _inputs()
    mask = torch.rand(shape) < 0.6
    short = partial_attention(*inputs, causal=causal, mask=mask)
    whole = partial_attention(*inputs, causal=causal, mask=mask.expand(2, 3, 7, 11))
    for a, b in zip(short, whole, strict=True):
        assert_close(a.nan_to_num(neginf=0.0), b.nan_to_num(neginf=0.0))
    pairs = [torch.autograd.grad(out.sum(), inputs) for out in (short[0], whole[0])]
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b, gradient=True)


def test_bad_input() -> None:
    q, k, v = _inputs()
    with pytest.raises(zoo.ZooError, match="k of shape"):
        partial_attention(q, k[:, :1], v)
    with pytest.raises(zoo.ZooError, match="do not fit together"):
        partial_attention(q, k, v[:, :, :4])
    with pytest.raises(zoo.ZooError, match="1 outputs and 2 lses"):
        merge([q], [q[..., 0], q[..., 0]])
    with pytest.raises(zoo.ZooError, match="needs an lse of shape"):
        merge([q], [q])
    with pytest.raises(zoo.ZooError, match="others of its shape"):
        merge([q, q[..., :1]], [q[..., 0], q[..., 0]])
    with pytest.raises(zoo.ZooError, match="others of its shape"):
        merge([q, q], [q[..., 0], q[:, :, :1, 0]])
    with pytest.raises(zoo.ZooError, match="q of shape"):
        partial_attention(q[0], k, v)
    for mask in (torch.ones(7, 11), torch.ones(2, 1, 6, 11, dtype=torch.bool)):
        with pytest.raises(zoo.ZooError, match="mask of shape"):
            partial_attention(q, k, v, mask=mask)
    out, _ = partial_attention(q, k, v)
    with pytest.raises(zoo.ZooError, match="no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_a_compiler_takes_it_whole() -> None:
    q, k, v = _inputs(dtype=torch.float32)
    compiled = torch.compile(partial_attention, backend="aot_eager", fullgraph=True)
    found, wanted = compiled(q, k, v), partial_attention(q, k, v)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    pairs = (torch.autograd.grad(outs[0].square().sum(), (q, k, v)) for outs in (found, wanted))
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b, gradient=True)
