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
from zoo.kernels._linear_launch import CHUNK, backward, forward
from zoo.kernels.common import INTERPRET, rows

# Largest width of a head of q and k, and of v.
WIDEST = 256


def _prepare(tensors: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> list[Tensor]:
    """The tensors with contiguous rows.

    Raises:
        ZooError: No kernel can take them, or packed sequences do not cover the tokens.
    """
    reason = refuse(*tensors, head_dim=WIDEST, by_name=True)
    if reason is None and tensors[0].device.type == "cpu" and not INTERPRET:
        reason = "TRITON_INTERPRET was set after the kernels were imported"
    if reason is not None:
        raise ZooError(f"the linear attention kernel cannot run: {reason}")
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":  # elsewhere it would wait
        bounds, length = cu_seqlens.tolist(), tensors[0].shape[2]
        if bounds != sorted(bounds) or bounds[:1] != [0] or bounds[-1] != length:
            raise ZooError(f"cu_seqlens={bounds} must go from 0 to {length} and never fall")
    return [rows(x) for x in tensors]


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _unchanged(state: Tensor | None, q: Tensor, v: Tensor, sequences: int) -> Tensor:
    """A copy of the state (or zeros), which no token has changed."""
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    shape = (sequences, q.shape[1], q.shape[3], v.shape[3])
    return q.new_zeros(shape, dtype=torch.float32)


@torch.library.custom_op("zoo::linear_fwd", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _prepare((q, k, v), cu_seqlens)
    if not q.numel():
        state = _unchanged(initial_state, q, v, _sequences(q, cu_seqlens))
        return v.new_empty(*q.shape[:3], v.shape[3]), state
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    with torch.cuda.device_of(q):
        return forward(q, k, v, log_decay, initial_state, cu_seqlens)


@_linear_fwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (_sequences(q, cu_seqlens), q.shape[1], q.shape[3], v.shape[3])
    return v.new_empty(*q.shape[:3], v.shape[3]), v.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("zoo::linear_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_bwd(
    grad: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, grad = _prepare((q, k, v, grad), cu_seqlens)
    if not q.numel():
        start = _unchanged(grad_state, q, v, _sequences(q, cu_seqlens))
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), start
    if grad_state is not None:
        grad_state = grad_state.contiguous()
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    with torch.cuda.device_of(q):
        return backward(grad, grad_state, q, k, v, log_decay, initial_state, cu_seqlens)


@_linear_bwd.register_fake
def _(
    grad: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (_sequences(q, cu_seqlens), q.shape[1], q.shape[3], v.shape[3])
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, v.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    if grad is None:
        grad = v.new_zeros(*q.shape[:3], v.shape[3])
    dq, dk, dv, start = torch.ops.zoo.linear_bwd(
        grad, grad_state, q, k, v, log_decay, initial_state, cu_seqlens
    )
    return dq, dk, dv, None, None if initial_state is None else start, None


def _refuse_second(ctx: Any, *grads: Tensor | None) -> None:
    raise ZooError(
        "the linear attention kernel has no second derivative; backend='reference' or 'torch' has"
    )


_linear_fwd.register_autograd(_differentiate, setup_context=_save)
_linear_bwd.register_autograd(_refuse_second)


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
    _check(q, k, v, log_decay, initial_state, cu_seqlens)
    return torch.ops.zoo.linear_fwd(q, k, v, log_decay, initial_state, cu_seqlens)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ZooError(f"{name} of shape {tuple(x.shape)} must be (B, heads, N, width)")
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
        shape = (_sequences(q, cu_seqlens), heads, q.shape[3], v.shape[3])
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
