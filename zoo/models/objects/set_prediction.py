"""Property prediction: what objects an image holds, as a set of vectors.

Locatello et al. 2020 (arXiv 2006.15055), section on set prediction: images x from 0 to 1 go
through convolutions and slots, and each slot by itself through an MLP that ends in a sigmoid,

    y = sigmoid(MLP(slots(encoder(2 x - 1)))),   (B, C, H, W) to (B, K, P)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.models import model
from zoo.models.objects._slot_encoders import ConvEncoder
from zoo.models.objects._slot_module import chance, slot_count, slot_module


class SetModel(nn.Module):
    """Inputs through an encoder and slots to a set of vectors (B, K, P).

    Outside training the slots are drawn with one seed, so that figures can be had again.

    Args:
        encoder: From inputs to (B, N, D_in).
        slots: A module of kind "slots".
        head: From a slot (..., D) to a vector (..., P).
        shape: Shape of an input without the batch; None stands for any number.
        centred: Inputs lie between 0 and 1, and the encoder sees them from -1 to 1.
    """

    def __init__(
        self,
        encoder: nn.Module,
        slots: nn.Module,
        head: nn.Module,
        shape: tuple[int | None, ...],
        *,
        centred: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.slots, self.head = encoder, slots, head
        self.shape, self.centred = shape, centred

    def forward(self, x: Tensor) -> Tensor:
        """Say the set.

        Args:
            x: Images (B, C, H, W), or sets (B, N, P).

        Returns:
            (B, K, P).

        Raises:
            ZooError: The inputs are of another shape than the model was built for.
        """
        fits = x.ndim == 1 + len(self.shape) and all(
            wanted in (None, side) for wanted, side in zip(self.shape, x.shape[1:], strict=True)
        )
        if not fits:
            sides = ", ".join("any" if side is None else str(side) for side in self.shape)
            raise ZooError(f"x of shape {tuple(x.shape)} does not fit; allowed: (batch, {sides})")
        inputs = self.encoder(2 * x - 1 if self.centred else x)
        return self.head(self.slots(inputs, generator=chance(self, x)))


@model("set_prediction", kinds=("slots",), facts=("image_shape", "max_objects", "properties"))
def set_prediction(
    attention: str = "slot",
    *,
    image_shape: Sequence[int],
    max_objects: int,
    properties: int,
    slots: int | None = None,
    dim: int = 64,
    hidden: int | None = None,
    iterations: int | None = None,
    width: int = 64,
    stride: int = 2,
) -> SetModel:
    """Build a model that says which objects an image holds.

    Args:
        attention: A mechanism of kind "slots".
        image_shape: Channels, height and width.
        max_objects: Most objects of a scene.
        properties: Numbers P of a target.
        slots: Slots K, at least `max_objects`; None takes as many.
        dim: Channels D of a slot.
        hidden: Width of the slots' MLPs; None leaves it to `attention`.
        iterations: Rounds of the slots; None leaves them to `attention`.
        width: Channels of the encoder, and of the inputs of the slots.
        stride: Of its first convolution.

    Raises:
        ZooError: A size does not fit, there are fewer slots than objects, or a name is unknown.
    """
    shape = checks.image_shape("image_shape", image_shape)
    sizes = {"dim": dim, "width": width, "stride": stride, "properties": properties}
    for name, size in sizes.items():
        checks.whole(name, size)
    count = slot_count(slots, max_objects, background=0)
    module = slot_module(attention, width, dim, count, iterations=iterations, hidden=hidden)
    head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, properties), nn.Sigmoid())
    return SetModel(ConvEncoder(shape[0], width, stride, width), module, head, shape, centred=True)
