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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.attend._lightning_form import FORMS as FORMS
from zoo.attend._lightning_form import lightning_attention as lightning_attention
from zoo.attend._lightning_form import refuse_kernel, run_kernel
from zoo.attend._lightning_parts import EPS, decay_slopes
from zoo.attend._lightning_parts import srms_norm as srms_norm
from zoo.attend._norm_gate import NORMS, norm_gate
from zoo.ops._linear_features import ACTIVATIONS, Features
from zoo.ops._linear_features import lrpe as lrpe
from zoo.ops.linear import (
    chunked_linear_attention,
    parallel_linear_attention,
    recurrent_linear_attention,
)
from zoo.ops.slopes import alibi_slopes as alibi_slopes
from zoo.parts import Attend, Call, Host, Layout, Route, share_groups
from zoo.registry import Paper, Taxonomy, Traits, register

GATES = ("u", "low_rank", "none")
VARIANTS: dict[str, dict[str, Any]] = {
    "tnl": {"norm": "srms", "gate": "u", "value_act": False},
    "tnl3": {"norm": "layer", "gate": "low_rank", "value_act": True},
}
Form = Callable[..., tuple[Tensor, Tensor]]


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
        checks.choice("variant", variant, VARIANTS)
        preset = VARIANTS[variant]
        norm = preset["norm"] if norm is None else norm
        gate = preset["gate"] if gate is None else gate
        for name, given, allowed in (
            ("act", act, tuple(ACTIVATIONS)),
            ("norm", norm, NORMS),
            ("gate", gate, GATES),
        ):
            checks.choice(name, given, allowed)
        for name, switch in (("lrpe", lrpe), ("value_act", value_act)):
            checks.optional(checks.flag)(name, switch)
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

    def incompatible(self, host: Host) -> str | None:
        """A scale, which there is none to change."""
        if host.scale != host.layout.qk_dim**-0.5:
            return f"'lightning' does not scale dot products; leave out scale={host.scale!r}"
        return None

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """The gate, (B, N, H E)."""
        if self.gate is None:
            return {}
        return {"gate": self.gate(call.x)}

    def forward(self, call: Call) -> Tensor:
        """Outputs of the heads, normed and gated, (B, H, N, v_dim)."""
        return self.mix(call, chunked_linear_attention, fused=True)

    def mix(self, call: Call, form: Form, fused: bool = False) -> Tensor:
        """The same by any form of linear attention.

        Args:
            call: The pass.
            form: Which form.
            fused: It can do activation and LRPE itself, under the name of `features`.
        """
        q, k, v = self._operands(call)
        if q.dtype == torch.float16:
            # The sums grow with N beyond what float16 holds; only the norm brings them back.
            q, k, v = q.float(), k.float(), v.float()
        features = Features(self.act, self.theta, call.q_pos)
        options: dict[str, Any] = {}
        # An activation alone is as quick outside of the segments, where it is computed once.
        if fused and self.theta is not None:
            options["features"] = features
        else:
            q, k, v = features.apply(q, k, v)
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
        gate = None if self.gate is None else call.prepared[self.kind]["gate"]
        y = norm_gate(
            y.flatten(2),
            gate if gate is None else gate.to(y.dtype),
            self.norm_kind,
            getattr(self.norm, "weight", None),
            getattr(self.norm, "bias", None),
            eps=getattr(self.norm, "eps", EPS),
            sigmoid=self.gate_kind == "low_rank",
        )
        if self.norm_kind == "layer":
            # The bias of the norm must not speak for a token that has seen nothing.
            seen = self._seen(call)
            y = y if seen is None else y.masked_fill(~seen[..., None], 0.0)
        return y.view(shape).transpose(1, 2).to(call.v.dtype)

    def _operands(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as they enter the features; where v is zero, k adds nothing."""
        k, v = share_groups(call.k, call.v)
        if self.value_act:
            v = ACTIVATIONS[self.act](v)
        if call.mask is not None:
            hidden = ~call.mask[:, 0, 0, :, None].unsqueeze(1)
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        if call.dropout:
            v = v * F.dropout(v.new_ones(*v.shape[:3], 1), call.dropout)
        return call.q, k, v

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
        if call.cache is not None and call.q.shape[2]:
            last = call.q.new_ones(len(call.q), 1, dtype=torch.bool)
            call.cache.set_state("lightning_seen", last if seen is None else seen[:, -1:])
        return seen

    def routes(self) -> tuple[Route, ...]:
        """The kernel; the official N x N form and the recurrence where they are asked for."""
        return (
            Route("lightning_triton", _refuse_triton, _runs(run_kernel), packed=True),
            Route("reference", _always, _runs(parallel_linear_attention), auto=False, packed=True),
            Route("recurrent", _always, _runs(recurrent_linear_attention), auto=False, packed=True),
        )


def _always(host: Host, call: Call) -> str | None:
    return None


def _refuse_triton(host: Host, call: Call) -> str | None:
    part = host.attend
    assert isinstance(part, Lightning)
    width = call.q.shape[-1] * (1 if part.theta is None else 2)
    by_name = host.route == "lightning_triton"
    return refuse_kernel(call.q, call.k, call.v, width=width, by_name=by_name)


def _runs(form: Form) -> Callable[[Host, Call], Tensor]:
    def run(host: Host, call: Call) -> Tensor:
        part = host.attend
        assert isinstance(part, Lightning)
        return part.mix(call, form)

    return run
