"""Where the convolutional networks of timm hold a module on feature maps.

ResNet, ResNeXt, Res2Net, SKNet, SENet   after the last norm of a residual branch
RegNet                                   after the middle convolution
EfficientNet, MobileNet                  on the widened map, before the projection
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import _efficientnet_blocks as mobile
from timm.models import regnet, res2net, resnet, senet, sknet
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.host.spec import layout
from zoo.timm.features import feature
from zoo.timm.report import Swapped, SwappedLayer
from zoo.timm.tokens import init_special

# The attribute of a block that holds the module, and the convolution that says how many channels
# the module sees: as its outputs, or as the inputs of the one that comes next.
_OUT, _IN = "out_channels", "in_channels"
_PLACES: dict[type[nn.Module], tuple[str, str, str]] = {
    resnet.BasicBlock: ("se", "conv2", _OUT),
    resnet.Bottleneck: ("se", "conv3", _OUT),
    res2net.Bottle2neck: ("se", "conv3", _OUT),
    sknet.SelectiveKernelBasic: ("se", "conv2.conv", _OUT),
    sknet.SelectiveKernelBottleneck: ("se", "conv3.conv", _OUT),
    senet.Bottleneck: ("se_module", "conv3", _OUT),
    senet.SEResNetBlock: ("se_module", "conv2", _OUT),
    regnet.Bottleneck: ("se", "conv3.conv", _IN),
    mobile.DepthwiseSeparableConv: ("se", "conv_pw", _IN),
    mobile.InvertedResidual: ("se", "conv_pwl", _IN),
    mobile.EdgeResidual: ("se", "conv_pwl", _IN),
    mobile.UniversalInvertedResidual: ("se", "pw_proj.conv", _IN),
}
HOSTS = "ResNet, ResNeXt, Res2Net, SKNet, SENet, RegNet, EfficientNet and MobileNet"


@dataclass(frozen=True)
class Place:
    """A place for a module on feature maps.

    Args:
        name: Path of the place in the model.
        block: Block that it belongs to.
        attribute: Attribute of the block.
        channels: Channels of the maps there.
        weight: A parameter beside it, which says device and type.
    """

    name: str
    block: nn.Module
    attribute: str
    channels: int
    weight: Tensor

    @property
    def module(self) -> nn.Module | None:
        """What stands there, or None."""
        found = getattr(self.block, self.attribute)
        return None if isinstance(found, nn.Identity) else found


def places(model: nn.Module) -> list[Place]:
    """Places for modules on feature maps, in the order of the model."""
    found = []
    for name, block in model.named_modules():
        known = next((v for cls, v in _PLACES.items() if isinstance(block, cls)), None)
        if known is None:
            continue
        attribute, path, side = known
        conv: Any = block.get_submodule(path)
        full = f"{name}.{attribute}" if name else attribute
        found.append(Place(full, block, attribute, getattr(conv, side), conv.weight))
    return found


def swap_features(
    model: nn.Module,
    spec: str | type[nn.Module] | Sequence[Any] | Mapping[str, Any],
    layers: Mapping[str, Any] | None,
    copy: bool,
    options: Mapping[str, Any],
) -> Swapped:
    """Put modules on feature maps into a convolutional network; see `zoo.timm.swap`.

    Raises:
        ZooError: The model has no place for them; nothing is changed then.
    """
    every = places(model)
    if not every:
        first: Any = spec.get("default") if isinstance(spec, Mapping) else spec
        name = first if isinstance(first, str | type) else first[0]
        raise ZooError(
            f"{name!r} is of kind 'feature', but {type(model).__name__} has no place for a module "
            f"on feature maps; swap puts them into the blocks of timm's {HOSTS} (when those are "
            "made: zoo.timm.feature), and token mixers into ViT and Swin"
        )
    # Where some blocks have a gate and others do not, that is the network's choice.
    chosen = [place for place in every if place.module is not None] or every
    if isinstance(spec, Mapping) or layers is not None:
        if not isinstance(spec, str | Mapping):
            raise ZooError(f"layers={layers!r} goes with one name, not with {spec!r}")
        specs: list[Any] = list(layout(spec, len(chosen), layers))
    elif isinstance(spec, str | type):
        specs = [spec] * len(chosen)
    else:
        specs = list(spec)
        if len(specs) != len(chosen):
            raise ZooError(
                f"spec={specs!r} must have one entry for each of the {len(chosen)} places"
            )
    new, said = [], []
    for place, given in zip(chosen, specs, strict=True):
        made: dict[str, Any] = {"device": place.weight.device, "dtype": place.weight.dtype}
        module = feature(given, **options)(place.channels, **made)
        init_special(module)
        same = copy and _alike(place.module, module)
        if same:
            _bare(module).load_state_dict(_bare(place.module).state_dict())
        names = tuple(name for name, _ in module.named_parameters())
        text = given if isinstance(given, str) else given.__name__
        taken = {"copied" if same else "fresh": names}
        said.append(SwappedLayer(place.name, text, **taken))
        new.append(module.train(place.block.training))
    for place, module in zip(chosen, new, strict=True):
        setattr(place.block, place.attribute, module)
    return Swapped(tuple(said))


def _bare(module: Any) -> nn.Module:
    """The module of timm inside one of the zoo's baselines."""
    inner = getattr(module, "inner", None)
    return inner if isinstance(inner, nn.Module) else module


def _alike(old: nn.Module | None, new: nn.Module) -> bool:
    """Whether two modules compute the same from the same weights: equal classes and settings."""
    if old is None:
        return False
    a, b = _bare(old), _bare(new)
    return type(a) is type(b) and repr(a) == repr(b)


@torch.no_grad()
def check_maps(model: nn.Module, image_shape: Sequence[int]) -> None:
    """Try a network on an empty image, so that maps which do not fit are refused at once.

    Args:
        model: Network with modules on feature maps in the places that `places` finds.
        image_shape: Channels, height and width.

    Raises:
        ZooError: A module cannot take the maps where it stands, or does not keep their shape; the
            message names the place and the size of the map.
    """
    hooks = []
    before: dict[nn.Module, bool] = {m: m.training for m in model.modules()}

    def guard(place: Place, module: nn.Module) -> Callable[..., None]:
        forward = module.forward

        def run(x: Tensor) -> Tensor:
            try:
                y: Tensor = forward(x)
            except (ZooError, RuntimeError) as error:
                raise ZooError(
                    f"{place.name}: maps of {x.shape[2]} x {x.shape[3]} with {x.shape[1]} channels "
                    f"do not suit {type(module).__name__} ({error}); allowed: larger images than "
                    f"{tuple(image_shape)}, or a network that shrinks them less"
                ) from error
            if y.shape != x.shape:
                raise ZooError(
                    f"{place.name}: {type(module).__name__} turns maps {tuple(x.shape)} into "
                    f"{tuple(y.shape)}; a module on feature maps keeps their shape"
                )
            return y

        module.forward = run
        return lambda: module.__dict__.pop("forward")

    try:
        for place in places(model):
            if place.module is not None:
                hooks.append(guard(place, place.module))
        weight = next(model.parameters())
        model.eval()
        model(torch.zeros(1, *image_shape, device=weight.device, dtype=weight.dtype))
    finally:
        for undo in hooks:
            undo()
        for module, training in before.items():
            module.training = training
