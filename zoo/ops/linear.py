"""The core of linear attention with a constant decay: three forms of one function.

    S_t = lambda_h S_(t-1) + k_t v_t^T       S (B, H, D, E), S_(-1) = 0 or a state that is given
    o_t = q_t S_t                            q (B, H, N, D), k (B, G, N, D), v (B, G, N, E)

with one lambda_h = exp(log_decay_h) in [0, 1] for each query head, or none at all. There is no
scale and no denominator: who wants one appends a column of ones to v. Query head h meets key/value
head ``h // (H // G)``.

- `recurrent_linear_attention`: the two lines above, a step at a time.
- `parallel_linear_attention`: ((q k^T) * lambda^(t-j)) v, with all N x N products.
- `chunked_linear_attention`: quadratic inside chunks of C tokens, and through the state between
  chunks: N (C (D + E) + 2 D E) multiplications per head in matrix products, memory O(N).

The three agree in outputs, final states and the gradients of everything but the decay, which the
first two differentiate as they stand and the third by giving up its own backward pass.
Exponentials are taken of differences of positions only, so nothing overflows however steep the
decay. Half types are computed in float32, and states are never less than that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError
from zoo.ops import _linear_segments as segments
from zoo.ops._linear_features import Features
from zoo.parts import check_cu_seqlens, full_precision, repeat_heads

# Tokens of a chunk, about the width of a head: then both halves of the work are of one size.
CHUNK = 64
# Chunks whose states the plain form joins by one matrix product.
GROUP = 32
# Where a decay is so steep, exp gives zero in any type; minus infinity itself would give 0 * inf.
STEEPEST = -1e4


def parallel_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The quadratic form: products of all pairs, decayed by their distance; any dtype.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D), G dividing H.
        v: (B, G, N, E).
        log_decay: (H,), at most 0, or None for no decay.
        initial_state: State before the first token, (B, H, D, E), or None for zeros.
        cu_seqlens: Bounds of packed sequences, (S + 1,) integers from 0 to N; B must be 1 and
            states are (S, H, D, E) then.

    Returns:
        Outputs (B, H, N, E) in the type of v, and the states after the last token in float32
        or float64.

    Raises:
        ZooError: A shape does not fit, or a decay is above 0.
    """
    bounds = _check(q, k, v, log_decay, initial_state, cu_seqlens)
    return _spread(_parallel, q, k, v, log_decay, initial_state, bounds)


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after the other; any dtype.

    Takes, returns and raises what `parallel_linear_attention` does.
    """
    bounds = _check(q, k, v, log_decay, initial_state, cu_seqlens)
    return _spread(_recurrent, q, k, v, log_decay, initial_state, bounds)


def chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    chunk: int | None = None,
    cu_seqlens: Tensor | None = None,
    features: Features | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in time and memory O(N), on a CPU with its own backward pass.

    Under compilers, transforms of torch.func and second derivatives, off the CPU, and where the
    decay itself wants a gradient, a plain differentiable chunked form takes its place.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D), G dividing H.
        v: (B, G, N, E).
        log_decay: (H,), at most 0, or None for no decay.
        initial_state: State before the first token, (B, H, D, E), or None for zeros.
        chunk: Tokens of a chunk; the result does not depend on it. Default about 64.
        cu_seqlens: Bounds of packed sequences, (S + 1,) integers from 0 to N; B must be 1 and
            states are (S, H, D, E) then.
        features: What q and k go through first; with LRPE the D of states is twice theirs.

    Returns:
        Outputs (B, H, N, E) in the type of v, and the states after the last token in float32
        or float64.

    Raises:
        ZooError: A shape does not fit, a decay is above 0, or the chunk is below 1.
    """
    chunk = checks.optional(checks.whole)("chunk", chunk)
    plain = _wants_plain(q, log_decay)
    if features is not None and (plain or not q.numel() or not v.numel() or q.shape[2] == 1):
        q, k, v = features.apply(q, k, v)
        features = None
    wide = features is not None and features.theta is not None
    bounds = _check(q, k, v, log_decay, initial_state, cu_seqlens, 2 if wide else 1)
    if not q.numel() or not v.numel():
        return _spread(_parallel, q, k, v, log_decay, initial_state, bounds)
    if bounds is None and not plain and q.shape[2] == 1:
        return _spread(_recurrent, q, k, v, log_decay, initial_state, None)
    if plain:

        def form(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
            return _chunked(*tensors, chunk=chunk or CHUNK)  # type: ignore[arg-type]

        return _spread(form, q, k, v, log_decay, initial_state, bounds)
    if chunk is None:
        chunk = CHUNK
        if bounds is None:  # of equal chunks the last is not a short one
            chunk = -(-q.shape[2] // -(-q.shape[2] // CHUNK))
    decay = None if log_decay is None else log_decay.detach().clamp_min(STEEPEST)
    return segments.apply(q, k, v, initial_state, decay, chunk, bounds, plain_chunks, features)


def plain_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    chunk: int,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """The chunked form in differentiable operations; the same arguments, checked."""

    def form(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _chunked(*tensors, chunk=chunk)  # type: ignore[arg-type]

    return _spread(form, q, k, v, log_decay, initial_state, bounds)


def _wants_plain(q: Tensor, log_decay: Tensor | None) -> bool:
    return (
        q.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (log_decay is not None and log_decay.requires_grad)
    )


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse queries, keys and values that do not fit each other.

    Raises:
        ZooError: Names the first that does not.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or not x.is_floating_point():
            raise ZooError(
                f"{name} of shape {tuple(x.shape)} and type {x.dtype}; allowed: floating point "
                "of shape (batch, heads, tokens, width)"
            )
        if x.device != q.device:
            raise ZooError(f"{name} is on {x.device}; allowed: {q.device}, where q is")
    (samples, heads, length, width), groups = q.shape, k.shape[1]
    if (k.shape[0], *k.shape[2:]) != (samples, length, width):
        raise ZooError(
            f"k of shape {tuple(k.shape)} does not fit q of shape {tuple(q.shape)}; allowed: "
            f"({samples}, groups, {length}, {width})"
        )
    if tuple(v.shape[:3]) != (samples, groups, length):
        raise ZooError(
            f"v of shape {tuple(v.shape)} does not fit k of shape {tuple(k.shape)}; allowed: "
            f"({samples}, {groups}, {length}, width)"
        )
    if groups < 1 or heads % groups:
        raise ZooError(f"k has {groups} heads, which must divide the {heads} heads of q")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    widening: int = 1,
) -> list[int] | None:
    """Refuse what does not fit; the bounds of packed sequences as numbers."""
    check_operands(q, k, v)
    samples, heads, length, width = q.shape
    if log_decay is not None:
        if tuple(log_decay.shape) != (heads,):
            raise ZooError(
                f"log_decay of shape {tuple(log_decay.shape)} must be a number for each head, "
                f"({heads},)"
            )
        # A look at the numbers waits for a GPU, and a compiler has none to look at.
        known = log_decay.device.type == "cpu" and not _wants_plain(q, None)
        if known and not bool((log_decay <= 0).all()):
            raise ZooError(f"log_decay={log_decay.tolist()!r} must be at most 0")
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, samples, length)
    if state is not None:
        wanted = (
            samples if bounds is None else len(bounds) - 1,
            heads,
            width * widening,
            v.shape[3],
        )
        if state.device != q.device:
            raise ZooError(f"initial_state is on {state.device}; allowed: {q.device}, where q is")
        if tuple(state.shape) != wanted or not state.is_floating_point():
            raise ZooError(
                f"initial_state of shape {tuple(state.shape)} and type {state.dtype}; allowed: "
                f"floating point of shape {wanted} (batch, heads, key width, value width)"
            )
    return bounds


def _bounds(cu_seqlens: Tensor, samples: int, length: int) -> list[int]:
    """Bounds of packed sequences as numbers."""
    if torch.compiler.is_compiling():
        raise ZooError("cu_seqlens: packed sequences are cut by their numbers; do not compile them")
    check_cu_seqlens(cu_seqlens, length)
    if samples != 1:
        raise ZooError(f"cu_seqlens given with a batch of {samples}; packed sequences have batch 1")
    bounds: list[int] = cu_seqlens.tolist()
    return bounds


def _spread(
    form: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Run a form in enough precision, with a key head for each query head, on each sequence."""
    dtype, heads = v.dtype, q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), repeat_heads(k.to(wide), heads), repeat_heads(v.to(wide), heads)
    state = None if state is None else state.to(wide)
    if log_decay is not None:
        log_decay = log_decay.to(q.device, wide).clamp_min(STEEPEST)
    with full_precision(q):
        if bounds is None:
            out, state = form(q, k, v, log_decay, state)
            return out.to(dtype), state
        sizes = [b - a for a, b in pairwise(bounds)]
        outs, states = [], []
        for i, (a, b, c) in enumerate(zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True)):
            before = None if state is None else state[i : i + 1]
            out, after = (form if a.shape[2] else _parallel)(a, b, c, log_decay, before)
            outs.append(out)
            states.append(after)
    return torch.cat(outs, 2).to(dtype), torch.cat(states)


def _powers(log_decay: Tensor, exponents: Tensor) -> Tensor:
    """lambda_h to the exponents (..), as (H, ..)."""
    return (log_decay.view(-1, *[1] * exponents.ndim) * exponents).exp()


def _final_state(k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> Tensor:
    length = k.shape[2]
    if log_decay is not None:
        ages = torch.arange(length - 1, -1, -1, device=k.device)
        k = k * _powers(log_decay, ages)[..., None]
        state = None if state is None else state * (length * log_decay).exp()[:, None, None]
    total = k.mT @ v
    return total if state is None else total + state


def _parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    at = torch.arange(q.shape[2], device=q.device)
    weights = q @ k.mT
    if log_decay is not None:
        weights = weights * _powers(log_decay, (at[:, None] - at).clamp_min(0))
    out = weights.tril() @ v
    if state is not None:
        reach = q if log_decay is None else q * _powers(log_decay, at + 1)[..., None]
        out = out + reach @ state
    return out, _final_state(k, v, log_decay, state)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    decay = None if log_decay is None else log_decay.exp()[:, None, None]
    outs = [v[:, :, :0]]
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        state = state if decay is None else state * decay
        state = state + k[:, :, now].mT * v[:, :, now]
        outs.append(q[:, :, now] @ state)
    return torch.cat(outs, 2), state


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    after = _final_state(k, v, log_decay, state)
    short = -length % chunk  # zeros at the end are seen by nobody
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    at = torch.arange(chunk, device=q.device)
    weights, reach, lasting = q @ k.mT, q, k  # (B, H, n, C, ..)
    step = None
    if log_decay is not None:
        weights = weights * _powers(log_decay, (at[:, None] - at).clamp_min(0))[:, None]
        reach = q * _powers(log_decay, at + 1)[:, None, :, None]
        lasting = k * _powers(log_decay, chunk - 1 - at)[:, None, :, None]
        step = chunk * log_decay
    before = _states_before(lasting.mT @ v, step, state)
    out = weights.tril() @ v + reach @ before
    return out.flatten(2, 3)[:, :, :length], after


def _states_before(added: Tensor, step: Tensor | None, state: Tensor | None) -> Tensor:
    """States before each chunk (B, H, n, D, E), from what the chunks add and their decay (H,).

    One product with the triangle of all n x n decays would be quadratic in n, so it joins groups
    of chunks first, and then the groups.
    """
    chunks = added.shape[2]
    if step is None:
        total = added.cumsum(2) - added
        return total if state is None else total + state[:, :, None]
    width = added.shape[4]
    short = -chunks % GROUP
    parts = F.pad(added.flatten(3), (0, 0, 0, short)).unflatten(2, (-1, GROUP))
    at = torch.arange(GROUP, device=added.device)
    inside = _triangle(step, at)[:, None] @ parts  # (B, H, n / GROUP, GROUP, D E)
    whole = (_powers(step, GROUP - 1 - at)[:, None, None] @ parts).squeeze(3)
    groups = torch.arange(parts.shape[2], device=added.device)
    carried = _triangle(GROUP * step, groups) @ whole
    if state is not None:
        carried = carried + _powers(GROUP * step, groups)[..., None] * state.flatten(2)[:, :, None]
    found = inside + _powers(step, at)[:, None, :, None] * carried[:, :, :, None]
    return found.flatten(2, 3)[:, :, :chunks].unflatten(3, (-1, width))


def _triangle(step: Tensor, at: Tensor) -> Tensor:
    """Decay from the end of item j to the start of item i > j, else zero: (H, n, n)."""
    return _powers(step, (at[:, None] - 1 - at).clamp_min(0)).tril(-1)
