"""A decoder language model whose attention is a specification.

Pre-norm RMSNorm, SwiGLU, tied embeddings (as in LLaMA, Touvron et al. 2023), and optionally a
short causal depthwise convolution before each mixer: recall tasks hinge on it (Arora et al. 2023,
"Zoology"), so it belongs to the host, where it is the same for every mechanism.

Where a part asks for it (`insert_every`: landmarks), the layers see tokens of the model's own
between the others, and a cache counts them; tokens in and logits out are the ordinary ones.

Legend: B batch, N length, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.cache import Cache
from zoo.errors import ZooError
from zoo.host.factory import create
from zoo.host.spec import DEFAULTS, PartSpec, layout, parse, without
from zoo.models import model
from zoo.models._blocks import Block
from zoo.models.language._insertion import Insertion
from zoo.parts import Part, Position, build, tie_layers
from zoo.registry import info


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
        self.specs, embedding = self._specs(layout(attention, depth, layers), position)
        self.embedding = nn.Embedding(vocab_size, dim, **made)
        self.position = self._embedding_position(embedding, dim, max_len, made)
        self.dropout = nn.Dropout(dropout)
        hidden = 0 if mlp == 0 else max(8, round(mlp * dim / 8) * 8)
        facts = {"dim": dim, "heads": heads, "causal": True, **made}
        only = {"kv_heads": kv_heads, "head_dim": head_dim, "qk_norm": qk_norm, "dropout": dropout}
        mixers = self._mixers(facts, only, max_len)
        every, self.feed_every = (_agreed(mixers, n) for n in ("insert_every", "feed_every"))
        _agreed(mixers, "pos_jump")  # positions are drawn once for all layers
        self.inserted = None if every is None else Insertion(every, dim, made)
        if self.inserted is not None:
            # Parts that go by a length have to know that of all tokens, the inserted ones too.
            longest = _inserting(mixers).reach(self.inserted.total(max_len))
            mixers = self._mixers(facts, only, longest)
            self.position = self._embedding_position(embedding, dim, longest, made)
        self.blocks = nn.ModuleList(
            Block(dim, mixer, hidden, conv, dropout, **made) for mixer in mixers
        )
        tie_layers(self)
        self.norm: nn.Module = nn.RMSNorm(dim, eps=1e-6, **made)
        self.head = nn.Linear(dim, num_outputs or vocab_size, bias=False, **made)
        self.init_weights()
        if tie and num_outputs is None:
            self.head.weight = self.embedding.weight

    @staticmethod
    def _specs(specs: list[str], position: str) -> tuple[list[str], PartSpec | None]:
        """Fill in the default position and take out the one that embeds.

        Positions are added to the embeddings once for all layers, so every layer that embeds has
        to agree on the part.
        """
        default = parse(position)
        if len(default) != 1 or default[0].entry.kind != "position":
            raise ZooError(f"position={position!r} must be one position part, e.g. 'rope'")
        rest: list[str] = []
        found: dict[str, PartSpec] = {}
        for spec in specs:
            whole = parse(spec)[0].entry.kind == "mixer"
            bare, part = (spec, None) if whole else without(spec, "position")
            part = part or default[0]
            embeds = issubclass(part.entry.cls, Position) and part.entry.cls.embeds
            if embeds:
                found[str(part)] = part
                rest.append(bare)
            else:
                rest.append(
                    bare if whole or part.name == DEFAULTS["position"] else f"{bare}+{part}"
                )
        if len(found) > 1:
            names = " and ".join(repr(name) for name in found)
            raise ZooError(f"layers disagree on the positions of the embedding: {names}")
        return rest, next(iter(found.values()), None)

    def _mixers(
        self, facts: Mapping[str, Any], only: Mapping[str, Any], max_len: int
    ) -> list[nn.Module]:
        """Make the mixer of every layer.

        Args:
            facts: Options of all mixers.
            only: Those of attention in sockets.
            max_len: Longest sequence.
        """
        mixers = []
        for i, spec in enumerate(self.specs):
            options = dict(facts)
            entry = info(parse(spec)[0].name)
            given = {k: value for k, value in only.items() if value and k != "dropout"}
            if entry.kind != "mixer":
                options.update(only, max_len=max_len, depth=i, layers=len(self.specs))
            elif given:
                key, value = given.popitem()
                raise ZooError(
                    f"{key}={value!r} is for attention in sockets; {entry.name!r} is a whole "
                    "module and has no such option"
                )
            mixers.append(create(spec, **options))
        return mixers

    @staticmethod
    def _embedding_position(
        part: PartSpec | None, dim: int, max_len: int, made: Mapping[str, Any]
    ) -> Position | None:
        if part is None:
            return None
        facts = {"dim": dim, "max_len": max_len, **made}
        position = build(part.entry.cls, facts, part.options)
        assert isinstance(position, Position)
        return position

    def init_weights(self) -> None:
        """Normal with variance 1 / width of the input, residual outputs scaled by 1/sqrt(2 depth).

        That is the usual 0.02 at a width of 2500; a fixed 0.02 would start the small models of
        the recipes far too cold. Parts with an initialisation of their own get it back afterwards.
        """
        depth = len(self.blocks)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = module.weight.shape[1] ** -0.5
                residual = name.endswith(("mlp.down", "combine.proj", "attn.proj"))
                nn.init.normal_(module.weight, std=std / (2 * depth) ** 0.5 if residual else std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Part) and module.special_init:
                module.reset_parameters()

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
            positions = _inserting(self.blocks).place(positions, len(x), cache is None)
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

    def _check_left_padding(self, lengths: Tensor) -> None:
        """Refuse padding on the left where places are counted from the first token.

        Raises:
            ZooError: They are.
        """
        what = None
        if self.inserted is not None:
            what = f"the model inserts tokens after every {self.inserted.every}"
        for part in self.modules():
            if what is None and isinstance(part, Part) and part.counts:
                what = f"{type(part).__name__} cuts blocks"
        if what is not None:
            raise ZooError(
                f"lengths={lengths.tolist()!r} means padding on the left, but {what}, counted from "
                "the first; give prompts of one length"
            )

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        steps: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos: int | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Continue sequences one token at a time, with the cache.

        Args:
            tokens: Prompt, (B, N) int64, N at least 1.
            steps: Tokens to add.
            temperature: Of the softmax; 0 takes the likeliest token.
            top_k: Sample among this many likeliest tokens.
            top_p: Sample among the likeliest tokens that together have this probability.
            generator: Source of randomness.
            eos: Stop a sequence after this token (and repeat it to the end of the batch).
            lengths: (B,) real tokens of each prompt, which stand at the end (padding on the left);
                None where all prompts are of one length.

        Returns:
            (B, N + steps) int64, shorter when every sequence has ended.

        Raises:
            ZooError: An argument is out of range, the model gives no logits, or a prompt is padded
                where places are counted from the first token.
        """
        if self.num_outputs is not None:
            raise ZooError(f"num_outputs={self.num_outputs!r}: the model gives no tokens to sample")
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ZooError(f"prompt of shape {tuple(tokens.shape)} must be (batch, at least 1)")
        checks.whole("steps", steps, 0)
        checks.number("temperature", temperature, 0)
        checks.optional(checks.whole)("top_k", top_k)
        checks.optional(checks.number)("top_p", top_p, above=0, high=1)
        length = tokens.shape[1]
        visible = None
        if lengths is not None:
            if lengths.shape != tokens.shape[:1] or lengths.min() < 1 or lengths.max() > length:
                raise ZooError(f"lengths={lengths.tolist()!r} must be (batch,), from 1 to {length}")
            if int(lengths.min()) < length:
                self._check_left_padding(lengths)
                visible = torch.arange(length, device=tokens.device) >= length - lengths[:, None]
        was_training = self.training
        self.eval()
        try:
            cache, new = Cache(), tokens
            ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
            for _ in range(steps):
                mask = positions = None
                if visible is not None:
                    mask = visible[:, None, None]
                    positions = (visible.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
                    visible = F.pad(visible, (0, 1), value=True)
                logits = self(new, mask=mask, positions=positions, cache=cache)[:, -1]
                new = _sample(logits, temperature, top_k, top_p, generator)
                if eos is not None:
                    new = new.masked_fill(ended[:, None], eos)
                    ended |= new[:, 0] == eos
                tokens = torch.cat([tokens, new], 1)
                if eos is not None and bool(ended.all()):
                    break
            return tokens
        finally:
            self.train(was_training)


def _inserting(layers: Iterable[nn.Module]) -> Part:
    """The first part for which tokens are inserted."""
    modules = (m for layer in layers for m in layer.modules())
    return next(m for m in modules if isinstance(m, Part) and m.insert_every is not None)


def _agreed(mixers: list[nn.Module], name: str) -> int | None:
    """What the parts of all layers say that say anything.

    Raises:
        ZooError: They disagree.
    """
    parts = [m for mixer in mixers for m in mixer.modules() if isinstance(m, Part)]
    said: set[Any] = {getattr(part, name, None) for part in parts}
    found = sorted(said - {None})
    if len(found) > 1:
        raise ZooError(f"layers disagree on {name}: {' and '.join(map(str, found))}")
    return found[0] if found else None


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw (B, 1) tokens from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
