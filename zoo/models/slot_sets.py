"""Sets through slots: the objects of an image as vectors, and a set of points from itself.

Property prediction (Locatello et al. 2020, arXiv 2006.15055, section on sets): the slots of an
image go one by one through an MLP with sigmoids. The set autoencoder is the smallest task that
slots which begin identical cannot do (Zhang et al. 2023, arXiv 2301.13197): each point through an
MLP, slots, each slot through an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from zoo.models import model
from zoo.models._sizes import check_image_shape, check_whole
from zoo.models._slot_coders import ConvEncoder
from zoo.models.slot_autoencoder import chance, check_slots, slot_module


class SetModel(nn.Module):
    """Inputs through an encoder and slots to a set of vectors (B, K, P).

    Args:
        encoder: From inputs to (B, N, D_in).
        slots: A module of kind "slots".
        head: From a slot to a vector.
        centred: Inputs are images from 0 to 1, which the encoder sees from -1 to 1.
    """

    def __init__(
        self, encoder: nn.Module, slots: nn.Module, head: nn.Module, centred: bool
    ) -> None:
        super().__init__()
        self.encoder, self.slots, self.head, self.centred = encoder, slots, head, centred

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) or sets (B, N, D) to vectors (B, K, P)."""
        x = self.encoder(2 * x - 1 if self.centred else x)
        return self.head(self.slots(x, generator=chance(self, x)))


@model("set_prediction", kinds=("slots",), facts=("image_shape", "max_objects", "properties"))
def set_prediction(
    attention: str = "slot",
    *,
    image_shape: Sequence[int],
    max_objects: int,
    properties: int,
    slots: int | None = None,
    dim: int = 64,
    width: int = 64,
    stride: int = 2,
) -> SetModel:
    """Build a model that says which objects an image holds.

    Args:
        attention: A mechanism of kind "slots".
        image_shape: Channels, height and width.
        max_objects: Most objects of a scene.
        properties: Numbers of a target.
        slots: Slots K, at least `max_objects`; None takes as many.
        dim: Channels of a slot.
        width: Channels of the encoder.
        stride: Of its first convolution.

    Raises:
        ZooError: A size does not fit, or there are fewer slots than objects.
    """
    shape = check_image_shape(image_shape)
    sizes = {"dim": dim, "width": width, "stride": stride, "properties": properties}
    for name, size in sizes.items():
        check_whole(name, size, 1)
    count = max_objects if slots is None else slots
    check_slots(count, max_objects)
    head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, properties), nn.Sigmoid())
    encoder = ConvEncoder(shape[0], width, stride, dim)
    return SetModel(encoder, slot_module(attention, dim, dim, count), head, centred=True)


@model("set_autoencoder", kinds=("slots",), facts=("max_objects", "properties"))
def set_autoencoder(
    attention: str = "slot(init=identical)",
    *,
    max_objects: int,
    properties: int,
    slots: int | None = None,
    dim: int = 32,
    width: int = 64,
) -> SetModel:
    """Build a model that reproduces a set of vectors.

    Args:
        attention: A mechanism of kind "slots".
        max_objects: Vectors of a set.
        properties: Numbers of a vector.
        slots: Slots K, at least `max_objects`; None takes as many.
        dim: Channels of a slot.
        width: Of the MLPs.

    Raises:
        ZooError: A size does not fit, or there are fewer slots than vectors.
    """
    for name, size in {"dim": dim, "width": width, "properties": properties}.items():
        check_whole(name, size, 1)
    count = max_objects if slots is None else slots
    check_slots(count, max_objects)
    encoder, head = (
        nn.Sequential(nn.Linear(a, width), nn.ReLU(), nn.Linear(width, b))
        for a, b in ((properties, width), (dim, properties))
    )
    return SetModel(encoder, slot_module(attention, width, dim, count), head, centred=False)
