"""The network of `zoo.models.vision.residual_attention`; its methods are those of timm's models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo import checks
from zoo.errors import ZooError, unknown
from zoo.feature._residual_mask import make_pool
from zoo.feature._residual_units import Unit, make_conv, start, to_fast_format
from zoo.feature.residual import POOLS, AttentionModule

STEMS = ("imagenet", "cifar")
GLOBAL_POOLS = ("avg", "avgmax", "max", "catavgmax", "")


class TrunkModule(nn.Module):
    """An attention module with something else in the place of its mask: R^p(gate(R^t(R^p(x)))).

    Args:
        channels: Channels C.
        gate: Makes a module (B, C, H, W) -> (B, C, H, W) for so many channels; None for the trunk
            alone, the plain residual network.
        p: Units before and after.
        t: Units of the trunk.
        zero_init: Start each unit as its shortcut.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        channels: int,
        gate: Callable[..., nn.Module] | None = None,
        p: int = 1,
        t: int = 2,
        zero_init: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        parts = [
            nn.Sequential(
                *(Unit(channels, channels, device=device, dtype=dtype) for _ in range(number))
            )
            for number in (p, t, p)
        ]
        self.pre, self.trunk, self.post = parts
        start(self, zero_init)
        self.gate = nn.Identity() if gate is None else gate(channels, device=device, dtype=dtype)

    def trunk_units(self) -> list[Unit]:
        """Units in their order."""
        return [u for u in (*self.pre, *self.trunk, *self.post) if isinstance(u, Unit)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return self.post(self.gate(self.trunk(self.pre(x))))


class ResidualAttentionNet(nn.Module):
    """Image classifier of stacked attention modules (Wang et al. 2017); the methods are timm's.

    Args:
        modules: Attention modules in each of the three stages.
        widths: Channels of the three stages and of the last, unattended one; multiples of 4. The
            stem has a quarter of the first.
        stem: "imagenet" reduces by 4, "cifar" keeps the size.
        depths: Poolings in the masks of each stage; default (3, 2, 1) with the stem "imagenet",
            (2, 1, 0) with "cifar".
        num_classes: Logits; 0 for none.
        in_chans: Channels of the images.
        p: Units around the branches of a module.
        t: Units of its trunk.
        r: Units of its mask after each change of size.
        mask: "mixed", "channel" or "spatial".
        residual: (1 + M) T; False for M T.
        pool: "ceil" or "pad", in the stem and the masks.
        extra_adds: Further sums in masks that are pooled, as in the PyTorch version.
        zero_init: Start each unit as its shortcut.
        gate: Instead of masks, a module of this kind on the output of each trunk; `nn.Identity`
            makes the plain network. Called with channels, device and dtype.
        global_pool: Pooling of timm: avg, avgmax, max, catavgmax or "".
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the trunk's last unit; rises linearly from 0.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A value that is not possible.

    Source: table 2 and section 3.3; the published network descriptions.
    """

    def __init__(
        self,
        modules: Sequence[int] = (1, 1, 1),
        widths: Sequence[int] = (256, 512, 1024, 2048),
        stem: str = "imagenet",
        depths: Sequence[int | str] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        p: int = 1,
        t: int = 2,
        r: int = 1,
        mask: str = "mixed",
        residual: bool = True,
        pool: str = "ceil",
        extra_adds: bool = False,
        zero_init: bool = True,
        gate: Callable[..., nn.Module] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.choice("stem", stem, STEMS)
        checks.choice("pool", pool, POOLS)
        modules = checks.wholes("modules", modules, 3, 0)
        widths = checks.wholes("widths", widths, 4, 4)
        if any(width % 4 for width in widths):
            raise checks.wrong("widths", widths, "multiples of 4")
        in_chans = checks.whole("in_chans", in_chans)
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            checks.number(name, rate, 0, below=1)
        _check_head(num_classes, global_pool)
        masks = {"r": r != 1, "mask": mask != "mixed", "residual": residual is not True}
        for name, given in {
            **masks,
            "extra_adds": extra_adds,
            "depths": depths is not None,
        }.items():
            if gate is not None and given:
                raise ZooError(f"{name} belongs to masks, which a network with a gate has none of")
        if depths is None:
            depths = (3, 2, 1) if stem == "imagenet" else (2, 1, 0)
        elif not isinstance(depths, list | tuple) or len(depths) != 3:
            raise checks.wrong("depths", depths, "one for each of 3 stages")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.drop_rate, self.grad_checkpointing = num_classes, drop_rate, False
        first = widths[0] // 4
        large = stem == "imagenet"
        self.conv1 = make_conv(in_chans, first, 7 if large else 3, 2 if large else 1, device, dtype)
        self.bn1 = nn.BatchNorm2d(first, **dd)
        self.maxpool = make_pool(pool) if large else nn.Identity()
        self.stages = nn.ModuleList()
        before, reduction = first, 4 if large else 1
        self.feature_info = [
            {"num_chs": first, "reduction": 2 if large else 1, "module": "bn1"},
        ]
        for i, width in enumerate(widths):
            stage = nn.Sequential(Unit(before, width, 1 if i == 0 else 2, **dd))
            for _ in range(modules[i] if i < 3 else 0):
                if gate is not None:
                    stage.append(TrunkModule(width, gate, p, t, zero_init, **dd))
                    continue
                # A mask that is not pooled has nothing to add.
                adds = extra_adds and depths[i] != 0
                options = (depths[i], p, t, r, mask, residual, pool, adds, zero_init)
                stage.append(AttentionModule(width, *options, **dd))
            if i == 3:
                stage.extend(Unit(width, width, **dd) for _ in range(2))
            self.stages.append(stage)
            reduction, before = reduction * (1 if i == 0 else 2), width
            self.feature_info.append(
                {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            )
        self.norm = nn.BatchNorm2d(before, **dd)
        self.num_features = before
        self.global_pool, self.fc = create_classifier(before, num_classes, global_pool, **dd)
        self.head_hidden_size = before * self.global_pool.feat_mult()
        start(self.conv1, zero_init)
        for block in self._blocks():
            if isinstance(block, Unit):
                start(block, zero_init)
        units = self.trunk_units()
        rates: Any = calculate_drop_path_rates(drop_path_rate, len(units))
        for unit, rate in zip(units, rates, strict=True):
            unit.drop_path = DropPath(rate) if rate else nn.Identity()

    def _blocks(self) -> Iterator[Unit | AttentionModule | TrunkModule]:
        for stage in self.stages:
            for block in stage.children():
                assert isinstance(block, Unit | AttentionModule | TrunkModule)
                yield block

    def trunk_units(self) -> list[Unit]:
        """Units of the trunk's path, in their order."""
        units: list[Unit] = []
        for block in self._blocks():
            units += [block] if isinstance(block, Unit) else block.trunk_units()
        return units

    @property
    def depth(self) -> int:
        """Weighted layers on the trunk's path: 36 m + 20 for the paper's networks."""
        return 3 * len(self.trunk_units()) + 2

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names by depth, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^conv1|bn1", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping its maps."""
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """Return the last layer, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier on.

        Args:
            num_classes: Logits; 0 for none.
            global_pool: Another pooling; None keeps it.

        Raises:
            ZooError: A value that is not possible.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        _check_head(num_classes, global_pool)
        self.num_classes = num_classes
        weight = self.norm.weight
        self.global_pool, self.fc = create_classifier(
            *(self.num_features, num_classes, global_pool), device=weight.device, dtype=weight.dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def _stem(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.conv1.in_channels:
            raise ZooError(
                f"x of shape {tuple(x.shape)} must be (batch, in_chans={self.conv1.in_channels}, "
                "height, width)"
            )
        return F.relu_(self.bn1(self.conv1(to_fast_format(x))))

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return stage(x)
        for block in stage.children():
            contexts = partial(_count_once, block)
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stem and the stages, as timm's models give them.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Which of the five, or the last so many; None for all.
            norm: Apply the last BatchNorm and ReLU to the last map.
            stop_early: Leave out stages that none of them needs.
            output_fmt: "NCHW" only.
            intermediates_only: Leave out the final features.

        Raises:
            ZooError: Another format.
        """
        if output_fmt != "NCHW":
            raise unknown("output_fmt", output_fmt, ("NCHW",))
        wanted, last = feature_take_indices(5, indices)
        x = self._stem(x)
        found = [x] if 0 in wanted else []
        x = self.maxpool(x)
        for i, stage in enumerate(self.stages, 1):
            if stop_early and i > last:
                break
            x = self._run(stage, x)
            if i in wanted:
                found.append(F.relu(self.norm(x)) if norm and i == 4 else x)
        if intermediates_only:
            return found
        return (x if stop_early and last < 4 else F.relu(self.norm(x))), found

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to maps (B, C, H', W') after the last BatchNorm and ReLU."""
        x = self.maxpool(self._stem(x))
        for stage in self.stages:
            x = self._run(stage, x)
        return F.relu(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps to logits (B, num_classes), or to what the classifier sees."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _check_head(num_classes: int, global_pool: str) -> None:
    checks.whole("num_classes", num_classes, 0)
    checks.choice("global_pool", global_pool, GLOBAL_POOLS)
    if not global_pool and num_classes:
        raise ZooError("global_pool='' leaves maps, which a classifier cannot take; num_classes=0")


def _count_once(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpoint: the second pass leaves the running statistics as they are."""
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
