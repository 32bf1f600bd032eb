"""Lightning attention as a function, by each of its forms and back-ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError
from zoo.kernels import refuse
from zoo.ops.linear import (
    CHUNK,
    check_operands,
    chunked_linear_attention,
    parallel_linear_attention,
    recurrent_linear_attention,
)

# Widest keys that the Triton kernel takes.
KERNEL_WIDTH = 128
FORMS = {
    "chunk": chunked_linear_attention,
    "parallel": parallel_linear_attention,
    "recurrent": recurrent_linear_attention,
}


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | Sequence[float] | float | None = None,
    mode: str = "chunk",
    chunk: int = CHUNK,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention with the decay exp(-slope) per step and head.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D), G dividing H.
        v: (B, G, N, E).
        slope: A number of at least 0 for each head, (H,) or (H, 1, 1), or one for all; None for
            no decay. Constants, without gradient.
        mode: "chunk", "parallel" (all N x N products) or "recurrent" (token by token).
        chunk: Tokens of a chunk; no result depends on it.
        initial_state: State before the first token, (B, H, D, E), at least float32.
        return_state: Return the last state as well.
        cu_seqlens: Bounds of sequences packed into the one sample, (S + 1,) integers; states are
            (S, H, D, E) then.
        backend: Who computes mode "chunk": "auto" (Triton on CUDA where it can, else PyTorch),
            "torch", "triton", or "reference" (the parallel form).

    Returns:
        (B, H, N, E) in the type of v; with `return_state` also the state.

    Raises:
        ZooError: An unknown mode or backend, shapes that do not fit, a slope below 0, a state in
            half precision, or a kernel that was asked for and cannot run.
    """
    checks.choice("mode", mode, FORMS)
    chunk = checks.whole("chunk", chunk)
    checks.choice("backend", backend, ("auto", "torch", "triton", "reference"))
    if mode != "chunk" and backend == "triton":
        raise ZooError(f"backend='triton' computes mode='chunk' only, not mode={mode!r}")
    if initial_state is not None and initial_state.dtype not in (torch.float32, torch.float64):
        raise ZooError(
            f"initial_state has dtype {initial_state.dtype}; allowed: torch.float32, torch.float64"
        )
    check_operands(q, k, v)
    decay = None if slope is None else -_slopes(slope, q)
    if mode == "chunk" and backend in ("auto", "triton"):
        by_name = backend == "triton"
        reason = refuse_kernel(q, k, v, width=q.shape[-1], by_name=by_name)
        if reason and by_name:
            raise ZooError(f"backend='triton' cannot take this: {reason}")
        backend = "torch" if reason else "triton"
    options: dict[str, Any] = {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    if backend == "triton":
        out, state = run_kernel(q, k, v, decay, **options)
    elif mode == "chunk" and backend == "torch":
        out, state = chunked_linear_attention(q, k, v, decay, chunk=chunk, **options)
    else:
        form = FORMS["parallel" if mode == "chunk" else mode]
        out, state = form(q, k, v, decay, **options)
    return (out, state) if return_state else out


def _slopes(slope: Tensor | Sequence[float] | float, q: Tensor) -> Tensor:
    """Slopes as (H,) constants, checked."""
    wide = torch.promote_types(q.dtype, torch.float32)
    try:
        found = torch.as_tensor(slope, device=q.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ZooError(f"slope={slope!r} must be a number, or one for each head") from error
    if found.is_complex() or found.dtype == torch.bool:
        raise ZooError(f"slope has dtype {found.dtype}; allowed: real numbers of at least 0")
    found = found.to(wide)
    heads = q.shape[1]
    shape = tuple(found.shape)
    if shape not in ((), (1,), (heads,), (heads, 1, 1), (1, heads, 1, 1)):
        raise ZooError(
            f"slope of shape {shape} does not fit {heads} heads; allowed: (), ({heads},), "
            f"({heads}, 1, 1), (1, {heads}, 1, 1)"
        )
    if not torch.compiler.is_compiling() and not bool((found >= 0).all()):
        raise ZooError(f"slope={found.flatten().tolist()!r} must be at least 0: decay exp(-slope)")
    return found.flatten().expand(heads)


def refuse_kernel(*tensors: Tensor, width: int, by_name: bool) -> str | None:
    """Why the Triton kernel cannot take these, whose keys are `width` wide with their positions."""
    reason = refuse(*tensors, head_dim=KERNEL_WIDTH, by_name=by_name)
    if reason is None and width > KERNEL_WIDTH:
        return f"keys are {width} wide with their positions, above {KERNEL_WIDTH}"
    if reason is None and torch._C._are_functorch_transforms_active():
        return "torch.func cannot look into the kernel"
    return reason


def run_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A form of linear attention like the others: outputs and last states by the kernel."""
    from zoo.kernels.linear import linear_attention

    decay = None if log_decay is None else log_decay.float()
    before = None if initial_state is None else initial_state.float()
    out, state = linear_attention(q, k, v, decay, before, cu_seqlens)
    return out, state
