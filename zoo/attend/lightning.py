"""Lightning attention and the gated mixer of TransNormerLLM around it (Qin et al., 2024).

    S_t = lambda_h S_(t-1) + k_t v_t^T,   o_t = q_t S_t       state S (B, H, D, E), lambda in (0, 1]
    q = act(x W_q),  k = act(x W_k),  v = x W_v
    y = norm(concat_h o) * (x W_u)        norm over all heads at once, then the output projection

that is ((q k^T) * M) v with M_tj = lambda^(t-j) for j <= t: linear attention that forgets, with
neither a scale (a `scale` is refused) nor a denominator. The norm behind it is what keeps the sums
in bounds. Computed in chunks, quadratic inside and through the state between them: N D (C + D) per
head, a state of fixed size for decoding. The decays are constants and not learned, since the paper
met NaN otherwise.

Decays by `decay`, for head h and layer l of L (the host's `depth` and `layers`; where a model has
one layer, or nobody says how many, the factor of the layer is 1):

    "alibi"   s_h (1 - l / (L - 1) + 1e-5), s_h the slopes of ALiBi, lambda = exp(-slope): the code
    "paper"   (8 h / H) (1 - l / L), h from 1 and l from 0 (the paper does not say where they start;
              so no head and no layer forgets nothing)
    "fla"     the same with h from 0, as flash-linear-attention has it: head 0 keeps everything

LRPE-d (`lrpe`) makes the score sum_i q_i k_i cos(theta_i (t - j)) lambda^(t-j): q and k become
[x cos(theta t), x sin(theta t)] after the activation, twice as wide, theta (H, D) learned from
10000^(-2 i / (H D)), i counting through all heads. The paper uses it in the first layer only.

Variants. "tnl" is the paper's. "tnl3" is the example module of the code, a later one: SiLU on v
too, LayerNorm with weight and bias, and the gate sigmoid(W_2 W_1 x) of inner width E.

Where official code differs: the author's small model turns LRPE on in all layers *but* the first,
against its own comment, and keeps the position on the module, so that a second prompt decodes
wrongly (here it comes with the call); one layer divides by zero. Hidden keys get k = v = 0, and
decay goes on over them. Dropout takes keys out of the sums, each for all later queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError, unknown
from zoo.kernels import refuse
from zoo.linear_core import (
    CHUNK,
    chunked_linear_attention,
    parallel_linear_attention,
    recurrent_linear_attention,
)
from zoo.parts import Attend, Call, Layout, repeat_heads
from zoo.position.alibi import alibi_slopes
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.routes import Route

if TYPE_CHECKING:
    from zoo.attention import Attention

EPS = 1e-6
# Widest keys that the Triton kernel takes.
KERNEL_WIDTH = 128
FORMS = {
    "chunk": chunked_linear_attention,
    "parallel": parallel_linear_attention,
    "recurrent": recurrent_linear_attention,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "none": lambda x: x,
}
NORMS = ("srms", "rms", "layer", "none")
GATES = ("u", "low_rank", "none")
VARIANTS: dict[str, dict[str, Any]] = {
    "tnl": {"norm": "srms", "gate": "u", "value_act": False},
    "tnl3": {"norm": "layer", "gate": "low_rank", "value_act": True},
}
Form = Callable[..., tuple[Tensor, Tensor]]


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
    if mode not in FORMS:
        raise unknown("mode", mode, FORMS)
    if type(chunk) is not int or chunk < 1:
        raise ZooError(f"chunk={chunk!r} must be a whole number of at least 1")
    if backend not in ("auto", "torch", "triton", "reference"):
        raise unknown("backend", backend, ("auto", "torch", "triton", "reference"))
    if mode != "chunk" and backend == "triton":
        raise ZooError(f"backend='triton' computes mode='chunk' only, not mode={mode!r}")
    if initial_state is not None and initial_state.dtype not in (torch.float32, torch.float64):
        raise ZooError(
            f"initial_state has dtype {initial_state.dtype}; allowed: torch.float32, torch.float64"
        )
    decay = None if slope is None else -_slopes(slope, q)
    if mode == "chunk" and backend in ("auto", "triton"):
        by_name = backend == "triton"
        reason = _refuse_kernel(q, k, v, width=q.shape[-1], by_name=by_name)
        if reason and by_name:
            raise ZooError(f"backend='triton' cannot take this: {reason}")
        backend = "torch" if reason else "triton"
    options: dict[str, Any] = {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    if backend == "triton":
        out, state = _kernel(q, k, v, decay, **options)
    elif mode == "chunk" and backend == "torch":
        out, state = chunked_linear_attention(q, k, v, decay, chunk=chunk, **options)
    else:
        form = FORMS["parallel" if mode == "chunk" else mode]
        out, state = form(q, k, v, decay, **options)
    return (out, state) if return_state else out


def _slopes(slope: Tensor | Sequence[float] | float, q: Tensor) -> Tensor:
    """Slopes as (H,) constants, checked."""
    wide = torch.promote_types(q.dtype, torch.float32)
    found = torch.as_tensor(slope, device=q.device).detach().to(wide)
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


def _refuse_kernel(*tensors: Tensor, width: int, by_name: bool) -> str | None:
    reason = refuse(*tensors, head_dim=KERNEL_WIDTH, by_name=by_name)
    if reason is None and width > KERNEL_WIDTH:
        return f"keys are {width} wide with their positions, above {KERNEL_WIDTH}"
    if reason is None and torch._C._are_functorch_transforms_active():
        return "torch.func cannot look into the kernel"
    return reason


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from zoo.kernels.linear import linear_attention

    decay = None if log_decay is None else log_decay.float()
    out, state = linear_attention(q, k, v, decay, initial_state, cu_seqlens)
    return out, state


def srms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """Divide by the root mean square along the last axis, in float32 at least; no weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)


def lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """[x cos(theta t), x sin(theta t)], (B, H, N, 2 D), in float32 at least.

    Products of two of these are sum_i q_i k_i cos(theta_i (t - j)).

    Args:
        x: (B, H, N, D).
        theta: Angle per step of each channel, (H, D).
        positions: (N,) or (B, N) integers.

    Raises:
        ZooError: Positions that are no integers.
    """
    return _turn(x, *_tables(theta, positions, x.dtype))


def _tables(theta: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all angles, (.., H, N, D)."""
    if positions.is_floating_point():
        raise ZooError(f"positions have dtype {positions.dtype}; lrpe counts in whole steps")
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[..., None, :, None] * theta.to(wide)[:, None]
    return angles.cos(), angles.sin()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([x * cos, x * sin], -1)  # as precise as the tables


def decay_slopes(
    decay: str | float | Sequence[float] | None, heads: int, depth: int, layers: int | None
) -> tuple[float, ...] | None:
    """Slope of each head, lambda = exp(-slope), or None for no decay.

    Args:
        decay: "alibi", "paper", "fla", one decay in (0, 1] or one for each head, or None.
        heads: Heads H.
        depth: Index of the layer, from 0.
        layers: Number of layers, or None where nobody knows.

    Raises:
        ZooError: An unknown name, another number of decays than heads, or one outside (0, 1].
    """
    if decay is None:
        return None
    single = layers is None or layers == 1
    if decay == "alibi":
        factor = 1.0 if single else 1 - depth / (layers - 1) + 1e-5  # type: ignore[operator]
        return tuple(s * factor for s in alibi_slopes(heads, torch.float64).tolist())
    if decay in ("paper", "fla"):
        factor = 1.0 if single else 1 - depth / layers  # type: ignore[operator]
        start = 1 if decay == "paper" else 0
        return tuple(8 * (h + start) / heads * factor for h in range(heads))
    if isinstance(decay, str):
        raise unknown("decay", decay, ("alibi", "paper", "fla"))
    numbers = [decay] * heads if isinstance(decay, int | float) else list(decay)
    if len(numbers) != heads:
        raise ZooError(
            f"decay={decay!r} has {len(numbers)} numbers; allowed: one for each of the "
            f"{heads} heads"
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 1:
            raise ZooError(f"decay={decay!r}: {number!r} is not in (0, 1]")
    return tuple(-math.log(number) for number in numbers)


@register(
    "lightning",
    kind="attend",
    paper=Paper(
        "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        2024,
        "2405.17381",
    ),
    traits=Traits(
        bidirectional=False,
        cross=False,
        mask="keys",
        bias=False,
        weights=False,
        equivariant=False,
        cost="N * D * D",
    ),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="kernel",
        distribution="none_linear",
        complexity="linear",
        modality=("text",),
        trainable_params=True,
    ),
    parameters=(
        "(gate == 'u' or (gate is None and variant == 'tnl')) * (dim + bias) * heads * v_dim"
        " + (gate == 'low_rank' or (gate is None and variant == 'tnl3'))"
        " * ((dim + bias) * v_dim + (v_dim + bias) * heads * v_dim)"
        " + (2 * (norm == 'layer' or (norm is None and variant == 'tnl3')) + (norm == 'rms'))"
        " * heads * v_dim"
        " + (depth == 0 if lrpe is None else lrpe) * heads * qk_dim"
    ),
    aliases=("lightning_attention",),
    notes="the decay and the gate are outside of the taxonomy",
)
class Lightning(Attend):
    """Linear attention that forgets at a constant rate per head, normed and gated.

    Args:
        dim: Channels.
        layout: Head counts and widths.
        depth: Index of the layer.
        layers: Number of layers, or None.
        bias: Biases in the projections of the gate.
        variant: Which norm, gate and activation of v are meant where nothing else is said: "tnl"
            (the paper) or "tnl3" (the example module of its code).
        decay: "alibi" (the code), "paper", "fla", a decay in (0, 1] or a list of one for each
            head, or None for no decay.
        lrpe: Learned rotation of q and k in this layer; None: in the first layer only.
        act: On q and k: "silu", "elu" (1 + elu), "relu" or "none".
        value_act: The same on v, True or False; None as in the variant.
        norm: Over all heads: "srms" (no weight), "rms", "layer" or "none"; None as in the variant.
        gate: "u" (a projection as wide as the heads), "low_rank" (a sigmoid over a bottleneck as
            wide as a head) or "none"; None as in the variant.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: An unknown word, or a decay outside (0, 1].
    """

    def __init__(
        self,
        dim: int,
        layout: Layout,
        depth: int = 0,
        layers: int | None = None,
        bias: bool = False,
        variant: str = "tnl",
        decay: str | float | Sequence[float] | None = "alibi",
        lrpe: bool | None = None,
        act: str = "silu",
        value_act: bool | None = None,
        norm: str | None = None,
        gate: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        preset = VARIANTS[variant]
        norm = preset["norm"] if norm is None else norm
        gate = preset["gate"] if gate is None else gate
        for name, given, allowed in (
            ("act", act, ACTIVATIONS),
            ("norm", norm, NORMS),
            ("gate", gate, GATES),
        ):
            if given not in allowed:
                raise unknown(name, given, allowed)
        for name, switch in (("lrpe", lrpe), ("value_act", value_act)):
            if switch is not None and not isinstance(switch, bool):
                raise ZooError(f"{name}={switch!r} must be True, False or None")
        self.act = act
        self.value_act = preset["value_act"] if value_act is None else value_act
        self.slopes = decay_slopes(decay, layout.score_heads, depth, layers)
        self.gate_kind = gate
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = layout.heads * layout.v_dim
        self.theta: nn.Parameter | None = None
        if depth == 0 if lrpe is None else lrpe:
            shape = (layout.score_heads, layout.qk_dim)
            self.theta = nn.Parameter(torch.empty(shape, **made))
        self.norm: nn.Module | None = None
        if norm == "layer":
            self.norm = nn.LayerNorm(width, **made)
        elif norm == "rms":
            self.norm = nn.RMSNorm(width, eps=EPS, **made)
        self.norm_kind = norm
        self.gate: nn.Module | None = None
        if gate == "u":
            self.gate = nn.Linear(dim, width, bias=bias, **made)
        elif gate == "low_rank":
            self.gate = nn.Sequential(
                nn.Linear(dim, layout.v_dim, bias=bias, **made),
                nn.Linear(layout.v_dim, width, bias=bias, **made),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Angles fall from 1 to nearly 1 / 10000 over the channels of all heads."""
        if self.theta is not None:
            count = self.theta.numel()
            at = torch.arange(count, dtype=torch.float64, device=self.theta.device)
            with torch.no_grad():
                self.theta.copy_((10000 ** (-2 * at / count)).view_as(self.theta))

    def incompatible(self, host: Attention) -> str | None:
        """A scale, which there is none to change."""
        if host.scale != host.layout.qk_dim**-0.5:
            return f"'lightning' does not scale dot products; leave out scale={host.scale!r}"
        return None

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """The gate, (B, N, H E)."""
        if self.gate is None:
            return {}
        gate = self.gate(call.x)
        return {"gate": gate.sigmoid() if self.gate_kind == "low_rank" else gate}

    def forward(self, call: Call) -> Tensor:
        """Outputs of the heads, normed and gated, (B, H, N, v_dim)."""
        return self.mix(call, chunked_linear_attention)

    def mix(self, call: Call, form: Form) -> Tensor:
        """The same by any form of linear attention."""
        q, k, v = self._operands(call)
        options: dict[str, Any] = {}
        cache = call.cache
        if cache is not None:
            options["initial_state"] = cache.get_state("lightning")
        if call.cu_seqlens is not None:
            options["cu_seqlens"] = call.cu_seqlens
        y, state = form(q, k, v, self._log_decay(q), **options)
        if cache is not None:
            cache.set_state("lightning", state)
        y = y.transpose(1, 2)  # (B, N, H, E)
        shape = y.shape
        y = y.flatten(2)
        if self.norm is not None:
            # Under autocast the heads may be half as wide as the weights.
            weight = next(self.norm.parameters())
            y = self.norm(y.to(torch.promote_types(y.dtype, weight.dtype)))
        elif self.norm_kind == "srms":
            y = srms_norm(y)
        if self.gate is not None:
            y = y * call.prepared[self.kind]["gate"]
        if self.norm_kind == "layer":
            # The bias of the norm must not speak for a token that has seen nothing.
            seen = self._seen(call)
            y = y if seen is None else y.masked_fill(~seen[..., None], 0.0)
        return y.view(shape).transpose(1, 2).to(call.v.dtype)

    def _operands(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as they enter the sums."""
        act = ACTIVATIONS[self.act]
        q, k, v = act(call.q), act(call.k), call.v
        if self.value_act:
            v = act(v)
        if self.theta is not None:
            heads = q.shape[1]
            k, v = repeat_heads(k, heads), repeat_heads(v, heads)
            # Queries and keys are the same tokens, so one set of tables does for both.
            tables = _tables(self.theta, call.q_pos, v.dtype)
            q, k = (_turn(x, *tables).to(v.dtype) for x in (q, k))
        if call.mask is not None:
            hidden = ~call.mask[:, 0, 0, :, None].unsqueeze(1)
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        if call.dropout:
            v = v * F.dropout(v.new_ones(*v.shape[:3], 1), call.dropout)
        return q, k, v

    def _log_decay(self, q: Tensor) -> Tensor | None:
        if self.slopes is None:
            return None
        wide = torch.promote_types(q.dtype, torch.float32)
        return -torch.tensor(self.slopes, dtype=wide, device=q.device)

    @staticmethod
    def _seen(call: Call) -> Tensor | None:
        """Whether each token has seen any key, (B, N); None where all have."""
        before = None if call.cache is None else call.cache.get_state("lightning_seen")
        seen = None
        if call.mask is not None:
            count = call.mask[:, 0, 0].expand(call.q.shape[0], -1).cumsum(1)
            if call.documents is not None and call.cu_seqlens is not None:
                starts = call.cu_seqlens.long()[call.documents]
                count = count - F.pad(count, (1, 0))[:, starts]
            seen = count > 0 if before is None else (count > 0) | before
        if call.cache is not None:
            last = call.q.new_ones(len(call.q), 1, dtype=torch.bool)
            call.cache.set_state("lightning_seen", last if seen is None else seen[:, -1:])
        return seen

    def routes(self) -> tuple[Route, ...]:
        """The kernel; the official N x N form and the recurrence where they are asked for."""
        return (
            Route("lightning_triton", _refuse_triton, _runs(_kernel), packed=True),
            Route("reference", _always, _runs(parallel_linear_attention), auto=False, packed=True),
            Route("recurrent", _always, _runs(recurrent_linear_attention), auto=False, packed=True),
        )


def _always(host: Attention, call: Call) -> str | None:
    return None


def _refuse_triton(host: Attention, call: Call) -> str | None:
    part = host.attend
    assert isinstance(part, Lightning)
    width = call.q.shape[-1] * (1 if part.theta is None else 2)
    by_name = host.route == "lightning_triton"
    return _refuse_kernel(call.q, call.k, call.v, width=width, by_name=by_name)


def _runs(form: Form) -> Callable[[Attention, Call], Tensor]:
    def run(host: Attention, call: Call) -> Tensor:
        part = host.attend
        assert isinstance(part, Lightning)
        return part.mix(call, form)

    return run
