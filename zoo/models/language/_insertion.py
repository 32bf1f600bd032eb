"""Tokens that a model puts between the user's own: the landmarks of landmark attention.

After every `every` ordinary tokens the layers see one more, with a learned embedding of its own.
It is put in when the next ordinary token comes, so that the number of tokens in a cache says where
a sequence stands; its outputs are dropped, and the last token of a block predicts the first of the
next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.parts import Part


class Insertion(nn.Module):
    """A token of the model's own after every so many ordinary ones.

    Args:
        every: Ordinary tokens between two inserted ones.
        dim: Channels C.
        made: Device and type of the embedding.
    """

    def __init__(self, every: int, dim: int, made: dict[str, Any]) -> None:
        super().__init__()
        self.every = every
        self.embedding = nn.Embedding(1, dim, **made)

    def total(self, ordinary: int) -> int:
        """Tokens in all when this many ordinary ones have been seen."""
        return ordinary + (ordinary - 1) // self.every if ordinary else 0

    def ordinary(self, total: int) -> int:
        """Ordinary tokens among the first `total`."""
        return total - total // (self.every + 1)

    def forward(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Put tokens between those of x.

        Args:
            x: Embeddings of ordinary tokens, (B, N, C).
            start: Tokens before them, inserted ones included.

        Returns:
            (B, N', C), and where among them the tokens of x are, (N,).
        """
        seen = self.ordinary(start)
        index = self._places(seen, seen + x.shape[1], x.device) - start
        length = self.total(seen + x.shape[1]) - start if x.shape[1] else 0
        full = self.embedding.weight.to(x.dtype).expand(x.shape[0], length, -1)
        return full.index_copy(1, index, x), index

    def _places(self, first: int, last: int, device: torch.device) -> Tensor:
        order = torch.arange(first, last, device=device)
        return order + order // self.every

    def mask(self, mask: Tensor) -> Tensor:
        """Let a mask of ordinary tokens (B, 1, 1, M) know of those put between them.

        What is inserted stays visible; layers hide it with its block.

        Raises:
            ZooError: The mask is one of pairs or heads, or hides tokens before visible ones.
        """
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
            raise ZooError(
                f"mask of shape {tuple(mask.shape)}: a model that inserts tokens after every "
                f"{self.every} takes (batch, 1, 1, keys) only"
            )
        if not torch.compiler.is_compiling() and bool((mask[..., 1:] > mask[..., :-1]).any()):
            raise ZooError(
                "mask hides tokens before visible ones (padding on the left): a model that inserts "
                f"tokens after every {self.every} counts them from the first; pad on the right"
            )
        keys = mask.shape[-1]
        full = mask.new_ones(*mask.shape[:3], self.total(keys))
        full[..., self._places(0, keys, mask.device)] = mask
        return full


def inserting(layers: Iterable[nn.Module]) -> Part:
    """Return the first part for which tokens are inserted.

    Args:
        layers: The layers, at least one of which has such a part.
    """
    modules = (m for layer in layers for m in layer.modules())
    return next(m for m in modules if isinstance(m, Part) and m.insert_every is not None)
