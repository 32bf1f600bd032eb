"""A decoder language model whose attention is a specification.

Pre-norm RMSNorm, SwiGLU, tied embeddings (as in LLaMA, Touvron et al. 2023), and optionally a
short causal depthwise convolution before each mixer: recall tasks hinge on it (Arora et al. 2023,
"Zoology"), so it belongs to the host, where it is the same for every mechanism.

Where a part asks for it (`insert_every`: landmarks), the layers see tokens of the model's own
between the others, and a cache counts them; tokens in and logits out are the ordinary ones.

Legend: B batch, N length, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.cache import Cache
from zoo.errors import ZooError
from zoo.host.spec import layout
from zoo.models import model
from zoo.models._blocks import Block, ShortConv, SwiGLU
from zoo.models.language import generation
from zoo.models.language._insertion import Insertion, inserting
from zoo.models.language._mixers import agreed, embedding_position, make_mixers, split_positions
from zoo.parts import tie_layers


@model("decoder_lm", causal=True)
class DecoderLM(nn.Module):
    """Causal language model over any mechanism of the zoo.

    Args:
        vocab_size: Tokens V.
        dim: Channels C.
        depth: Layers.
        heads: Heads of each layer.
        attention: Specification of the layers, or a mapping as in `zoo.host.spec.layout`.
        layers: Layout of layers: first, last, every, other.
        position: Position part for every specification that names none; a part that embeds
            (learned, sinusoidal) is added once, below the first layer.
        max_len: Length that the model is made for, the training length: rows of learned positions,
            and what other parts that depend on a length go by.
        conv: Taps of the short convolution in front of each mixer, 0 for none.
        mlp: Width of the MLP over `dim`, 0 for none; 8/3 makes SwiGLU as large as a plain MLP of 4.
        dropout: On residual branches, embeddings and attention weights.
        kv_heads: Key/value heads, None for the projection's default.
        head_dim: Width of a head, None for ``dim // heads``.
        qk_norm: RMSNorm on q and k.
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
        attention: str | Mapping[str, Any] = "mha",
        layers: Mapping[str, Any] | None = None,
        position: str = "learned",
        max_len: int = 1024,
        conv: int = 0,
        mlp: float = 8 / 3,
        dropout: float = 0.0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        tie: bool = True,
        num_outputs: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.whole("vocab_size", vocab_size)
        checks.optional(checks.whole, "for logits")("num_outputs", num_outputs)
        checks.number("mlp", mlp, 0, also="0 for none")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.vocab_size, self.num_outputs, self.max_len = vocab_size, num_outputs, max_len
        self.specs, embedding = split_positions(layout(attention, depth, layers), position)
        self.embedding = nn.Embedding(vocab_size, dim, **made)
        self.position = embedding_position(embedding, dim, max_len, made)
        self.dropout = nn.Dropout(dropout)
        hidden = 0 if mlp == 0 else max(8, round(mlp * dim / 8) * 8)
        facts = {"dim": dim, "heads": heads, "causal": True, **made}
        only = {"kv_heads": kv_heads, "head_dim": head_dim, "qk_norm": qk_norm, "dropout": dropout}
        mixers = make_mixers(self.specs, facts, only, max_len)
        every, self.feed_every = (agreed(mixers, n) for n in ("insert_every", "feed_every"))
        agreed(mixers, "pos_jump")  # positions are drawn once for all layers
        self.inserted = None if every is None else Insertion(every, dim, made)
        if self.inserted is not None:
            # Parts that go by a length have to know that of all tokens, the inserted ones too.
            longest = inserting(mixers).reach(self.inserted.total(max_len))
            mixers = make_mixers(self.specs, facts, only, longest)
            self.position = embedding_position(embedding, dim, longest, made)
        norm = partial(nn.RMSNorm, dim, eps=1e-6, **made)
        self.blocks = nn.ModuleList(
            Block(
                mixer,
                norm,
                conv=ShortConv(dim, conv, **made) if conv else None,
                mlp=SwiGLU(dim, hidden, **made) if hidden else None,
                dropout=dropout,
            )
            for mixer in mixers
        )
        tie_layers(self)
        self.norm: nn.Module = norm()
        self.head = nn.Linear(dim, num_outputs or vocab_size, bias=False, **made)
        self.init_weights()
        if tie and num_outputs is None:
            self.head.weight = self.embedding.weight

    def init_weights(self) -> None:
        """Draw all weights from normal distributions, as wide as `weight_std` says.

        Parts with an initialisation of their own get it back afterwards.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.weight_std(name, module))
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if getattr(module, "special_init", False):
                module.reset_parameters()  # type: ignore[operator]

    def weight_std(self, name: str, module: nn.Linear | nn.Embedding) -> float:
        """Return the standard deviation that the weights of a layer start with.

        The variance is 1 / width of the input, residual outputs scaled by 1/sqrt(2 depth). That is
        the usual 0.02 at a width of 2500; a fixed 0.02 would start the small models of the recipes
        far too cold.

        Args:
            name: Name of the layer in the model.
            module: The layer.
        """
        std = module.weight.shape[1] ** -0.5
        residual = name.endswith(("mlp.down", "combine.proj", "attn.proj"))
        return std / (2 * len(self.blocks)) ** 0.5 if residual else std

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits of the next token, or `num_outputs` numbers, at every position.

        Args:
            tokens: (B, N) int64.
            mask: Boolean, True may attend, as `Attention.forward` takes it.
            positions: (N,) or (B, N) int64; default counts on from the cache.
            cache: Holds the tokens before these.

        Returns:
            (B, N, V), or (B, N, num_outputs).

        Raises:
            ZooError: A token or a shape is out of range.
        """
        return self.head(self.hidden(tokens, mask=mask, positions=positions, cache=cache))

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Final representation of every position, as the output layer reads it.

        Args:
            tokens: (B, N) int64.
            mask: Boolean, True may attend, as `Attention.forward` takes it.
            positions: (N,) or (B, N) int64; default counts on from the cache.
            cache: Holds the tokens before these.

        Returns:
            (B, N, C).

        Raises:
            ZooError: A token or a shape is out of range, or the model inserts tokens and is given
                positions, a mask of pairs or padding on the left.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ZooError(
                f"tokens of shape {tuple(tokens.shape)} must be (batch, length) integers"
            )
        feed = self.feed_every
        if feed is not None and not self.training and tokens.shape[1] > feed:
            if mask is not None or positions is not None:
                raise ZooError(
                    f"the model feeds itself feed_every={feed} tokens at a time and finds what it "
                    f"needs of those before; {tokens.shape[1]} tokens take no mask and no positions"
                )
            held = Cache() if cache is None else cache
            return torch.cat([self.hidden(x, cache=held) for x in tokens.split(feed, 1)], 1)
        x = self.embedding(tokens)
        start = cache.length if cache is not None else 0
        kept = None
        if self.inserted is not None:
            if positions is not None:
                raise ZooError(
                    "positions are given, but the model inserts tokens after every "
                    f"{self.inserted.every}, which take positions too"
                )
            x, kept = self.inserted(x, start)
            if mask is not None:
                mask = self.inserted.mask(mask)
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            positions = inserting(self.blocks).place(positions, len(x), cache is None)
        if self.position is not None:
            at = positions
            if at is None:
                at = torch.arange(start, start + x.shape[1], device=x.device)
            x = self.position.embed(x, at)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            layer = cache[i] if cache is not None else None
            x = block(x, mask=mask, positions=positions, cache=layer)
        return self.norm(x if kept is None else x.index_select(1, kept))

    generate = generation.generate
