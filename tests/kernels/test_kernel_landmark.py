from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.kernels import refuse
from zoo.testing.tolerances import assert_close

pytest.importorskip("triton", reason="Triton is not installed")

import itertools

from zoo.kernels.landmark import landmark_attention

# Batch, heads, key heads, length, width of keys, width of values, ordinary tokens of a group.
SHAPES = {
    "tail": (1, 2, 1, 75, 16, 16, 20),
    "many_groups": (1, 1, 1, 82, 24, 40, 3),
    "pairs": (1, 1, 1, 25, 16, 16, 1),
    "whole_tile": (2, 2, 2, 40, 8, 8, 32),
    "wide_head": (1, 1, 1, 70, 80, 128, 50),
    "longest_group": (1, 2, 1, 140, 16, 16, 128),
    "one_group": (1, 4, 2, 9, 16, 16, 50),
    "one_token": (2, 2, 1, 1, 16, 16, 4),
}


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def weights(scores: Tensor, block: int) -> Tensor:
    """Grouped softmax by its definition, (..., N, N), one group after another."""
    index = torch.arange(scores.shape[-1])
    group, landmark = index // (block + 1), index % (block + 1) == block
    own = (group[:, None] == group) & (index[:, None] >= index) & ~landmark
    marks = (group[:, None] > group) & landmark
    outer = scores.masked_fill(~(own | marks), -math.inf).softmax(-1)
    parts = []
    for t, at in enumerate(range(0, len(index), block + 1)):
        tokens = slice(at, min(at + block, len(index)))
        part = outer[..., tokens] * own[:, tokens]
        if at + block < len(index):
            share = outer[..., at + block, None] * (group > t)[:, None]
            part = part + share * scores[..., tokens].softmax(-1)
            parts += [part, torch.zeros_like(part[..., :1])]
        else:
            parts.append(part)
    return torch.cat(parts, -1)


def dense(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return weights(scale * q @ k.mT, block) @ v


def inputs(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, size: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    b, h, g, n, d, e, _ = shape
    q, k, v = torch.randn(b, h, n, d), torch.randn(b, g, n, d), torch.randn(b, g, n, e)
    leaves = [x.to(device, dtype).requires_grad_() for x in (q * size, k, v)]
    return leaves, torch.randn(b, h, n, e).to(device, dtype)


def check(leaves: list[Tensor], grad: Tensor, block: int, out: Tensor, scale: float) -> None:
    """Compare an output and the gradients behind it with the dense form in float64."""
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    expected = dense(*exact, block, scale)
    assert_close(out, expected, "output", backend="triton")
    assert out.dtype == leaves[0].dtype
    found = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(expected, exact, grad.cpu().double())
    for name, x, actual, other in zip("qkv", leaves, found, wanted, strict=True):
        assert actual.dtype == x.dtype
        assert_close(actual, other, f"gradient of {name}", gradient=True, backend="triton")


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_definition(name: str, device: str) -> None:
    shape = SHAPES[name]
    leaves, grad = inputs(shape, device)
    scale = shape[4] ** -0.5
    check(leaves, grad, shape[-1], landmark_attention(*leaves, shape[-1], scale), scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    shape = (1, 2, 1, 66, 32, 32, 32)
    leaves, grad = inputs(shape, device, dtype)
    check(leaves, grad, 32, landmark_attention(*leaves, 32, 32**-0.5), 32**-0.5)


def test_large_scores_do_not_overflow(device: str) -> None:
    leaves, grad = inputs((1, 1, 1, 80, 16, 16, 20), device, size=30.0)
    check(leaves, grad, 20, landmark_attention(*leaves, 20, 0.25), 0.25)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale: float, device: str) -> None:
    leaves, grad = inputs((1, 1, 1, 40, 16, 16, 10), device)
    check(leaves, grad, 10, landmark_attention(*leaves, 10, scale), scale)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_packed_sequences_are_sequences_of_their_own(integer: torch.dtype, device: str) -> None:
    ends = [0, 70, 70, 71, 85]
    (q, k, v), grad = inputs((1, 2, 1, 85, 16, 16, 20), device)
    cu_seqlens = torch.tensor(ends, device=device, dtype=integer)
    out = landmark_attention(q, k, v, 20, 0.25, cu_seqlens)
    found = torch.autograd.grad(out, (q, k, v), grad)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    expected = torch.cat(
        [
            dense(*(x[:, :, a:b] for x in exact), 20, 0.25)
            for a, b in itertools.pairwise(ends)
            if b > a
        ],
        2,
    )
    assert_close(out, expected, "output", backend="triton")
    wanted = torch.autograd.grad(expected, exact, grad.cpu().double())
    for name, actual, other in zip("qkv", found, wanted, strict=True):
        assert_close(actual, other, f"gradient of {name}", gradient=True, backend="triton")


def test_worked_example_of_a_row(device: str) -> None:
    # One dimension: the last query's scores are those of the keys.
    scores = torch.tensor([0.0, math.log(2), 0.0, math.log(3), 0.0])
    q = torch.ones(1, 1, 5, 1, device=device)
    k = scores.to(device).view(1, 1, 5, 1)
    out = landmark_attention(q, k, torch.eye(5, device=device).view(1, 1, 5, 5), 2, 1.0)
    assert_close(
        out[0, 0, -1], torch.tensor([1 / 15, 2 / 15, 0, 3 / 5, 1 / 5]), "weights", backend="triton"
    )


def test_strided_inputs_and_an_expanded_gradient(device: str) -> None:
    b, n, h, d = 2, 45, 2, 16
    q = torch.randn(b, n, h, 2 * d, device=device)[..., ::2].transpose(1, 2)
    kv = torch.randn(b, n, 2, h, d, device=device)
    k, v = kv[:, :, 0].transpose(1, 2), kv[:, :, 1, :1].transpose(1, 2).expand(b, h, n, d)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in leaves)
    grad = torch.ones(1, 1, 1, 1, device=device).expand(b, h, n, d)
    out = landmark_attention(*leaves, 15, 0.25)
    check(leaves, grad, 15, out, 0.25)
    # The heads of a token lie side by side, as the projection behind them wants them.
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("b", "n"), [(0, 7), (2, 0)])
def test_nothing_in_nothing_out(b: int, n: int, device: str) -> None:
    leaves, grad = inputs((b, 2, 1, n, 16, 8, 4), device)
    out = landmark_attention(*leaves, 4, 0.25)
    assert out.shape == (b, 2, n, 8)
    for x, dx in zip(leaves, torch.autograd.grad(out, leaves, grad), strict=True):
        assert dx.shape == x.shape


def test_values_of_landmarks_are_never_used(device: str) -> None:
    (q, k, v), grad = inputs((1, 1, 1, 30, 16, 16, 5), device)
    out = landmark_attention(q, k, v, 5, 0.25)
    landmark = torch.arange(30, device=device) % 6 == 5
    other = torch.where(landmark[:, None], 1e9, v)
    assert torch.equal(out, landmark_attention(q, k, other, 5, 0.25))
    dk, dv = torch.autograd.grad(out, (k, v), grad)
    assert not dv[:, :, landmark].any()
    assert dv[:, :, ~landmark].any(-1).all()
    # Nobody sees the landmark of the last group; the others' keys matter.
    assert not dk[:, :, -1].any()
    assert dk[:, :, landmark][:, :, :-1].any(-1).all()


def test_one_input_that_requires_grad(device: str) -> None:
    leaves, grad = inputs((1, 1, 1, 12, 16, 16, 7), device)
    every = torch.autograd.grad(landmark_attention(*leaves, 7, 0.25), leaves, grad)
    for needed in range(3):
        some = [x.detach().requires_grad_(i == needed) for i, x in enumerate(leaves)]
        (found,) = torch.autograd.grad(landmark_attention(*some, 7, 0.25), some[needed], grad)
        # Equal to the bit: nothing is summed in an order that may change.
        assert torch.equal(found, every[needed])


def test_second_derivative_is_refused(device: str) -> None:
    leaves, grad = inputs((1, 1, 1, 12, 16, 16, 5), device)
    first = torch.autograd.grad(
        landmark_attention(*leaves, 5, 0.25), leaves, grad, create_graph=True
    )
    with pytest.raises(ZooError, match="differentiable once"):
        torch.autograd.grad(first[0].sum(), leaves)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck looks at clones
@pytest.mark.parametrize("packed", [False, True])
def test_operators_pass_the_checks_of_torch(packed: bool, device: str) -> None:
    leaves, grad = inputs((1, 2, 1, 10, 16, 24, 4), device)
    cu_seqlens = torch.tensor([0, 3, 10], device=device) if packed else None
    arguments = (*leaves, 5, 0.25, cu_seqlens)
    torch.library.opcheck(torch.ops.zoo.landmark_fwd.default, arguments)
    plain = [x.detach() for x in leaves]
    out, lse = torch.ops.zoo.landmark_fwd(*plain, 5, 0.25, cu_seqlens)
    torch.library.opcheck(
        torch.ops.zoo.landmark_bwd.default, (grad, *plain, out, lse, 5, 0.25, cu_seqlens)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool, device: str) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (landmark_attention(2 * q, k, v, 8, 0.25) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (9, 13) if dynamic else (9,):
        leaves, _ = inputs((1, 2, 1, n, 16, 16, 8), device)
        found = torch.autograd.grad(compiled(*leaves), leaves)
        wanted = torch.autograd.grad(loss(*leaves), leaves)
        for name, actual, other in zip("qkv", found, wanted, strict=True):
            assert_close(actual, other, f"gradient of {name}", gradient=True, backend="triton")


def test_counts_its_operations(device: str) -> None:
    leaves, grad = inputs((2, 2, 1, 20, 16, 24, 32), device)
    with FlopCounterMode(display=False) as counter:
        out = landmark_attention(*leaves, 32, 0.25)
    pairs = 2 * 2 * 20 * 21 // 2
    assert counter.get_total_flops() == 2 * pairs * (16 + 24)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, leaves, grad)
    assert counter.get_total_flops() == 2 * pairs * (3 * 16 + 2 * 24)
    one = [x[:1].detach() for x in leaves]
    ends = torch.tensor([0, 5, 20], device=device)
    with FlopCounterMode(display=False) as counter:
        landmark_attention(*one, 32, 0.25, ends)
    assert counter.get_total_flops() == 2 * 2 * (5 * 6 // 2 + 15 * 16 // 2) * (16 + 24)


def test_bad_input(device: str) -> None:
    q = torch.randn(2, 4, 10, 16, device=device)
    k = q[:, :2]

    def call(q: Tensor, k: Tensor, v: Tensor, block: int = 4, ends: Tensor | None = None) -> None:
        landmark_attention(q, k, v, block, 1.0, ends)

    with pytest.raises(ZooError, match="need 4 axes, got 3"):
        call(q[0], k, k)
    with pytest.raises(ZooError, match="do not fit q"):
        call(q, k[:, :, :9], k[:, :, :9])
    with pytest.raises(ZooError, match="4 heads, which 3 of k"):
        call(q, q[:, :3], q[:, :3])
    for block in (0, 129):
        with pytest.raises(ZooError, match=f"block={block} .* 1 to 128"):
            call(q, k, k, block)
    wide = torch.randn(1, 1, 4, 130, device=device)
    with pytest.raises(ZooError, match="head dim 130 is above 128"):
        call(wide, wide, wide)
    with pytest.raises(ZooError, match="float64"):
        call(q.double(), k.double(), k.double())
    with pytest.raises(ZooError, match=r"float32 and torch\.float16"):
        call(q, k.half(), k.half())
    with pytest.raises(ZooError, match="int32 or int64"):
        call(q[:1], k[:1], k[:1], 4, torch.tensor([0.0, 10.0], device=device))
    with pytest.raises(ZooError, match="a batch of 2"):
        call(q, k, k, 4, torch.tensor([0, 10], device=device))


def test_without_an_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 1, 4, 16)
    assert refuse(q, by_name=True)
    with pytest.raises(ZooError, match="TRITON_INTERPRET=1"):
        landmark_attention(q, q, q, 2, 1.0)
