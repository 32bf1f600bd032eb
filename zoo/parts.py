"""The parts that fill the sockets of the host, and what they are given to work with.

Legend: B batch, N query length, M key length, R rows of a strip, H heads, D head dim, C channels.
A part overrides the methods of its base class and nothing else; masks, causality, padding, cached
decoding and memory are the engine's business.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.registry import Traits

if TYPE_CHECKING:
    from zoo.attention import Attention
    from zoo.cache import LayerCache
    from zoo.routes import Route


@dataclass(frozen=True)
class Layout:
    """Head counts and widths between the projection and the combination.

    Args:
        heads: Heads that leave the normalizer and enter the combination.
        score_heads: Heads of q and of the scores; a multiple of `heads`.
        k_heads: Heads of k; divides `score_heads`.
        v_heads: Heads of v; divides `heads`.
        qk_dim: Width of a head of q and k.
        v_dim: Width of a head of v.
    """

    heads: int
    score_heads: int
    k_heads: int
    v_heads: int
    qk_dim: int
    v_dim: int

    def with_(self, **changes: int) -> Layout:
        """Copy with some fields replaced."""
        return replace(self, **changes)


@dataclass
class Call:
    """Everything about one forward pass of one layer that its parts may need.

    Args:
        x: Input of the layer, (B, N, C).
        q: Queries, (B, score_heads, N, qk_dim), rotated.
        k: Keys, (B, k_heads, M, qk_dim), rotated, the cached ones included.
        v: Values, (B, v_heads, M, v_dim).
        q_pos: Positions of the queries, (N,) or (B, N), int64.
        k_pos: Positions of the keys, (M,) or (B, M), int64.
        q_start: Index of the first query in the sequence; causality goes by index.
        k_start: Index of the first key held (above 0 once a window has rolled).
        causal: Key j may be seen by query i only if its index is not larger.
        scale: Factor on dot products.
        cross: Keys come from a context.
        mask: Boolean, True may attend, broadcastable to (B, heads, N, M), or None.
        bias: Added to the scores, broadcastable to (B, score_heads, N, M), or None.
        dropout: Probability in force (0 outside training).
        cache: This layer's cache while decoding, or None.
        cu_seqlens: Bounds of the sequences packed into the one sample, (S + 1,), or None.
        documents: Number of the packed sequence of each token, (N,), or None.
        prepared: What the parts' `prepare` returned, by socket.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor
    k_pos: Tensor
    q_start: int
    k_start: int
    causal: bool
    scale: float
    cross: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    cache: LayerCache | None = None
    cu_seqlens: Tensor | None = None
    documents: Tensor | None = None
    prepared: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def key_mask(self) -> Tensor | None:
        """The mask as (B, 1, M) for parts that only know hidden keys, or None."""
        return None if self.mask is None else self.mask[:, 0].expand(-1, 1, -1)


@dataclass
class Strip:
    """Some rows of queries against the keys that they may see.

    Args:
        call: The whole pass.
        batch: Samples of the strip.
        rows: Queries of the strip.
        keys: Keys of the strip.
        q: Queries of the strip, (B, score_heads, R, qk_dim).
        mask: Which pairs may meet, broadcastable to (B, score_heads, R, M), or None for all.
    """

    call: Call
    batch: slice
    rows: slice
    keys: slice
    q: Tensor
    mask: Tensor | None = None

    # Keys and values are cut where they are used, not when strips are planned: autograd goes
    # backwards in the order of creation, and would keep every strip's gradient of an early cut.

    @property
    def k(self) -> Tensor:
        """Keys of the strip, (B, k_heads, M, qk_dim)."""
        return self.call.k[self.batch, :, self.keys]

    @property
    def v(self) -> Tensor:
        """Values of the strip, (B, v_heads, M, v_dim)."""
        return self.call.v[self.batch, :, self.keys]

    @property
    def scale(self) -> float:
        """Factor on dot products."""
        return self.call.scale

    @property
    def q_index(self) -> Tensor:
        """Index of each row in the sequence, (R,)."""
        start = self.call.q_start
        return torch.arange(
            start + self.rows.start, start + self.rows.stop, device=self.call.q.device
        )

    @property
    def k_index(self) -> Tensor:
        """Index of each key in the sequence, (M,)."""
        start = self.call.k_start
        return torch.arange(
            start + self.keys.start, start + self.keys.stop, device=self.call.q.device
        )

    @property
    def q_pos(self) -> Tensor:
        """Position of each row, (R,) or (B, R)."""
        return _cut_positions(self.call.q_pos, self.batch, self.rows)

    @property
    def k_pos(self) -> Tensor:
        """Position of each key, (M,) or (B, M)."""
        return _cut_positions(self.call.k_pos, self.batch, self.keys)

    def distance(self) -> Tensor:
        """Query position minus key position, (R, M) or (B, 1, R, M)."""
        gap = self.q_pos[..., :, None] - self.k_pos[..., None, :]
        return gap if gap.ndim == 2 else gap[:, None]

    def prepared(self, kind: str) -> Mapping[str, Any]:
        """What the part in socket `kind` prepared for the whole pass."""
        return self.call.prepared[kind]


def _cut_positions(positions: Tensor, batch: slice, items: slice) -> Tensor:
    return positions[items] if positions.ndim == 1 else positions[batch, items]


def grouped_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (B, H, R, X) by (B, G, X, Y) where head h of `a` meets head h // (H // G) of `b`."""
    heads, groups = a.shape[1], b.shape[1]
    if heads == groups:
        return a @ b
    rows = a.shape[2]
    # The heads of a group share b, so they are so many more rows of one product.
    folded = a.reshape(a.shape[0], groups, heads // groups * rows, a.shape[3])
    return (folded @ b).view(a.shape[0], heads, rows, b.shape[-1])


def check_cu_seqlens(cu_seqlens: Tensor, length: int) -> None:
    """Refuse bounds of packed sequences that are no bounds.

    Args:
        cu_seqlens: First token of each sequence and, last, the end, (S + 1,) integers.
        length: Tokens in all.

    Raises:
        ZooError: Wrong type or shape, not from 0 to `length`, or decreasing.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        raise ZooError(
            f"cu_seqlens of dtype {cu_seqlens.dtype} and shape {tuple(cu_seqlens.shape)}; allowed: "
            "int32 or int64 of rank 1"
        )
    if torch.compiler.is_compiling():
        return  # their values are not known
    ends = cu_seqlens.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or sorted(ends) != ends:
        shown = f"{ends[:4]}..." if len(ends) > 8 else f"{ends}"
        raise ZooError(f"cu_seqlens={shown} must go from 0 to {length} without decreasing")


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head of (B, G, M, D) consecutively up to `heads`; a single one is not copied."""
    if x.shape[1] == 1:
        return x.expand(-1, heads, -1, -1)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast, where the device of `x` has one, from rounding to half precision."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def mask_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Put a very low finite score where `mask` is False (finite, so that empty rows stay NaN-free).

    Args:
        scores: (B, H, R, M).
        mask: Broadcastable boolean, True may attend, or None.
    """
    return scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


class Part(nn.Module):
    """Something that fills one socket of the host."""

    kind: ClassVar[str]
    traits: ClassVar[Traits] = Traits()
    # True where reset_parameters must run again after a model has applied its own initialisation.
    special_init: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.aux_losses: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        """Initialise the part's own parameters as its paper does."""

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """Compute, once per pass and differentiably, what all strips share."""
        return {}

    def attach(self, host: Attention) -> None:
        """Look at the other parts of `host`, once all of them are built."""

    def incompatible(self, host: Attention) -> str | None:
        """Reason why this part cannot work in `host`, naming the other part, or None."""
        return None

    def tie(self, first: Part) -> None:
        """Share parameters with `first`, the part of the same name in a model's first such layer.

        Models call it on every layer; parts that share nothing between layers ignore it.
        """

    def advance(self, done: float) -> None:
        """Take note that training has done this share of its steps, from 0 to 1.

        Trainers call it before every step, and before a checkpoint of that age is evaluated.
        """

    def routes(self) -> tuple[Route, ...]:
        """Fast routes that this part brings, best first.

        The last resort is the strip engine, or the `forward` of an attend part.
        """
        return ()

    def __getstate__(self) -> dict[str, Any]:
        # Losses hang on a graph that can be neither copied nor pickled.
        return {**self.__dict__, "aux_losses": {}}


class Project(Part):
    """Makes q, k and v from x."""

    kind = "project"

    @classmethod
    def choose_kv_heads(cls, heads: int, kv_heads: int | None) -> int:
        """Key/value heads for a host that asks for `kv_heads` (None: the part's default)."""
        return heads if kv_heads is None else kv_heads

    def forward(
        self, x: Tensor, context: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, N, C), and the context (B, M, C) for keys and values where there is one.

        Returns:
            q (B, score_heads, N, qk_dim), k (B, k_heads, M, qk_dim), v (B, v_heads, M, v_dim).
        """
        raise ZooError(f"{type(self).__name__} does not define forward")

    def queries(self, x: Tensor) -> Tensor:
        """Only q, for cross-attention whose keys are cached."""
        raise ZooError(f"{type(self).__name__} does not define queries; it cannot cache a context")

    def read(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Give the heads their keys and values, those from the cache included.

        The cache holds what went in; k and v may leave with more heads than they came with.
        """
        return k, v

    def finish(self, y: Tensor) -> Tensor:
        """Change the heads' outputs (B, heads, N, v_dim) before anything else does."""
        return y


class Position(Part):
    """Says where tokens stand: in the embeddings, by rotation, or by a bias on the scores."""

    kind = "position"
    # Added to the embeddings once, below the first layer; a lone host adds it to its input.
    embeds: ClassVar[bool] = False
    # Overrides `rotate`, `bias`: the host skips what a part does not do.
    rotates: ClassVar[bool] = False
    biases: ClassVar[bool] = False
    # The bias depends only on positions, so a fused softmax can take it as a tensor.
    static: ClassVar[bool] = False

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add positions (N,) or (B, N) to embeddings (B, N, C)."""
        return x

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Turn q and the new keys by their positions, before they are cached."""
        return q, k

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        """Scores with the position term, (B, score_heads, R, M).

        A static part returns its term alone, broadcastable to that shape, when `scores` is None.
        """
        raise ZooError(f"{type(self).__name__} does not define bias")


class Score(Part):
    """Compares queries with keys."""

    kind = "score"

    def forward(self, strip: Strip) -> Tensor:
        """Scores of a strip, (B, score_heads, R, M)."""
        raise ZooError(f"{type(self).__name__} does not define forward")


class Select(Part):
    """Says which pairs may meet, on top of causality and the caller's mask."""

    kind = "select"

    def change_keys(self, k: Tensor, cache: LayerCache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Change the new keys (B, k_heads, N, qk_dim) before they are rotated and cached."""
        return k

    def allow(self, strip: Strip) -> Tensor | None:
        """Boolean mask broadcastable to (B, score_heads, R, M), or None for all pairs."""
        raise ZooError(f"{type(self).__name__} does not define allow")

    def key_range(self, call: Call, rows: slice) -> tuple[int, int] | None:
        """Bounds of the keys that these rows can meet (indices into the keys held), or None."""
        return None

    def window(self) -> int | None:
        """Number of latest tokens that the next query can see; a cache holds no more."""
        return None


class Normalize(Part):
    """Turns scores into weights."""

    kind = "normalize"
    # With a cache, `recall` does all of the work and keeps the memory itself.
    recalls: bool = False

    def change_layout(self, layout: Layout) -> Layout:
        """Head layout that this normalizer wants, given the plain one."""
        return layout

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Weights (B, heads, R, M) from scores (B, score_heads, R, M); masked pairs get 0.

        Rows that may see nothing are set to zero by the engine: they must only be free of NaN.
        """
        raise ZooError(f"{type(self).__name__} does not define forward")

    def share_keys(self, k: Tensor) -> Tensor:
        """Lay out the key heads (B, k_heads, M, qk_dim) before anything reads them.

        Score head s meets key head ``s // (score_heads // k_heads)`` of what comes out; the cache
        holds what went in.
        """
        return k

    def finish(self, y: Tensor) -> Tensor:
        """Change the heads' outputs (B, heads, N, v_dim) before they are combined."""
        return y

    def recall(self, host: Attention, call: Call) -> Tensor:
        """Outputs of the heads (B, heads, N, v_dim) from the new tokens and what `recalls` kept.

        Queries and keys of the call are those of the new tokens, not rotated; whatever later
        passes need goes into `call.cache`.
        """
        raise ZooError(f"{type(self).__name__} does not define recall")


class Attend(Part):
    """Fills score, select and normalize at once."""

    kind = "attend"

    def forward(self, call: Call) -> Tensor:
        """Outputs of the heads, (B, heads, N, v_dim).

        While decoding, `call.k` and `call.v` hold the new tokens only and the part keeps its
        state in `call.cache`.
        """
        raise ZooError(f"{type(self).__name__} does not define forward")

    def weights(self, call: Call) -> Tensor:
        """The weights that forward applies implicitly, (B, heads, N, M)."""
        raise ZooError(f"{type(self).__name__} forms no attention weights")


class Combine(Part):
    """Joins the heads."""

    kind = "combine"

    def forward(
        self, y: Tensor, x: Tensor, prepared: Mapping[str, Any] = MappingProxyType({})
    ) -> Tensor:
        """Join the heads.

        Args:
            y: Outputs of the heads, (B, heads, N, v_dim).
            x: Input of the layer, (B, N, C).
            prepared: What the part's `prepare` returned for this pass.

        Returns:
            (B, N, C).
        """
        raise ZooError(f"{type(self).__name__} does not define forward")


def build(cls: type, facts: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Construct a part, handing it the facts its constructor asks for and the user's options.

    Raises:
        ZooError: A switch that is neither True nor False; any word would pass for True.
    """
    wanted = inspect.signature(cls).parameters
    for name, value in options.items():
        if isinstance(wanted[name].default, bool) and not isinstance(value, bool):
            raise ZooError(f"{name}={value!r} of {cls.__name__} must be True or False")
    return cls(**{k: v for k, v in facts.items() if k in wanted}, **options)


def advance(model: nn.Module, done: float) -> None:
    """Tell every part of a model how much of its training is done.

    Args:
        model: Holds the parts.
        done: Share of the steps, from 0 to 1.
    """
    for part in model.modules():
        if isinstance(part, Part):
            part.advance(done)


def tie_layers(model: nn.Module) -> None:
    """Let parts share parameters with the first layer that has a part of the same name.

    Args:
        model: Holds the hosts, registered from the first layer to the last.
    """
    firsts: dict[str, Part] = {}
    for host in model.modules():
        names = getattr(host, "part_names", {})
        for kind, name in names.items():
            part = getattr(host, kind)
            first = firsts.setdefault(name, part)
            if first is not part:
                part.tie(first)
