"""Learned absolute positions (Gehring et al. 2017; Vaswani et al. 2017, section 3.5).

    x_t <- x_t + E[t],    E (max_len, C), t = 0 .. max_len - 1

One table per model, added to the embeddings below the first layer; attention itself is unchanged.
Parameters max_len * C, cost N * C. There is no row for a position of max_len or more, so that a
longer sequence is an error and not a guess. Rows start from a normal distribution of standard
deviation 0.02, as in GPT-2 and BERT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.parts import Position
from zoo.registry import Paper, Taxonomy, Traits, register


def learned_reference(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Add one row of the table to each token, one token at a time.

    Args:
        x: Embeddings, (B, N, C).
        table: (max_len, C).
        positions: (N,) or (B, N).
    """
    rows = positions.expand(x.shape[:2]).tolist()
    return torch.stack([torch.stack([table[t] for t in sample]) for sample in rows]) + x


@register(
    "learned",
    kind="position",
    paper=Paper("Convolutional Sequence to Sequence Learning", 2017, "1705.03122"),
    traits=Traits(equivariant=False),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="quadratic",
        trainable_params=True,
    ),
    parameters="max_len * dim",
    aliases=("abs",),
)
class Learned(Position):
    """A learned vector for each position, added to the embeddings.

    Args:
        dim: Channels.
        max_len: Rows of the table.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: `max_len` is missing or not a whole number of at least 1.
    """

    embeds = True
    special_init = True

    def __init__(
        self,
        dim: int,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_len is None:
            raise ZooError(
                "max_len=None: 'learned' has a row for each position and must know how many; "
                "give max_len, or use 'sinusoidal', which has no table"
            )
        self.max_len = max_len = checks.whole("max_len", max_len)
        self.table = nn.Embedding(max_len, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows from a normal distribution of standard deviation 0.02."""
        nn.init.normal_(self.table.weight, std=0.02)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add the rows of positions (N,) or (B, N) to embeddings (B, N, C).

        Raises:
            ZooError: A position is negative or has no row.
        """
        # Looking at values cannot be compiled; there the lookup itself checks its bounds.
        if not torch.compiler.is_compiling() and not positions.is_meta and positions.numel():
            low, high = (int(end) for end in positions.aminmax())
            if low < 0 or high >= self.max_len:
                raise ZooError(
                    f"position {low if low < 0 else high} has no row in 'learned'; "
                    f"allowed: 0 to {self.max_len - 1} (max_len={self.max_len})"
                )
        return x + self.table(positions).to(x.dtype)

    def extra_repr(self) -> str:
        """Size of the table."""
        return f"max_len={self.max_len}"
