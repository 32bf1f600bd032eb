"""TransNormerLLM (Qin et al., 2024): the language model that lightning attention was made for.

    x <- x + GLA(SRMSNorm(x)),  x <- x + SGLU(SRMSNorm(x))
    SRMSNorm(x) = x / (||x||_2 / sqrt(C))                      no weight
    SGLU(x)     = ((x W_v) * (x W_u)) W_o                      no activation: the gate is enough

GLA is the `lightning` part with its gate ("gated linear attention", the gate being on the output).
Embeddings are tied to the output layer, nothing has a bias, there are no positions beside decay
and LRPE, and all weights start normal with standard deviation 0.02, as in the author's small model
(nanoTransNormer), which turns LRPE on in every layer but the first:
``TransNormer(..., attention="lightning(lrpe=True)", layers={"first": "lightning(lrpe=False)"})``.

Legend: B batch, N length, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.attend.lightning import EPS, srms_norm
from zoo.models import model
from zoo.models._blocks import SGLU, Block
from zoo.models.language.decoder_lm import DecoderLM

STD = 0.02


class SRMSNorm(nn.Module):
    """Division by the root mean square along the channels, without a weight.

    Args:
        eps: Added to the mean square.
    """

    def __init__(self, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(.., C) to (.., C)."""
        return srms_norm(x, self.eps)


@model("transnormer", causal=True)
class TransNormer(DecoderLM):
    """Causal language model of TNL blocks; it decodes and generates as `DecoderLM` does.

    Args:
        vocab_size: Tokens V.
        dim: Channels C.
        depth: Layers L.
        heads: Heads of each layer.
        attention: Specification of the layers, or a mapping as in `zoo.host.spec.layout`.
        layers: Layout of layers: first, last, every, other.
        max_len: Length that the model is made for; parts that depend on a length go by it.
        mlp: Width of the SGLU over `dim`.
        dropout: On residual branches, embeddings and attention weights.
        kv_heads: Key/value heads, None for the projection's default.
        head_dim: Width of a head, None for ``dim // heads``.
        tie: Output layer shares the embedding, where it gives logits.
        num_outputs: Numbers to give at every position in place of logits, for regression.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A size does not fit, or a name or option is unknown.
        CompatibilityError: Parts that cannot work together or cannot be causal.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        attention: str | Mapping[str, Any] = "lightning",
        layers: Mapping[str, Any] | None = None,
        max_len: int = 1024,
        mlp: float = 2.0,
        dropout: float = 0.0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        tie: bool = True,
        num_outputs: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.number("mlp", mlp, above=0)
        super().__init__(
            vocab_size,
            dim=dim,
            depth=depth,
            heads=heads,
            attention=attention,
            layers=layers,
            position="none",
            max_len=max_len,
            mlp=0,
            dropout=dropout,
            kv_heads=kv_heads,
            head_dim=head_dim,
            tie=tie,
            num_outputs=num_outputs,
            device=device,
            dtype=dtype,
        )
        hidden = max(1, round(mlp * dim))
        mixers = [block.attn for block in self.blocks]
        self.blocks = nn.ModuleList(
            Block(mixer, SRMSNorm, mlp=SGLU(dim, hidden, device, dtype), dropout=dropout)  # type: ignore[arg-type]
            for mixer in mixers
        )
        self.norm = SRMSNorm()
        self.init_weights()

    def weight_std(self, name: str, module: nn.Linear | nn.Embedding) -> float:
        """Return 0.02 for all weights."""
        return STD
