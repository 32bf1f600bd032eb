"""MoBA: mixture of block attention (Lu et al. 2025), causal: the best few blocks of the past.

Keys are cut into blocks of `block` tokens. A query attends to its own block, as far as causality
lets it, and to the topk - 1 past blocks whose mean key it likes best:

    kbar_i = mean of the keys in block i                  (n, D), n = ceil(N / block)
    g_ti   = q_t . kbar_i   for i < c(t) = t // block     (N, n), float32 at least, not scaled
    S_t    = own block + the topk - 1 blocks of largest g_ti, as far as there are any
    o_t    = softmax over all visible tokens of the blocks in S_t of q_t . k_j / sqrt(D), times v

Each head of queries chooses for itself, also where heads share keys. The gate has no parameters, no
gate value enters the output, and no gradient passes through the choice: q and k learn through the
softmax alone. Keys are those that attention itself meets, after rotation. A short last block can
only ever be the own one. Packed sequences count their blocks from their own first tokens.

Cost N topk block D per head, and N (N / block) D for the gate. The route "moba_gather" (CPU) brings
the queries of each block together and merges what they get; "moba_triton" is its like on a GPU.
With `mode="full"`, and while there are no more than topk blocks, SDPA takes the pass
("moba_full"). The mode may change at any time, such as for the last tenth of training.

What is left open, or differs:

- The official code decodes with full attention over the cache: after a first pass, which fills an
  empty cache and selects, later ones see everything. That is `decode_mode="full"`, the default.
  With "moba" decoding equals the parallel form; the means of finished blocks stay in the cache.
- Among equal gate values the first block is taken; there are never more than topk.
- Masks: the official code ignores padding. Here blocks are counted from the first token whatever it
  is (so that models generate from prompts of one length only); hidden keys do not count in the
  means (with a mask of pairs, a block's gate value is the mean of q_t . k_j over the keys visible
  to t), and a block without a visible key is not chosen.
- `key_conv` is FlashMoBA's (Xiao et al. 2025, "Optimizing Mixture of Block Attention"): a depthwise
  causal convolution over keys, k'_t = k_t + SiLU(sum_{l < key_conv} w_l * k_{t-l}), for gate and
  attention alike. Their repository holds no such code; here it comes before rotation, and w starts
  as convolutions do, uniform within 1 / sqrt(key_conv). A hidden key would reach its successors
  through it, so that the only masks taken beside it are those that hide the last keys for all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.cache import LayerCache
from zoo.errors import ZooError
from zoo.host.refusals import refuse_extras, refuse_masks, refuse_parts, refuse_position
from zoo.host.routes import SDPA
from zoo.kernels import refuse as refuse_kernel
from zoo.parts import Call, Host, Layout, Route, Select, Strip
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.select._moba_attention import (
    choose_blocks,
    gathered,
    kernel,
    moba_attention,
    moba_attention_reference,
    on_meta,
    opaque,
)
from zoo.select._moba_gate import Blocks, block_means, gate, lay_blocks, visible

__all__ = ("MoBA", "choose_blocks", "moba_attention", "moba_attention_reference")

MODES = ("moba", "full")
# Tokens below which gathering costs more than a mask hides (one thread of a CPU, D = 16 to 64).
SHORT = 1024


def _refuse_parts(host: Host) -> str | None:
    dense = {"score": "dot", "normalize": "softmax"}
    return refuse_parts(host, dense) or refuse_position(host)


def _refuse(host: Host, call: Call) -> str | None:
    """Why no form of MoBA's own can take a pass."""
    if "chosen" not in call.prepared["select"]:
        return "every block is visible, so this is plain attention"
    reason = _refuse_parts(host) or refuse_extras(call)
    if reason is None and call.q.shape[2] != call.k.shape[2]:
        return "there are cached keys"
    return reason


def _refuse_gather(host: Host, call: Call) -> str | None:
    reason = _refuse(host, call) or opaque() or on_meta(call.q)
    if reason is None and host.route == "auto" and call.q.shape[2] < SHORT:
        return f"a mask is quicker than gathering below {SHORT} tokens"
    return reason


def _refuse_triton(host: Host, call: Call) -> str | None:
    by_name = host.route == "moba_triton"
    return _refuse(host, call) or refuse_kernel(call.q, call.k, call.v, by_name=by_name)


def _refuse_full(host: Host, call: Call) -> str | None:
    if "chosen" in call.prepared["select"]:
        return "not every block is visible"
    reason = _refuse_parts(host) or refuse_masks(call)
    if reason is None and call.dropout and call.q.device.type == "cpu":
        return "its CPU form with dropout holds all N x M weights"
    return reason


def _run_gather(host: Host, call: Call) -> Tensor:
    return gathered(*_inputs(host, call))


def _run_triton(host: Host, call: Call) -> Tensor:
    return kernel(*_inputs(host, call))


def _inputs(host: Host, call: Call) -> tuple[Any, ...]:
    assert isinstance(host.select, MoBA)
    chosen = call.prepared["select"]["chosen"]
    return call.q, call.k, call.v, chosen, host.select.block, call.scale, call.cu_seqlens


def _run_reference(host: Host, call: Call) -> Tensor:
    part = host.select
    assert isinstance(part, MoBA)
    return moba_attention_reference(
        call.q,
        call.k,
        call.v,
        part.block,
        part.topk,
        cu_seqlens=call.cu_seqlens,
        scale=call.scale,
    )


@register(
    "moba",
    kind="select",
    contender="moba(block=8, topk=2)",
    paper=Paper("MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, "2502.13189"),
    traits=Traits(bidirectional=False, cross=False, cost="N * topk * block"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="sparse",
        representations="single",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="block_sparse",
        modality=("text",),
    ),
    parameters="key_conv * k_heads * qk_dim",
    notes="decode equals the parallel form with decode_mode='moba'; by default, as in the official "
    "code, steps after the first pass see the whole cache.",
)
class MoBA(Select):
    """A query's own block and the past blocks whose mean keys it likes best.

    Args:
        block: Tokens of a block.
        topk: Blocks that a query sees, its own one counted.
        mode: "moba", or "full" for plain attention; `set_mode` changes it.
        decode_mode: What passes after the first one with a cache see: "full" (all) or "moba".
        key_conv: Width of the convolution over keys, odd; 0 for none.
        full_after: Share of the training steps after which attention is full, as in the report's
            hybrid recipe (0.9 there); trainers say how far they are. None for never.
        layout: Heads and widths.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: `block` or `topk` below 1, `key_conv` even or negative, `full_after` not between
            0 and 1, or an unknown mode.
    """

    def __init__(
        self,
        layout: Layout,
        block: int = 64,
        topk: int = 3,
        mode: str = "moba",
        decode_mode: str = "full",
        key_conv: int = 0,
        full_after: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.block, self.topk = checks.whole("block", block), checks.whole("topk", topk)
        if isinstance(key_conv, bool) or key_conv != 0:
            key_conv = checks.odd("key_conv", key_conv, also="such as 3, or 0 for none")
        share = checks.optional(checks.number)
        full_after = share("full_after", full_after, above=0, below=1)
        if full_after is not None and mode != "moba":
            raise checks.wrong("full_after", full_after, f"None with mode={mode!r}")
        self.decode_mode = checks.choice("decode_mode", decode_mode, MODES)
        self.key_conv, self.full_after = key_conv, full_after
        self.set_mode(mode)
        self.key_weight: nn.Parameter | None = None
        if key_conv:
            shape = (key_conv, layout.k_heads, 1, layout.qk_dim)
            self.key_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolution as torch draws its own."""
        if self.key_weight is not None:
            bound = self.key_conv**-0.5
            nn.init.uniform_(self.key_weight, -bound, bound)

    @property
    def counts(self) -> bool:  # type: ignore[override]
        """Whether blocks are counted from the first token."""
        return self.mode != "full"

    def set_mode(self, mode: str) -> None:
        """Switch between "moba" and "full" attention.

        Raises:
            ZooError: Any other mode.
        """
        checks.choice("mode", mode, MODES)
        self.mode = mode

    def advance(self, done: float) -> None:
        """Switch to full attention for the last part of training, where `full_after` asks so."""
        if self.full_after is not None:
            self.set_mode("full" if done >= self.full_after else "moba")

    def change_keys(self, k: Tensor, cache: LayerCache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Add what the convolution finds in each key and those before it, (B, G, N, D)."""
        if self.key_weight is None:
            return k
        length, before = k.shape[2], self.key_conv - 1
        held = k if cache is None else cache.extend("moba_keys", k, keep=before)
        held = F.pad(held, (0, 0, before - (held.shape[2] - length), 0))
        index = torch.arange(length, device=k.device)
        if cu_seqlens is not None:  # tokens since the first of the sequence
            starts = cu_seqlens.long()
            index = index - starts[torch.searchsorted(starts, index, right=True) - 1]
        total = self.key_weight[0] * k
        for lag in range(1, self.key_conv):
            earlier = self.key_weight[lag] * held[:, :, before - lag : before - lag + length]
            if cu_seqlens is not None:
                earlier = earlier.masked_fill((index < lag)[:, None], 0.0)
            total = total + earlier
        return (k + F.silu(total)).to(k.dtype)  # autocast leaves the weights, and so the sum, wide

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """Choose blocks for the whole pass, unless all of them are visible."""
        self._check_mask(call)
        step = call.cache is not None and call.q_start > 0
        full = self.mode == "full" or (step and self.decode_mode == "full")
        if full or call.k.shape[2] <= self.block * self.topk:
            return {}
        queries, keys = call.q.shape[2], call.k.shape[2]
        blocks = lay_blocks(queries, keys, self.block, call.cu_seqlens, call.q.device)
        means = self._means(call, blocks) if self.decode_mode == "moba" else None
        k, picks = call.k.detach(), self.topk - 1
        chosen = gate(call.q.detach(), k, blocks, picks, mask=call.mask, means=means)
        return {"chosen": chosen, "blocks": blocks}

    def _check_mask(self, call: Call) -> None:
        """Refuse masks whose hidden keys the convolution would carry to visible ones."""
        mask = call.mask
        if self.key_conv < 2 or mask is None:
            return
        right = mask.shape[1] == mask.shape[2] == 1
        if right and not torch.compiler.is_compiling():  # else their values are not known
            right = not bool((mask[..., 1:] & ~mask[..., :-1]).any())
        if not right:
            raise ZooError(
                f"mask of shape {tuple(mask.shape)}: key_conv={self.key_conv} mixes each key with "
                "those before it; allowed: masks (B, 1, 1, M) that hide keys at the end only"
            )

    def _means(self, call: Call, blocks: Blocks) -> Tensor | None:
        """Mean keys of the finished blocks, those known from the cache; None without a cache."""
        if call.cache is None:
            return None
        with torch.no_grad():
            held = call.cache.get("moba_means")
            done = 0 if held is None else held.shape[2]
            fresh = call.k[:, :, done * self.block :]
            count = blocks.count - done
            new = lay_blocks(0, count * self.block, self.block, None, call.k.device)
            return call.cache.extend("moba_means", block_means(fresh, new))

    def allow(self, strip: Strip) -> Tensor | None:
        """(B, score_heads, R, M): the chosen blocks and the own one, or None for all."""
        prepared = strip.prepared("select")
        if "chosen" not in prepared:
            return None
        chosen, blocks = prepared["chosen"][strip.batch, :, strip.rows], prepared["blocks"]
        count = strip.call.k.shape[2] // self.block + 1
        return visible(chosen, blocks.own[strip.rows], blocks.keys[strip.keys], count)

    def routes(self) -> tuple[Route, ...]:
        """Plain attention where all is visible, Triton, gathered queries, and the official form."""
        return (
            Route("moba_full", _refuse_full, SDPA.run),
            Route("moba_triton", _refuse_triton, _run_triton, packed=True),
            Route("moba_gather", _refuse_gather, _run_gather, packed=True),
            Route("reference", _refuse, _run_reference, auto=False, packed=True),
        )

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"block={self.block}, topk={self.topk}, mode={self.mode!r}, "
            f"decode_mode={self.decode_mode!r}, key_conv={self.key_conv}, "
            f"full_after={self.full_after}"
        )
