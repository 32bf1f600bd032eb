"""The parts that fill the sockets of the host, and what they are given to work with.

Legend: B batch, N query length, M key length, R rows of a strip, H heads, D head dim, C channels.
A part overrides the methods of its base class and nothing else; masks, causality, padding, cached
decoding and memory are the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from zoo import checks
from zoo.cache import LayerCache
from zoo.call import (
    Call,
    Layout,
    Strip,
    check_cu_seqlens,
    full_precision,
    grouped_matmul,
    mask_scores,
    repeat_heads,
    share_groups,
    widen,
)
from zoo.errors import ZooError
from zoo.registry import Traits, constructor

__all__ = (
    "Attend",
    "Call",
    "Combine",
    "Host",
    "Layout",
    "Normalize",
    "Part",
    "Position",
    "Project",
    "Route",
    "Score",
    "Select",
    "Stations",
    "Strip",
    "advance",
    "build",
    "check_cu_seqlens",
    "full_precision",
    "grouped_matmul",
    "mask_scores",
    "repeat_heads",
    "share_groups",
    "tie_layers",
    "widen",
)


class Part(nn.Module):
    """Something that fills one socket of the host."""

    kind: ClassVar[str]
    traits: ClassVar[Traits] = Traits()
    # True where reset_parameters must run again after a model has applied its own initialisation.
    special_init: ClassVar[bool] = False
    # Ordinary tokens after each of which a model is to put one with an embedding of its own.
    insert_every: int | None = None
    # Ordinary tokens that a model outside training feeds itself at a time, with a cache.
    feed_every: int | None = None
    # True where a token's place counts from the first one, padding or not, so that a sequence
    # padded on the left does not get what it gets alone.
    counts: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.aux_losses: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        """Initialise the part's own parameters as its paper does."""

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """Compute, once per pass and differentiably, what all strips share."""
        return {}

    def place(self, positions: Tensor, samples: int, whole: bool) -> Tensor:
        """Change the positions that a pass gets where none are given.

        A model asks the part that inserts tokens, once for all layers.

        Args:
            positions: Those of the tokens, (N,) int64.
            samples: Batch size B.
            whole: Tokens are whole sequences: none in a cache, none packed.

        Returns:
            (N,) or (B, N) int64.
        """
        return positions

    def reach(self, length: int) -> int:
        """How many positions `place` may need for `length` tokens."""
        return length

    def attach(self, host: Host) -> None:
        """Look at the other parts of `host`, once all of them are built."""

    def incompatible(self, host: Host) -> str | None:
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
    # Whether it adds `bias` to the scores; an instance may set it where an option decides.
    biases: bool = False

    def change_keys(self, k: Tensor, cache: LayerCache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Change the new keys (B, k_heads, N, qk_dim) before they are rotated and cached."""
        return k

    def bias(self, strip: Strip) -> Tensor:
        """Term that is added to the scores, broadcastable to (B, score_heads, R, M)."""
        raise ZooError(f"{type(self).__name__} does not define bias")

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
    # The weights depend on chance, so that a strip computed again needs the same random numbers.
    random: bool = False
    # Scores are not the exponents of the weights, so that a bias is not to be added to them:
    # `weigh_biased` gets it. Where a position's term depends on content it is part of the score.
    biases_exponent: ClassVar[bool] = False

    def change_layout(self, layout: Layout) -> Layout:
        """Head layout that this normalizer wants, given the plain one."""
        return layout

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Weights (B, heads, R, M) from scores (B, score_heads, R, M); masked pairs get 0.

        Rows that may see nothing are set to zero by the engine: they must only be free of NaN.
        """
        raise ZooError(f"{type(self).__name__} does not define forward")

    def weigh(self, strip: Strip, scores: Tensor) -> Tensor:
        """Weights of a strip, for parts that go by where its rows and keys stand.

        Others define `forward`, which is all that this calls.
        """
        return self(scores, strip.mask)

    def weigh_biased(self, strip: Strip, scores: Tensor, bias: Tensor) -> Tensor:
        """Weights of a strip, for parts that say `biases_exponent`.

        Args:
            strip: The strip.
            scores: (B, score_heads, R, M), without the bias.
            bias: What positions, the selection and the caller add to the exponents, broadcastable
                to the scores.
        """
        raise ZooError(f"{type(self).__name__} does not define weigh_biased")

    def share_keys(self, k: Tensor) -> Tensor:
        """Lay out the key heads (B, k_heads, M, qk_dim) before anything reads them.

        Score head s meets key head ``s // (score_heads // k_heads)`` of what comes out; the cache
        holds what went in.
        """
        return k

    def finish(self, y: Tensor) -> Tensor:
        """Change the heads' outputs (B, heads, N, v_dim) before they are combined."""
        return y

    def recall(self, host: Host, call: Call) -> Tensor:
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


@dataclass
class Stations:
    """The parts that the engine runs.

    Args:
        score: Compares.
        select: Hides.
        normalize: Weighs.
        position: Biases the scores.
        heads: Heads that come out of the normalizer; None for as many as the scores have.
    """

    score: Score
    select: Select
    normalize: Normalize
    position: Position
    heads: int | None = None


class Host(Protocol):
    """What parts may ask of the layer that holds them; `zoo.Attention` is the one there is.

    Args:
        dim: Channels C.
        heads: Heads H.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
        causal: Query i sees keys 0..i only.
        dropout: Probability on the weights, in training.
        scale: Factor on dot products.
        spec: Canonical specification.
        layout: Head counts and widths after the normalizer's say.
        part_names: Registry name by socket.
        route: "auto", or the route to take.
        training: Whether the layer is in training.
        q_norm: Norm of the queries' heads, or None.
        k_norm: Norm of the keys' heads, or None.
        project: The part of that socket, like those below; `attend` excludes score, select and
            normalize.
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    dropout: float
    scale: float
    spec: str
    layout: Layout
    part_names: dict[str, str]
    training: bool
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    project: Project
    position: Position
    score: Score
    select: Select
    normalize: Normalize
    combine: Combine
    attend: Attend | None

    @property
    def route(self) -> str:
        """Route to take: "auto" or a name."""

    @property
    def traits(self) -> Traits:
        """What this combination of parts promises."""

    @property
    def parts(self) -> Stations:
        """The four parts that the strip engine runs."""

    @property
    def module(self) -> nn.Module:
        """The layer itself, with its weights."""

    @property
    def recording(self) -> bool:
        """Whether passes are captured, so that all heads are wanted."""

    def socket_parts(self) -> list[Part]:
        """The parts in use, in the order of the sockets."""

    def recalls(self, cache: LayerCache | None) -> bool:
        """Whether the normalizer keeps the memory itself."""

    def prepare(self, call: Call) -> Call:
        """Let the parts prepare a pass."""

    def mix(self, call: Call) -> Tensor:
        """Outputs of the heads, (B, heads, N, v_dim), of a prepared pass."""


@dataclass(frozen=True)
class Route:
    """A way to compute a pass.

    Args:
        name: Short name, used in explanations and as the host's `route` argument.
        refuse: Reason why the route cannot take this pass, or None.
        run: Outputs of the heads, (B, heads, N, v_dim).
        auto: Whether a host may take it without being told to. The straightforward form of a
            mechanism is a route that only its name brings: something to compare with.
        packed: Whether it keeps packed sequences (`call.cu_seqlens`) apart.
    """

    name: str
    refuse: Callable[[Host, Call], str | None]
    run: Callable[[Host, Call], Tensor]
    auto: bool = True
    packed: bool = False

    def reason(self, host: Host, call: Call) -> str | None:
        """Why the route cannot take this pass, or None."""
        if call.cu_seqlens is not None and not self.packed:
            return "it does not keep packed sequences apart"
        return self.refuse(host, call)


def build(cls: type, facts: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Construct a part, handing it the facts its constructor asks for and the user's options.

    Raises:
        ZooError: A switch that is neither True nor False; any word would pass for True.
    """
    wanted = constructor(cls)
    for name, value in options.items():
        if isinstance(wanted[name].default, bool):
            checks.flag(name, value, of=cls.__name__)
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

    A whole module with a method `tie` shares with the first module of its class.

    Args:
        model: Holds the layers, registered from the first to the last.
    """
    firsts: dict[object, nn.Module] = {}
    for host in model.modules():
        if not isinstance(host, Part) and callable(getattr(host, "tie", None)):
            whole = firsts.setdefault(type(host), host)
            if whole is not host:
                host.tie(whole)  # type: ignore[operator]
        names = getattr(host, "part_names", {})
        for kind, name in names.items():
            part = getattr(host, kind)
            first = firsts.setdefault(name, part)
            if first is not part:
                part.tie(first)
