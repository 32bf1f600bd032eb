"""Token mixers with the signature of timm's attention layer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from timm.layers import DiffAttention
from torch import Tensor, nn

from zoo.combine.concat import Concat
from zoo.errors import CompatibilityError, ZooError, unknown
from zoo.host.attention import Attention
from zoo.host.factory import create
from zoo.host.spec import PartSpec, parse
from zoo.inputs import split_bias
from zoo.parts import Position
from zoo.project.mha import MHA
from zoo.registry import SOCKETS, Entry

# What timm's blocks decide, and the name it goes by there.
_TOLD = {
    "dim": "embed_dim",
    "heads": "num_heads",
    "bias": "qkv_bias and proj_bias",
    "dropout": "attn_drop_rate",
    "qk_norm": "qk_norm",
    "depth": "depth (the block's index is passed on)",
    "device": "device",
    "dtype": "dtype",
}


class TokenAttention(nn.Module):
    """Any token mixer of the zoo with the signature of timm's ``Attention``; made by `bind`.

    Args:
        dim: Channels C.
        num_heads: Heads.
        qkv_bias: Biases in the projections of q, k and v.
        qk_norm: Normalise each head of q and k, by `norm_layer` or else RMSNorm.
        scale_norm: A norm before the output projection; only False is possible.
        proj_bias: Bias in the output projection.
        attn_drop: Dropout on the attention weights, in training.
        proj_drop: Dropout on the output, in training.
        norm_layer: Class of the norms of q and k.
        depth: Index of the layer, from 0.
        max_len: Tokens N, for parts that need to know.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: An option that the mechanism cannot honour.
    """

    spec: ClassVar[str] = "mha"
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        depth: int = 0,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of DiffAttention, see `bind`
        if scale_norm:
            raise ZooError(
                "scale_norm=True (scale_attn_norm of timm's ViT) cannot be honoured: the zoo has "
                "no norm between heads and output projection; allowed: False"
            )
        self.dim = dim
        self.settings: dict[str, Any] = {
            "num_heads": num_heads,
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "proj_bias": proj_bias,
            "attn_drop": attn_drop,
            "proj_drop": proj_drop,
            "norm_layer": norm_layer,
        }
        self.causal = bool(self.options.get("causal", False))
        parts = parse(self.spec)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        facts = {"dim": dim, "heads": num_heads, "dropout": attn_drop, "depth": depth, **made}
        if max_len is not None:
            facts["max_len"] = max_len
        facts = {k: v for k, v in facts.items() if k not in self.options}
        if parts[0].entry.kind == "mixer":
            self.mixer = self._module(parts[0].entry, facts)
        else:
            self.mixer = self._host(facts, made)
        self.tokens = _grid_tokens(parts, self.options)
        self.proj_drop = nn.Dropout(proj_drop)

    def _module(self, entry: Entry, facts: dict[str, Any]) -> nn.Module:
        """Build a whole module, which is told the facts it asks for."""
        wanted = inspect.signature(entry.cls).parameters
        given = self.settings
        if given["qk_norm"]:
            raise ZooError(f"qk_norm=True: {entry.name!r} is a whole module without q and k norms")
        if given["attn_drop"] and "dropout" not in wanted:
            raise ZooError(
                f"attn_drop={given['attn_drop']!r}: {entry.name!r} has no dropout inside; "
                "allowed: 0.0 (proj_drop is possible)"
            )
        if "bias" in wanted and given["qkv_bias"] != given["proj_bias"]:
            raise self._biases(entry.name)
        facts["bias"] = given["qkv_bias"]
        told = {name: value for name, value in facts.items() if name in wanted}
        # A module that is always causal, or never, has no switch for it; `bind` has checked.
        options = {k: v for k, v in self.options.items() if k != "causal" or k in wanted}
        return create(self.spec, **told, **options)

    def _host(self, facts: dict[str, Any], made: Mapping[str, Any]) -> Attention:
        """Build a host; timm sets the biases on its two sides one by one."""
        given = self.settings
        norm_layer = given["norm_layer"]
        own_norm = given["qk_norm"] and norm_layer is not None
        host = create(
            self.spec,
            bias=given["qkv_bias"] or given["proj_bias"],
            qk_norm=given["qk_norm"] and not own_norm,
            **facts,
            **self.options,
        )
        assert isinstance(host, Attention)
        for part in host.socket_parts():
            if part.insert_every is not None:
                # Without tokens of its own it would do nothing, and say nothing.
                raise CompatibilityError(
                    f"{host.part_names[part.kind]!r} needs a token of its own after every "
                    f"{part.insert_every} tokens, which no model of timm puts there; use it in "
                    "zoo.models.create('decoder_lm')"
                )
        if own_norm:
            host.q_norm = norm_layer(host.layout.qk_dim, **made)
            host.k_norm = norm_layer(host.layout.qk_dim, **made)
        if given["qkv_bias"] != given["proj_bias"]:
            side: object = host.combine if given["qkv_bias"] else host.project
            if isinstance(side, Concat):
                side.proj.register_parameter("bias", None)
            elif isinstance(side, MHA):
                side.qkv.register_parameter("bias", None)
            else:
                raise self._biases(self.spec)
        return host

    def _biases(self, name: str) -> ZooError:
        given = self.settings
        return ZooError(
            f"qkv_bias={given['qkv_bias']!r} with proj_bias={given['proj_bias']!r}: {name!r} has "
            "one switch for all its biases; give both the same value"
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C).
            attn_mask: Boolean, True may attend, or floating point, added to the scores (pairs
                at -1e4 and below are hidden); broadcastable to (B, heads, N, N).
            is_causal: Only possible for a mechanism bound with ``causal=True``, which is causal
                whatever is said here.

        Returns:
            (B, N, C).

        Raises:
            ZooError: An input that the mechanism cannot take.
        """
        if is_causal and not self.causal:
            raise ZooError(
                f"is_causal=True, but {self.spec!r} was bound without causality; "
                f"use bind({self.spec!r}, causal=True)"
            )
        if attn_mask is None:
            return self.attend(x)
        if attn_mask.ndim > 4:
            raise ZooError(
                f"attn_mask of shape {tuple(attn_mask.shape)} does not fit; allowed: anything "
                "that broadcasts to (batch, heads, N, N)"
            )
        mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
        if mask.dtype == torch.bool:
            return self.attend(x, mask)
        if not mask.is_floating_point():
            raise ZooError(f"attn_mask has dtype {mask.dtype}; allowed: torch.bool or floating")
        # A host tells what only hides by itself; a whole module takes nothing else.
        return self.attend(x, *split_bias(mask))

    def attend(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Mix the tokens x (B, N, C).

        Args:
            x: Tokens.
            mask: Boolean, True may attend, of rank 4.
            bias: Added to the scores, of rank 4.

        Raises:
            ZooError: The tokens are not those of the grid, or an input cannot be honoured.
        """
        if x.ndim == 4:
            raise ZooError(
                f"x of shape {tuple(x.shape)} is a feature map, but {self.spec!r} mixes tokens "
                "(batch, N, dim); in a ResNet use zoo.timm.feature"
            )
        if self.tokens is not None and x.shape[1] != self.tokens:
            raise ZooError(
                f"x has {x.shape[1]} tokens, but the grid of {self.spec!r} and its prefix make "
                f"{self.tokens}; bind it with the grid of this image size"
            )
        inputs = {"mask": mask, "bias": bias}
        given = {name: item for name, item in inputs.items() if item is not None}
        if "bias" in given and not isinstance(self.mixer, Attention):
            raise ZooError(
                f"{self.spec!r} forms no scores that a floating attn_mask could be added to; "
                "allowed: a boolean one"
            )
        y: Tensor = self.mixer(x, **given)
        return self.proj_drop(y)

    def init_weights(self) -> None:
        """Give special parts their own initialisation back; timm calls this after its own."""
        init_special(self)

    def reset_parameters(self) -> None:
        """Same as `init_weights`: everything else resets itself."""
        self.init_weights()

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made on the fly, so pickle could not find it by name.
        return _empty, (self.spec, dict(self.options)), self.__dict__


def _empty(spec: str, options: Mapping[str, Any]) -> TokenAttention:
    cls = bind(spec, **options)
    return cls.__new__(cls)


def _grid_tokens(parts: Sequence[PartSpec], options: Mapping[str, Any]) -> int | None:
    """Tokens that a mechanism on a grid expects, or None for one that takes any number."""
    for part in parts:
        known = {**options, **part.options}
        if "grid" in part.entry.options and known.get("grid") is not None:
            return math.prod(known["grid"]) + known.get("prefix", 0)
    return None


def init_special(model: nn.Module) -> None:
    """Run `reset_parameters` of every part that has an initialisation of its own.

    timm's ViT and Swin get there by themselves; its ResNet overwrites convolutions without asking.
    """
    for module in model.modules():
        if getattr(module, "special_init", False):
            module.reset_parameters()  # type: ignore[operator]


def parse_given(given: object, call: str) -> list[PartSpec]:
    """Read the specification given to `bind` or `feature`.

    Args:
        given: The argument.
        call: Name of the function, for the error.

    Raises:
        ZooError: Not a string, or not a specification.
    """
    if not isinstance(given, str):
        raise ZooError(
            f"{call} takes a name, not {given!r}; allowed: a specification such as 'mha', or "
            "'package.module:Class' for a class of your own, with options beside it"
        )
    return parse(given)


def bind(spec: str, /, **options: Any) -> type[TokenAttention]:
    """Make the class that timm's ``attn_layer`` argument wants.

    Args:
        spec: Any token mixer: parts joined by ``+``, or a whole module.
        options: Options of the host (``causal=True``, ``kv_heads``, ...) and of the parts. What
            timm tells its layers (dim, heads, biases, dropout) cannot be set here.

    Raises:
        ZooError: Unknown name or option, or not a token mixer.
        CompatibilityError: A part that cannot work here.
    """
    parts = parse_given(spec, "bind")
    allowed = {"causal"}
    needs_depth = False
    for part in parts:
        entry = part.entry
        if entry.kind not in (*SOCKETS, "mixer"):
            raise ZooError(
                f"{part.name!r} is of kind {entry.kind!r}, but a ViT needs a token mixer"
                + ("; give it to a ResNet by zoo.timm.feature" if entry.kind == "feature" else "")
            )
        if issubclass(entry.cls, Position) and entry.cls.embeds:
            raise CompatibilityError(
                f"{part.name!r} adds positions to embeddings, which would happen in every layer; "
                "use timm's pos_embed, or zoo.models.create('vit'), which adds them once"
            )
        causal = options.get("causal", False)
        if not (entry.traits.causal if causal else entry.traits.bidirectional):
            raise CompatibilityError(
                f"causal={causal!r} is not possible with {part.name!r}; allowed: {not causal}"
            )
        wanted = inspect.signature(entry.cls).parameters
        needs_depth |= "depth" in wanted
        allowed |= set(wanted if entry.kind == "mixer" else entry.options)
    if parts[0].entry.kind in SOCKETS:
        allowed |= set(inspect.signature(Attention).parameters) - {"spec"}
    for name in options:
        if name in _TOLD:
            raise ZooError(f"option {name!r} is told by timm; set {_TOLD[name]} there")
        if name not in allowed:
            raise unknown(f"option of {spec!r}", name, allowed - set(_TOLD))
    # timm tells the index of a layer to subclasses of its DiffAttention and to no other class.
    bases = (TokenAttention, DiffAttention) if needs_depth else (TokenAttention,)
    body = {
        "__doc__": TokenAttention.__doc__,
        "__module__": __name__,
        "spec": spec,
        "options": MappingProxyType(options),
    }
    return type("TokenAttention", bases, body)
