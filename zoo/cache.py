"""Caches for step-by-step decoding: growing key/value entries and fixed-size recurrent state.

A `Cache` has one `LayerCache` per attention layer. Parts keep whatever they need in it under
names of their own: `extend` for entries that grow with the sequence (keys, values, gate keys),
`get_state` and `set_state` for recurrent state (linear attention, short convolutions).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError


@dataclass
class _Entry:
    buffer: Tensor
    size: int  # tokens held, the first `size` along `dim` of the buffer
    dim: int
    batched: bool
    owned: bool = False  # the buffer is ours to write into, not a caller's tensor
    offload: bool = False  # held in main memory

    def view(self) -> Tensor:
        return self.buffer.narrow(self.dim, 0, self.size)


class LayerCache:
    """What one layer remembers of the tokens seen so far.

    Attributes:
        length: Tokens seen, including those that a window has let go.
    """

    def __init__(self) -> None:
        self.length = 0
        self._entries: dict[str, _Entry] = {}
        self._states: dict[str, Tensor] = {}

    def extend(
        self,
        name: str,
        new: Tensor,
        *,
        dim: int = -2,
        keep: int | None = None,
        batched: bool = True,
        offload: bool = False,
    ) -> Tensor:
        """Append along `dim` and return everything held, including what is dropped afterwards.

        Args:
            name: Name of the entry.
            new: The new tokens' tensor.
            dim: The token axis.
            keep: Hold at most this many of the latest tokens for the next call; None holds all.
            batched: Axis 0 is the batch (so that `select` applies to it).
            offload: Hold the entry in main memory; what is returned lies there too.

        Raises:
            ZooError: The new tokens do not fit those held in another axis than `dim`, or are of
                another type.
        """
        dim %= new.ndim
        if offload:
            new = new.cpu()
        old = self._entries.get(name)
        if old is not None:
            held, got = list(old.buffer.shape), list(new.shape)
            if held[:dim] + held[dim + 1 :] != got[:dim] + got[dim + 1 :]:
                raise ZooError(
                    f"cache entry {name!r} holds {tuple(old.view().shape)}; new tokens of shape "
                    f"{tuple(got)} differ in more than their number (axis {dim})"
                )
            if old.buffer.dtype != new.dtype:
                raise ZooError(
                    f"cache entry {name!r} holds {old.buffer.dtype}, but the new tokens are "
                    f"{new.dtype}; go on as the cache was filled, under the same autocast, or "
                    "convert it with cache.to(dtype)"
                )
        if old is not None and keep is None and not torch.is_grad_enabled():
            return self._append(old, new)
        full = new if old is None else torch.cat([old.view(), new], dim)
        size = full.shape[dim] if keep is None else min(keep, full.shape[dim])
        kept = full.narrow(dim, full.shape[dim] - size, size)
        self._entries[name] = _Entry(kept, size, dim, batched, offload=offload)
        return full

    @staticmethod
    def _append(entry: _Entry, new: Tensor) -> Tensor:
        """Write into spare room, doubling it when it runs out: amortised O(new) per step."""
        total = entry.size + new.shape[entry.dim]
        if not entry.owned or entry.buffer.shape[entry.dim] < total:
            shape = list(entry.buffer.shape)
            shape[entry.dim] = 2 * total
            bigger = entry.buffer.new_zeros(shape)
            bigger.narrow(entry.dim, 0, entry.size).copy_(entry.view())
            entry.buffer, entry.owned = bigger, True
        entry.buffer.narrow(entry.dim, entry.size, new.shape[entry.dim]).copy_(new)
        entry.size = total
        return entry.view()

    def get(self, name: str) -> Tensor | None:
        """Entry held under a name, or None."""
        entry = self._entries.get(name)
        return None if entry is None else entry.view()

    def get_state(self, name: str) -> Tensor | None:
        """Recurrent state held under a name (batch first), or None."""
        return self._states.get(name)

    def set_state(self, name: str, value: Tensor) -> None:
        """Replace a recurrent state (batch first)."""
        self._states[name] = value

    def check_crop(self, length: int) -> None:
        """Make sure that `crop` would succeed.

        Raises:
            ZooError: As `crop`.
        """
        checks.whole("crop length", length, 0, self.length)
        if length == self.length:
            return
        if self._states:
            raise ZooError(f"recurrent state {next(iter(self._states))!r} cannot be cropped")
        for name, entry in self._entries.items():
            if entry.size != self.length:
                raise ZooError(f"entry {name!r} holds a window of the past and cannot be cropped")

    def crop(self, length: int) -> None:
        """Forget all tokens after the first `length`.

        Raises:
            ZooError: A recurrent state or a rolled window cannot go back; nothing has changed.
        """
        self.check_crop(length)
        for entry in self._entries.values():
            entry.size = length
        self.length = length

    def copy(self) -> LayerCache:
        """A cache that goes on from the same past by itself; what is held is shared, not copied."""
        other = LayerCache()
        other.length = self.length
        # The copy owns no buffer, so that it never writes into the room behind a shared one.
        other._entries = {n: replace(e, owned=False) for n, e in self._entries.items()}
        other._states = dict(self._states)
        return other

    def to(self, dtype: torch.dtype) -> LayerCache:
        """Convert floating point entries and states in place, e.g. after a prefill under autocast.

        States that are kept in a wider type than `dtype` stay as they are.

        Args:
            dtype: A floating point type.

        Returns:
            The cache itself.
        """
        for entry in self._entries.values():
            if entry.buffer.is_floating_point() and entry.buffer.dtype != dtype:
                entry.buffer, entry.owned = entry.view().to(dtype), True
        for name, state in self._states.items():
            if state.is_floating_point() and torch.promote_types(state.dtype, dtype) == dtype:
                self._states[name] = state.to(dtype)
        return self

    def select(self, index: Tensor) -> None:
        """Reorder or repeat the batch, e.g. for beams: (B',) int64 indices into the batch."""
        for entry in self._entries.values():
            if entry.batched:
                at = index.to(entry.buffer.device)
                entry.buffer, entry.owned = entry.buffer.index_select(0, at), True
        self._states = {n: s.index_select(0, index) for n, s in self._states.items()}

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room not counted."""
        return self.device_nbytes + sum(
            e.view().nbytes for e in self._entries.values() if e.offload
        )

    @property
    def device_nbytes(self) -> int:
        """Bytes held where the layer computes, without what is offloaded to main memory."""
        held = [e.view() for e in self._entries.values() if not e.offload]
        return sum(t.numel() * t.element_size() for t in [*held, *self._states.values()])


class Cache:
    """One `LayerCache` per layer, made when a layer first asks for it."""

    def __init__(self) -> None:
        self._layers: dict[int, LayerCache] = {}

    def __getitem__(self, layer: int) -> LayerCache:
        if layer not in self._layers:
            self._layers[layer] = LayerCache()
        return self._layers[layer]

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return max((layer.length for layer in self._layers.values()), default=0)

    def crop(self, length: int) -> None:
        """Forget all tokens after the first `length` in every layer, or in none."""
        for layer in self._layers.values():
            layer.check_crop(length)
        for layer in self._layers.values():
            layer.crop(length)

    def copy(self) -> Cache:
        """A cache that goes on from the same past by itself; what is held is shared, not copied."""
        other = Cache()
        other._layers = {index: layer.copy() for index, layer in self._layers.items()}
        return other

    def to(self, dtype: torch.dtype) -> Cache:
        """Convert floating point entries of all layers in place; see `LayerCache.to`."""
        for layer in self._layers.values():
            layer.to(dtype)
        return self

    def select(self, index: Tensor) -> None:
        """Reorder or repeat the batch of every layer: (B',) int64 indices."""
        for layer in self._layers.values():
            layer.select(index)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes for layer in self._layers.values())

    @property
    def device_nbytes(self) -> int:
        """Bytes held by all layers where they compute, without what is offloaded."""
        return sum(layer.device_nbytes for layer in self._layers.values())
