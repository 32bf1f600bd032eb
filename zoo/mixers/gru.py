"""Gated recurrent unit (Cho et al. 2014): a recurrent network where attention would stand.

    r_t = sigmoid(W_r x_t + U_r h_{t-1})              reset gate, (B, C)
    z_t = sigmoid(W_z x_t + U_z h_{t-1})              update gate
    n_t = tanh(W_n x_t + r_t * (U_n h_{t-1}))         candidate
    h_t = (1 - z_t) * n_t + z_t * h_{t-1},   y_t = W_O h_t,   h_0 = 0

The ceiling for state tracking: the state depends on the past in a non-linear way, which neither
attention nor linear recurrences can do in one layer. It is causal by nature and as slow as the
sequence is long: cost N C^2 in N dependent steps. Parameters 6 C^2 + C^2 (+ 6 C + C with biases),
state C numbers. In the paper the reset gate acts on h before U_n; `torch.nn.GRU`, which does the
work here, follows cuDNN, where it acts after.

Hidden tokens are skipped, wherever they are: the state passes over them unchanged, and such a
token's own output is that of the last token before it that is not hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.errors import CompatibilityError
from zoo.mixers._base import Mixer
from zoo.registry import Paper, Taxonomy, Traits, register


def gru_reference(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """States of a GRU without biases, step by step.

    Args:
        x: (B, N, C).
        w: W_r, W_z and W_n above one another, (3 C, C).
        u: U_r, U_z and U_n above one another, (3 C, C).

    Returns:
        (B, N, C).
    """
    h, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        from_x, from_h = (x[:, t] @ w.T).chunk(3, -1), (h @ u.T).chunk(3, -1)
        r = torch.sigmoid(from_x[0] + from_h[0])
        z = torch.sigmoid(from_x[1] + from_h[1])
        n = torch.tanh(from_x[2] + r * from_h[2])
        h = (1 - z) * n + z * h
        states.append(h)
    return torch.stack(states, 1)


@register(
    "gru",
    kind="mixer",
    paper=Paper(
        "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine "
        "Translation",
        2014,
        "1406.1078",
    ),
    traits=Traits(
        bidirectional=False,
        cross=False,
        mask="keys",
        bias=False,
        weights=False,
        grouped=False,
        equivariant=False,
        compile=False,
        cost="N * D * D",
    ),
    taxonomy=Taxonomy(
        sequences="none",
        levels="single",
        positions="global",
        representations="single",
        alignment="none",
        distribution="none",
        complexity="linear",
        trainable_params=True,
    ),
    parameters="7 * dim ** 2 + 7 * dim * bias",
    notes="torch.compile does not take torch.nn.GRU into a whole graph",
)
class GRU(Mixer):
    """A recurrent layer of `dim` units with an output projection.

    Args:
        dim: Channels C, also the size of the state.
        heads: Of no effect on a recurrent layer; must divide `dim` as everywhere.
        causal: Must be True.
        bias: Biases in the gates and the projection.
        dropout: On the states that leave the layer, in training.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A size does not fit.
        CompatibilityError: `causal` is False.
    """

    name = "gru"

    def make_layers(self, made: dict[str, Any]) -> None:
        """The recurrent layer and the output projection."""
        if not self.causal:
            raise CompatibilityError(
                "'gru' is defined for causal mixing only: it reads from left to right; "
                "pass causal=True"
            )
        self.gru = nn.GRU(self.dim, self.dim, batch_first=True, **made)
        self.proj = nn.Linear(self.dim, self.dim, **made)

    def mix(self, x: Tensor, seen: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Read the tokens in the order of the sequence, from the state that the cache keeps."""
        state = cache.get_state("gru") if cache is not None else None
        if state is None:
            state = x.new_zeros(x.shape[0], self.dim)
        h = self._states(x, state) if seen is None else self._skip(x, state, seen)
        if cache is not None:
            cache.set_state("gru", h[:, -1])
        return self.proj(F.dropout(h, self.dropout, self.training))

    def _states(self, x: Tensor, state: Tensor) -> Tensor:
        return self.gru(x, state[None].contiguous())[0]

    def _skip(self, x: Tensor, state: Tensor, seen: Tensor) -> Tensor:
        """States (B, N, C) when only the tokens at `seen` (B, N) are read."""
        # Move them to the front, read, and give each place the state after the tokens up to it.
        order = (~seen).to(torch.uint8).argsort(dim=1, stable=True)
        x = x.gather(1, order[..., None].expand_as(x))
        h = torch.cat([state[:, None], self._states(x, state)], 1)
        return h.gather(1, seen.cumsum(1)[..., None].expand_as(x))
