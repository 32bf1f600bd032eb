"""Causal linear attention with a constant decay per head, in chunks (the family of Lightning).

    S_t = exp(log_decay) S_{t-1} + k_t v_t^T           S (B, H, D, E), float32
    o_t = q_t S_t                                      q (B, H, N, D), v (B, G, N, E)

All of it, backward pass included, is one walk over chunks of C tokens with a state in registers:

    o_i = sum_j w_ij (a_i . b_j) c_j                   w_ij = exp(log_decay |i - j|)

    what   a    b    c    pairs      states between chunks
    o      q    k    v    j <= i     S    of the tokens before
    dq     do   v    k    j <= i     S^T
    dv     k    q    do   j >= i     R    R_t = exp(log_decay) R_{t+1} + q_t do_t^T, tokens after
    dk     v    do   q    j >= i     R^T

Pairs inside a chunk go through (C, C) scores, all others through the state. Only exponentials of
numbers up to 0 are taken, of differences of positions within a chunk, so that no decay overflows.

A program walks the tokens for one head and one tile of the columns of c. There are two shapes:

- Whole: every program walks a whole sequence. Each tensor is read once, and no state is written
  but the last. Taken where sequences, heads and tiles make enough programs to fill the device.
- Pieces: sequences are cut into as many pieces as fill it, none shorter than 256 tokens. The sums
  k v^T of all pieces come first, in parallel; a scan over the pieces turns them into the states
  before each; then all pieces are walked in parallel. k and v are read twice, and D x E numbers for
  each piece go out and in twice. The rule is `cut_pieces` of `zoo.kernels._linear_launch`.

The op is bound by memory: 2 C D + 4 D^2 operations are some 80 for each byte at D = 128.
The gradients of all three inputs come from one launch, in which the programs that read the same
tokens run side by side, so that most of their reads meet in the L2 cache.

float16 is multiplied as TF32: the same 10 bits of mantissa, but states and scores, which nothing
normalises, may outgrow its range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels import refuse
from zoo.kernels._linear_launch import CHUNK, Inputs, backward, forward
from zoo.kernels._operator import refuse_second, spread
from zoo.kernels.common import INTERPRET, rows

# Largest width of a head of q and k, and of v.
WIDEST = 256


def _prepare(x: Inputs, *others: Tensor) -> Inputs:
    """The inputs with contiguous rows.

    Raises:
        ZooError: No kernel can take them and the others, or packed sequences do not cover the
            tokens.
    """
    cu_seqlens = x.cu_seqlens
    reason = refuse(*x[:3], *others, head_dim=WIDEST, by_name=True)
    if reason is None and x.q.device.type == "cpu" and not INTERPRET:
        reason = "TRITON_INTERPRET was set after the kernels were imported"
    if reason is not None:
        raise ZooError(f"the linear attention kernel cannot run: {reason}")
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":  # elsewhere it would wait
        bounds, length = cu_seqlens.tolist(), x.q.shape[2]
        if bounds != sorted(bounds) or bounds[:1] != [0] or bounds[-1] != length:
            raise ZooError(f"cu_seqlens={bounds} must go from 0 to {length} and never fall")
    state = _contiguous(x.initial_state)
    return Inputs(rows(x.q), rows(x.k), rows(x.v), x.log_decay, state, cu_seqlens)


def _contiguous(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.contiguous()


def _unchanged(state: Tensor | None, x: Inputs) -> Tensor:
    """A copy of the state (or zeros), which no token has changed."""
    if state is None:
        return x.new_state().zero_()
    return state.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("zoo::linear_fwd", mutates_args=(), device_types=("cpu", "cuda"))
@spread
def _linear_fwd(x: Inputs) -> tuple[Tensor, Tensor]:
    x = _prepare(x)
    if not x.q.numel():
        return _outputs(x), _unchanged(x.initial_state, x)
    with torch.cuda.device_of(x.q):
        return forward(x)


def _outputs(x: Inputs) -> Tensor:
    """Room for outputs."""
    return x.v.new_empty(*x.q.shape[:3], x.v.shape[3])


@_linear_fwd.register_fake
@spread
def _(x: Inputs) -> tuple[Tensor, Tensor]:
    return _outputs(x), x.new_state()


@torch.library.custom_op("zoo::linear_bwd", mutates_args=(), device_types=("cpu", "cuda"))
@spread
def _linear_bwd(
    grad: Tensor, grad_state: Tensor | None, x: Inputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _prepare(x, grad)
    if not x.q.numel():
        return *_gradients(x), _unchanged(grad_state, x)
    with torch.cuda.device_of(x.q):
        return backward(rows(grad), _contiguous(grad_state), x)


def _gradients(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of q, k and v."""
    return x.q.new_empty(x.q.shape), x.k.new_empty(x.k.shape), x.v.new_empty(x.v.shape)


@_linear_bwd.register_fake
@spread
def _(grad: Tensor, grad_state: Tensor | None, x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_gradients(x), x.new_state()


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    x = Inputs(*ctx.saved_tensors)
    if grad is None:
        grad = x.v.new_zeros(*x.q.shape[:3], x.v.shape[3])
    dq, dk, dv, start = torch.ops.zoo.linear_bwd(grad, grad_state, *x)
    return dq, dk, dv, None, None if x.initial_state is None else start, None


_linear_fwd.register_autograd(_differentiate, setup_context=_save)
refuse_second(
    _linear_bwd,
    "the linear attention kernel has no second derivative; backend='reference' or 'torch' has",
)


def _linear_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Products with states, and the half of each chunk that is seen."""
    tokens, d, e = q[0] * q[1] * q[2], q[3], v[3]
    return tokens * (CHUNK * (d + e) + 4 * d * e)


@register_flop_formula(torch.ops.zoo.linear_fwd)
def _forward_flops(*args: Any, **kwargs: Any) -> int:
    return _linear_flops(*args[:3])


@register_flop_formula(torch.ops.zoo.linear_bwd)
def _backward_flops(grad: Any, state: Any, *args: Any, **kwargs: Any) -> int:
    """Five products in place of two, none of them counted twice."""
    return _linear_flops(*args[:3]) * 5 // 2


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention, ``o_t = q_t S_t`` with ``S_t = exp(log_decay) S_{t-1} + k_t v_t^T``.

    Neither scaled nor normalised; sums are float32. Differentiable once, with respect to q, k, v
    and the initial state, through the outputs and the final state. The same numbers in every run.

    Args:
        q: (B, H, N, D), float16, bfloat16 or float32; D at most 256.
        k: (B, G, N, D), G dividing H; query head h meets key head ``h // (H // G)``.
        v: (B, G, N, E), E at most 256. Rows that start at multiples of 16 bytes are read fastest.
        log_decay: Logarithm of each head's decay, (H,), float32, at most 0; None for no decay.
        initial_state: State before the first token, (B, H, D, E), float32; None for zeros.
        cu_seqlens: Bounds of packed sequences, (S + 1,), int32 or int64, from 0 to N and not
            falling; B is 1 then, and states are (S, H, D, E).

    Returns:
        Outputs (B, H, N, E) of the type of q, and the states after the last tokens, float32.

    Raises:
        ZooError: Shapes or types that do not fit, a decay that wants a gradient, or tensors that a
            Triton kernel cannot take.
    """
    x = Inputs(q, k, v, log_decay, initial_state, cu_seqlens)
    _check(x)
    return torch.ops.zoo.linear_fwd(*x)


def _check(x: Inputs) -> None:
    q, k, v, log_decay, initial_state, cu_seqlens = x
    for name, each in (("q", q), ("k", k), ("v", v)):
        if each.ndim != 4:
            raise ZooError(f"{name} of shape {tuple(each.shape)} must be (B, heads, N, width)")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or k.shape[:3] != v.shape[:3]:
        raise ZooError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; "
            "allowed: (B, H, N, D), (B, G, N, D), (B, G, N, E)"
        )
    heads, groups = q.shape[1], k.shape[1]
    if heads % max(groups, 1) or bool(groups) != bool(heads):
        raise ZooError(f"{groups} heads of k must divide the {heads} heads of q")
    if log_decay is not None:
        if log_decay.dtype != torch.float32 or log_decay.shape != (heads,):
            raise ZooError(
                f"log_decay of {log_decay.dtype} and shape {tuple(log_decay.shape)}; allowed: "
                f"torch.float32 and ({heads},)"
            )
        if log_decay.requires_grad and torch.is_grad_enabled():
            raise ZooError("log_decay requires a gradient, which the kernel does not compute")
    if cu_seqlens is not None and (
        cu_seqlens.ndim != 1
        or not cu_seqlens.shape[0]
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or q.shape[0] != 1
    ):
        raise ZooError(
            f"cu_seqlens of {cu_seqlens.dtype} and shape {tuple(cu_seqlens.shape)} with "
            f"{q.shape[0]} samples; allowed: int32 or int64, (S + 1,), and one sample"
        )
    if initial_state is not None:
        shape = (x.sequences, heads, q.shape[3], v.shape[3])
        if initial_state.dtype != torch.float32 or initial_state.shape != shape:
            raise ZooError(
                f"initial_state of {initial_state.dtype} and shape {tuple(initial_state.shape)}; "
                f"allowed: torch.float32 and {shape}"
            )
    for name, other in (
        ("log_decay", log_decay),
        ("initial_state", initial_state),
        ("cu_seqlens", cu_seqlens),
    ):
        if other is not None and other.device != q.device:
            raise ZooError(f"{name} is on {other.device}, q on {q.device}")
