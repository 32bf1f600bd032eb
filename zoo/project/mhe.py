"""Multiple head embeddings (Xue and Aletras 2023, "Pit One Against Many").

One projection of a single head's width serves all heads; head h is told apart by three vectors:

    q = x W_Q,  k = z W_K,  v = z W_V        W_Q, W_K, W_V (C, D) with z = x, or the context
    mul:  q_h = q * (1 + eQ_h),  k_h = k * (1 + eK_h),  v_h = v * (1 + eV_h)
    add:  q_h = q + eQ_h,        k_h = k + eK_h,        v_h = v + eV_h          eQ, eK, eV (H, D)
    o_h = softmax(q_h k_h^T / sqrt(D)) v_h, and the heads are joined as in multi-head attention

It is multi-head attention whose per-head matrices are W diag(1 + e_h) (mul), or are all alike with
a bias of their own (add). Parameters 3 C D + 3 H D, and 3 D biases. Cost: projections 1/H of those
of multi-head attention, attention itself the same; cache 2 D per token, as in multi-query.

Where the heads get their vectors does not change the numbers, and is chosen by what else the host
does with q, k and v:

- mul: q_h . k_h = (q * (1 + eQ_h) * (1 + eK_h)) . k, so where nothing but the dot product looks at
  them, both factors go into q and k stays shared: a multi-query call. Attention is linear in v, so
  1 + eV_h multiplies the heads' outputs instead.
- add: q_h . eK_h is the same for all keys, so a softmax over plain dot products does not notice
  eK, which then stays as it was drawn; other normalizers do, and get their own keys. Values are
  given theirs before attention: eV could be added behind it only where the weights of a row sum
  to 1, which dropout and rows that see nothing break.
- Otherwise the heads get their keys after the cache, which holds the shared ones.
- Rotations, and the norm of q and k, have to come after the vectors: then the heads get their keys
  before the cache, which holds H D + D numbers per token instead of 2 D.

Left open by the paper, which came without code: rotary positions (the vectors come first here) and
the initialisation, here normal with standard deviation `init_std` for the vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.cache import LayerCache
from zoo.errors import ZooError
from zoo.parts import Host, Layout, Part, Project
from zoo.registry import Paper, Taxonomy, info, register

MODES = ("mul", "add")


def mhe_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e_q: Tensor,
    e_k: Tensor,
    e_v: Tensor,
    *,
    mode: str = "mul",
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Head after head, line by line; any dtype.

    Args:
        q: Shared queries, (B, N, D).
        k: Shared keys, (B, M, D).
        v: Shared values, (B, M, D).
        e_q: Head embeddings of queries, (H, D).
        e_k: Of keys, (H, D).
        e_v: Of values, (H, D).
        mode: "mul" or "add".
        causal: Key j is seen by queries i >= j only (N = M).
        mask: Boolean, True may attend, broadcastable to (B, H, N, M), or None.
        scale: Factor on dot products; default 1 / sqrt(D).

    Returns:
        (B, H, N, D); zeros where a row sees nothing.
    """
    samples, rows, keys, heads = q.shape[0], q.shape[1], k.shape[1], e_q.shape[0]
    seen = torch.ones(samples, heads, rows, keys, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for h in range(heads):
        if mode == "mul":
            q_h, k_h, v_h = q * (e_q[h] + 1), k * (e_k[h] + 1), v * (e_v[h] + 1)
        else:
            q_h, k_h, v_h = q + e_q[h], k + e_k[h], v + e_v[h]
        scores = q_h @ k_h.transpose(-1, -2) * scale
        scores = scores.masked_fill(~seen[:, h], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).masked_fill(~seen[:, h].any(-1, keepdim=True), 0.0)
        outputs.append(weights @ v_h)
    return torch.stack(outputs, 1)


@register(
    "mhe",
    kind="project",
    paper=Paper(
        "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient "
        "Multi-head Attention",
        2023,
        "2310.07911",
    ),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="softmax",
        complexity="quadratic",
        exact="yes",
        trainable_params=True,
    ),
    parameters="(dim + heads + bias) * (2 * qk_dim + v_dim)",
)
class MHE(Project):
    """One shared head, multiplied by (or added to) three vectors for each head.

    Args:
        dim: Channels.
        layout: Head counts and widths.
        mode: What the vectors do: "mul" or "add".
        init_std: Standard deviation that the vectors are drawn with.
        bias: Add biases to the projections.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: An unknown mode, or a negative `init_std`.
    """

    special_init = True

    def __init__(
        self,
        dim: int,
        layout: Layout,
        mode: str = "mul",
        init_std: float = 0.02,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mode = checks.choice("mode of 'mhe'", mode, MODES)
        self.init_std = checks.number("init_std", init_std, 0, also="by default 0.02")
        self.layout = layout
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sizes = (layout.qk_dim, layout.qk_dim, layout.v_dim)
        self.shared = nn.Linear(dim, sum(self.sizes), bias=bias, **made)
        self.e_q, self.e_k, self.e_v = (
            nn.Parameter(torch.empty(layout.heads, size, **made)) for size in self.sizes
        )
        # Where keys and values meet their vectors; `attach` finds out what the host allows.
        self.keys, self.values = "read", "read"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head embeddings normal with std `init_std`; the projections are left to the host."""
        for vectors in (self.e_q, self.e_k, self.e_v):
            nn.init.normal_(vectors, std=self.init_std)

    @classmethod
    def choose_kv_heads(cls, heads: int, kv_heads: int | None) -> int:
        """Always one.

        Raises:
            ZooError: Another number was asked for.
        """
        if kv_heads not in (None, 1):
            raise ZooError(
                f"mhe has kv_heads=1, not {kv_heads!r}: all heads share one projection; "
                "use 'gqa' for groups"
            )
        return 1

    def attach(self, host: Host) -> None:
        """Choose where keys and values meet their vectors."""
        # What another part may read has to be the heads' own.
        readers = [part for part in host.socket_parts() if part not in (self, host.position)]
        plain = (
            host.attend is None
            and host.part_names["score"] == "dot"
            and (host.position.static or not host.position.biases)
            and info(host.part_names["select"]).taxonomy.positions in ("global", "local")
            and all(type(part).prepare is Part.prepare for part in readers)
        )
        unmoved = not host.position.rotates and host.q_norm is None
        ignored = self.mode == "mul" or host.part_names.get("normalize") == "softmax"
        if plain and unmoved and ignored:
            self.keys = "queries"
        else:
            self.keys = "read" if unmoved else "forward"
        self.values = "finish" if plain and self.mode == "mul" else "read"
        if self.keys == "forward":
            host.layout = host.layout.with_(k_heads=self.layout.heads)

    def incompatible(self, host: Host) -> str | None:
        """A normalizer that lays out the heads in another way."""
        wants = self.layout
        if (wants.score_heads, wants.k_heads, wants.v_heads) == (wants.heads, 1, 1):
            return None
        return (
            f"'mhe' shares one key head and has one vector for each of {wants.heads} heads, but "
            f"{host.part_names['normalize']!r} wants {wants.score_heads} query heads and "
            f"{wants.k_heads} key heads; use it with 'mqa'"
        )

    def forward(
        self, x: Tensor, context: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Project.forward`."""
        if context is None:
            q, k, v = self.shared(x)[:, None].split(self.sizes, -1)  # (B, 1, N, D)
        else:
            q = self._linear(x, slice(None, self.sizes[0]))
            k, v = self._linear(context, slice(self.sizes[0], None)).split(self.sizes[1:], -1)
        if self.keys == "forward":
            k = self._embed(k, self.e_k)
        return self._embed_queries(q), k, v

    def queries(self, x: Tensor) -> Tensor:
        """See `Project.queries`."""
        return self._embed_queries(self._linear(x, slice(None, self.sizes[0])))

    def read(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Give the heads their keys and values, unless that happens elsewhere."""
        if self.keys == "read":
            k = self._embed(k, self.e_k)
        if self.values == "read":
            v = self._embed(v, self.e_v)
        return k, v

    def finish(self, y: Tensor) -> Tensor:
        """Multiply the outputs where the values were shared."""
        return self._embed(y, self.e_v) if self.values == "finish" else y

    def _embed_queries(self, q: Tensor) -> Tensor:
        """Queries (B, H, N, D) of shared ones, with the keys' vectors where those go into q."""
        if self.keys != "queries":
            return self._embed(q, self.e_q)
        if self.mode == "mul":
            return self._embed(q, self.e_q, self.e_k)
        # Without influence, but with a gradient: zero, where distributed training would miss None.
        return self._embed(q, self.e_q + 0.0 * self.e_k)

    def _embed(self, x: Tensor, *vectors: Tensor) -> Tensor:
        """Multiply or add vectors (H, D) of the heads to x (B, 1 or H, N, D)."""
        # Heads behind tokens in memory, as the combination wants them: fused attention lays its
        # output out as its queries are.
        x = x.transpose(1, 2)
        if self.mode == "add":
            (vector,) = vectors
            return (x + vector.to(x.dtype)).transpose(1, 2)
        # In half precision 1 + e is rounded once, when the product is done.
        wide = torch.promote_types(vectors[0].dtype, torch.float32)
        factor = torch.ones((), dtype=wide, device=x.device)
        for vector in vectors:
            factor = factor * (1 + vector.to(wide))
        return (x * factor.to(x.dtype)).transpose(1, 2)

    def _linear(self, x: Tensor, rows: slice) -> Tensor:
        bias = self.shared.bias
        part = None if bias is None else bias[rows]
        return F.linear(x, self.shared.weight[rows], part)[:, None]  # (B, 1, N, D)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Say what is wrong with weights that were made for every head."""
        for name in ("qkv.weight", "shared.weight"):
            found = state_dict.get(prefix + name)
            if found is not None and found.shape != self.shared.weight.shape:
                error_msgs.append(
                    f"{prefix}{name} of shape {tuple(found.shape)} cannot be loaded: the "
                    "projections of 'mhe' are one head wide and shared by all heads; allowed: "
                    f"{prefix}shared.weight of shape {tuple(self.shared.weight.shape)}"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"mode={self.mode}, init_std={self.init_std}"
