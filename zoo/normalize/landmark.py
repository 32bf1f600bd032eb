"""Landmark attention (Mohtashami and Jaggi 2023, "Landmark Attention").

After every L ordinary tokens stands a landmark, whose key speaks for the block before it. With
s_ij = q_i k_j / sqrt(D), a row i shares its attention first among the ordinary tokens A_i of its
own block up to itself and the landmarks M_i of earlier blocks, then, inside each of these, by the
scores of the L tokens there:

    p_i   = softmax over A_i and M_i of s_ij              q, k (B, H, N, D)
    r_i^b = softmax over the ordinary tokens of block b of s_ij
    w_ij  = p_ij                       j in A_i
    w_ij  = p_i,landmark(b) r_ij^b     j in an earlier block b
    w_ij  = 0                          j a landmark
    o_i   = sum_j w_ij v_j                                v, o (B, H, N, D)

Weights of a row sum to one. The landmark of the current block is hidden, also from itself: the row
of a landmark sees the L tokens before it and the earlier landmarks. Values of landmarks are never
used. Cost N^2 D as in softmax attention, in memory O(N). No parameters: the embedding of the
landmark is the model's.

Landmarks are known by their place: token j of a sequence is one if ``j % (block + 1) == block``. A
model that sees `insert_every` puts them in (`zoo.models`), so that users of the model
know ordinary tokens only; a host on its own is given them with the others. They take positions.

- `group_dropout`: dropout on the probabilities of the landmarks, in training.
- `pos_jump`: in training, positions after each landmark move on by a random number from 0 to
  ``pos_jump - 1``, to get used to gaps; drawn for each sample, once for all layers of a model. The
  paper says 1 to 100; we follow the code, whose default is none.
- `retrieve`: with a cache, a query sees only the best k finished blocks (`_landmark_memory`).

Where masks or selections hide tokens (the official code knows only causality): a landmark whose
block shows nothing to a row is hidden from it too, so that the weights still sum to one, and a
block whose landmark is hidden is closed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError
from zoo.host.refusals import refuse_extras, refuse_parts, refuse_position, refuse_tracing
from zoo.normalize._landmark_blocks import BlockAttention
from zoo.normalize._landmark_memory import SELECTIONS, recall
from zoo.normalize._landmark_weights import (
    by_blocks,
    by_buckets,
    check_places,
    check_tensors,
    grouped_softmax,
    insert_landmarks,
    landmark_attention_reference,
    landmark_targets,
)
from zoo.parts import Call, Host, Normalize, Route, Strip, repeat_heads
from zoo.registry import Paper, Taxonomy, Traits, register

__all__ = [
    "Landmark",
    "grouped_softmax",
    "insert_landmarks",
    "landmark_attention",
    "landmark_attention_reference",
    "landmark_targets",
]
BACKENDS = ("auto", "reference", "torch", "triton")


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    *,
    scale: float | None = None,
    is_landmark: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention whose tokens share it among blocks by their landmarks.

    Args:
        q: (B, H, N, D), the last N of M tokens.
        k: (B, G, M, D), G dividing H.
        v: (B, G, M, E).
        block: Ordinary tokens L of a block: token j is a landmark if ``j % (L + 1) == L``.
        scale: Factor on the scores; default ``1 / sqrt(D)``.
        is_landmark: (M,) or (B, M) boolean, where landmarks stand elsewhere; only the backend
            "reference" takes other places than the regular ones.
        backend: "reference", all N x M scores; "torch", block by block in memory O(N); "triton",
            for N = M; "auto", triton on CUDA where it can, else torch.

    Returns:
        (B, H, N, E).

    Raises:
        ZooError: Shapes that do not fit, landmarks in the wrong places, or a backend that cannot.
    """
    block = checks.whole("block", block)
    checks.choice("backend of landmark_attention", backend, BACKENDS)
    check_tensors(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_landmark is not None and backend != "reference":
        check_places(is_landmark, k, block, backend)
    if backend == "reference":
        return landmark_attention_reference(q, k, v, block, scale, is_landmark)
    reason = _refuse_kernel(q, k, v, block, backend == "triton") if backend != "torch" else ""
    if reason is None:
        from zoo.kernels.landmark import landmark_attention as kernel

        return kernel(q, k, v, block, scale)
    if backend == "triton":
        raise ZooError(f"backend='triton' of landmark_attention: {reason}")
    reason = refuse_tracing()
    if reason:
        raise ZooError(
            f"backend={backend!r} of landmark_attention: {reason}; use backend='reference'"
        )
    return _attend_blocks(q, k, v, block, scale)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float) -> Tensor:
    if not q.numel() or q.is_meta:
        return landmark_attention_reference(q, k, v, block, scale)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return BlockAttention.apply(q, k, v, block, scale)[0]


def _refuse_kernel(q: Tensor, k: Tensor, v: Tensor, block: int, by_name: bool) -> str | None:
    from zoo import kernels

    if torch._C._are_functorch_transforms_active():
        return "torch.func cannot look into a kernel"
    if block > 128:
        return f"block={block} is above 128, so that a block of keys does not fit one tile"
    if q.shape[2] != k.shape[2]:
        return "there are cached keys"
    return kernels.refuse(q, k, v, by_name=by_name)


def _refuse_parts(host: Host, call: Call) -> str | None:
    dense = {"score": "dot", "select": "all"}
    reason = refuse_parts(host, dense) or refuse_position(host) or refuse_extras(call)
    if reason:
        return reason
    if host.normalize.random:
        return "it has no dropout on the shares of landmarks"
    return None


def _part(host: Host) -> Landmark:
    assert isinstance(host.normalize, Landmark)
    return host.normalize


def _refuse_triton(host: Host, call: Call) -> str | None:
    by_name = host.route == "landmark_triton"
    return _refuse_parts(host, call) or _refuse_kernel(
        call.q, call.k, call.v, _part(host).block, by_name
    )


def _run_triton(host: Host, call: Call) -> Tensor:
    from zoo.kernels.landmark import landmark_attention as kernel

    block = _part(host).block
    return kernel(call.q, call.k, call.v, block, call.scale, cu_seqlens=call.cu_seqlens)


def _refuse_blocks(host: Host, call: Call) -> str | None:
    reason = _refuse_parts(host, call) or refuse_tracing()
    if reason is None and call.q.device.type != "cpu":
        return "its tiles are sized for the cache of a CPU"
    if reason is None and host.route == "auto" and call.q.shape[2] == 1:
        return "for one row the engine, which copies no cached keys, is quicker"
    return reason


def _run_blocks(host: Host, call: Call) -> Tensor:
    block, bounds = _part(host).block, call.cu_seqlens
    if bounds is None:
        return _attend_blocks(call.q, call.k, call.v, block, call.scale)
    cut = [x.split(bounds.diff().tolist(), 2) for x in (call.q, call.k, call.v)]
    outs = [_attend_blocks(q, k, v, block, call.scale) for q, k, v in zip(*cut, strict=True)]
    return torch.cat(outs, 2)


def _run_reference(host: Host, call: Call) -> Tensor:
    return landmark_attention_reference(call.q, call.k, call.v, _part(host).block, call.scale)


@register(
    "landmark",
    kind="normalize",
    contender="landmark(block=8)",
    paper=Paper(
        "Landmark Attention: Random-Access Infinite Context Length for Transformers",
        2023,
        "2305.16300",
    ),
    traits=Traits(bidirectional=False, cross=False),
    taxonomy=Taxonomy(
        sequences="self",
        levels="multi",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="softmax",
        complexity="quadratic",
    ),
    notes="the embedding of the landmark is the model's; with retrieve=k a cached query costs "
    "N / block + k * block scores, and differs from the parallel form",
)
class Landmark(Normalize):
    """Softmax among the own block and landmarks, then inside each landmark's block.

    Args:
        block: Ordinary tokens L between two landmarks.
        group_dropout: Dropout on the shares of the landmarks, in training.
        pos_jump: In training, positions jump by 0 to ``pos_jump - 1`` after each landmark; 0 for
            none.
        retrieve: With a cache, finished blocks that a query sees; None for all of them.
        chunk: Ordinary tokens that a model feeds itself at a time where it retrieves.
        cache_blocks: Finished blocks that the cache holds, the latest; None for all.
        selection: Who chooses blocks together: "token_head" nobody, each head of each token its
            own; "max_heads" the heads of a token; "max_tokens" the tokens of a chunk, in each head.
        offload: Keep finished blocks in main memory, on the device only their landmarks' keys.

    Raises:
        ZooError: An option is out of range, or belongs to `retrieve`, which is None.
    """

    counts = True

    def __init__(
        self,
        block: int = 50,
        group_dropout: float = 0.0,
        pos_jump: int = 0,
        retrieve: int | None = None,
        chunk: int = 250,
        cache_blocks: int | None = None,
        selection: str = "token_head",
        offload: bool = False,
    ) -> None:
        super().__init__()
        block = checks.whole("block", block)
        group_dropout = checks.number("group_dropout", group_dropout, 0, below=1)
        pos_jump, chunk = checks.whole("pos_jump", pos_jump, 0), checks.whole("chunk", chunk)
        some = checks.optional(checks.whole, "for all blocks")
        retrieve = some("retrieve", retrieve, 0)
        cache_blocks = some("cache_blocks", cache_blocks, max(1, retrieve or 0))
        checks.choice("selection of 'landmark'", selection, SELECTIONS)
        if retrieve is None:
            given = (chunk, cache_blocks, selection, offload)
            names = ("chunk", "cache_blocks", "selection", "offload")
            for name, one, plain in zip(
                names, given, (250, None, "token_head", False), strict=True
            ):
                if one != plain:
                    raise ZooError(f"{name}={one!r} has no effect without retrieve=k")
        self.block, self.group_dropout, self.pos_jump = block, float(group_dropout), pos_jump
        self.retrieve, self.cache_blocks = retrieve, cache_blocks
        self.selection, self.offload = selection, offload
        self.recalls = retrieve is not None
        self.insert_every = block
        self.feed_every = None if retrieve is None else chunk

    @property
    def random(self) -> bool:  # type: ignore[override]
        """Whether the weights depend on chance."""
        return self.training and self.group_dropout > 0

    def incompatible(self, host: Host) -> str | None:
        """Retrieval compares landmarks by dot products, without any bias."""
        if self.retrieve is None:
            return None
        for kind, wanted in (("score", "dot"), ("select", "all")):
            found = host.part_names[kind]
            if found != wanted:
                return (
                    f"'landmark' with retrieve={self.retrieve} needs {kind}={wanted!r}, not "
                    f"{found!r}"
                )
        if host.position.biases:
            return (
                f"'landmark' with retrieve={self.retrieve} places blocks anew for each query, but "
                f"{host.part_names['position']!r} biases the scores by place"
            )
        return None

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Weights (B, H, R, M), at least float32, of the last R of the first M tokens."""
        rows, keys = scores.shape[-2:]
        causal = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril(keys - rows)
        mask = causal if mask is None else causal & mask
        index = torch.arange(keys - rows, keys, device=scores.device)
        return self._weigh(scores, 0, index, mask)

    def weigh(self, strip: Strip, scores: Tensor) -> Tensor:
        """Weights of a strip (B, H, R, M), at least float32."""
        mask = strip.mask
        if mask is None:
            mask = torch.ones_like(scores[:1, :1, :1], dtype=torch.bool)
        call = strip.call
        if call.documents is None or call.cu_seqlens is None:
            return self._weigh(scores, call.k_start + strip.keys.start, strip.q_index, mask)
        # Sequences end anywhere, and each counts its tokens from its own start.
        start = call.cu_seqlens.long()[call.documents[strip.keys]]
        marks = (strip.k_index - start) % (self.block + 1) == self.block
        first = strip.rows.start - strip.keys.start
        buckets = scores.shape[-1] // (self.block + 1) + 1
        return by_buckets(scores, marks, first, buckets, mask, self._dropout)

    def _weigh(self, scores: Tensor, first: int, rows: Tensor, mask: Tensor) -> Tensor:
        return by_blocks(scores, self.block, first, rows, mask, self._dropout)

    @property
    def _dropout(self) -> float:
        return self.group_dropout if self.training else 0.0

    def place(self, positions: Tensor, samples: int, whole: bool) -> Tensor:
        """Positions that jump after landmarks, (B, N), in training.

        Raises:
            ZooError: They are not those of whole sequences from the start.
        """
        if not (self.training and self.pos_jump):
            return positions
        if not whole:
            raise ZooError(
                f"pos_jump={self.pos_jump} draws the positions of whole sequences; in training it "
                "takes no cache and no cu_seqlens"
            )
        shape = (samples, positions.shape[0])
        jumps = torch.randint(self.pos_jump, shape, device=positions.device)
        jumps = jumps * (positions % (self.block + 1) == self.block)
        return positions + jumps.cumsum(1) - jumps

    def reach(self, length: int) -> int:
        """Positions that jumps may reach in so many tokens."""
        return length + length // (self.block + 1) * max(0, self.pos_jump - 1)

    def recall(self, host: Host, call: Call) -> Tensor:
        """Outputs of the heads (B, H, N, E), from the new tokens and the best finished blocks.

        Raises:
            ZooError: In training, or with a mask, a bias or positions.
        """
        return recall(self, host, call)

    def routes(self) -> tuple[Route, ...]:
        """Triton, blocks with their own backward, and the dense form where it is asked for."""
        return (
            Route("landmark_triton", _refuse_triton, _run_triton, packed=True),
            Route("landmark_blocks", _refuse_blocks, _run_blocks, packed=True),
            Route("reference", _refuse_parts, _run_reference, auto=False),
        )

    def extra_repr(self) -> str:
        """Options."""
        return (
            f"block={self.block}, group_dropout={self.group_dropout}, pos_jump={self.pos_jump}, "
            f"retrieve={self.retrieve}, chunk={self.feed_every}, "
            f"cache_blocks={self.cache_blocks}, selection={self.selection!r}, "
            f"offload={self.offload}"
        )
