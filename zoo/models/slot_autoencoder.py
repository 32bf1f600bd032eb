"""Object discovery: an image is taken apart into slots, and put together again.

    inputs = encoder(2 x - 1),  s = slots(inputs),  (parts, logits) = decoder(s)
    reconstruction = sum over k of softmax over slots(logits)_k parts_k

Locatello et al. 2020, "Object-Centric Learning with Slot Attention" (arXiv 2006.15055). In a video
the slots of a frame begin where those of the frame before ended (Zhang et al. 2023, arXiv
2301.13197). Outside training the slots are drawn from a generator of one seed, so that the same
batch gives the same figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import ZooError, unknown
from zoo.factory import create
from zoo.models import model
from zoo.models._sizes import check_image_shape, check_whole
from zoo.models._slot_coders import (
    BroadcastDecoder,
    ConvEncoder,
    Scene,
    TokenEncoder,
    TransformerDecoder,
)
from zoo.slots import SlotVideo
from zoo.spec import parse

SEED = 0
"""Of what is drawn outside training."""


def slot_module(spec: str, dim_in: int, dim: int, slots: int) -> nn.Module:
    """Build a module of kind "slots" from its specification.

    Args:
        spec: Such as "slot", "slot(normalizer=sinkhorn)" or "mesh".
        dim_in: Channels of the inputs.
        dim: Channels of a slot.
        slots: Number of slots K.

    Raises:
        ZooError: It is of another kind, or an option is wrong.
    """
    parts = parse(spec)
    if parts[0].entry.kind != "slots":
        raise ZooError(f"attention={spec!r} is of kind {parts[0].entry.kind!r}; allowed: slots")
    return create(spec, dim_in, dim, slots)


def chance(module: nn.Module, like: Tensor) -> torch.Generator | None:
    """What a model draws from: the global generator in training, one seed outside."""
    if module.training or like.is_meta:
        return None
    return torch.Generator(like.device).manual_seed(SEED)


class SlotAutoencoder(nn.Module):
    """Images (B, C, H, W) or videos (B, T, C, H, W) from 0 to 1, to a `Scene`.

    Args:
        encoder: From images to inputs (B, N, D_in).
        slots: A module of kind "slots".
        decoder: From slots (B, K, D) to parts and logits of masks.
        slot_noise: What is added to slots between frames, as in `SlotVideo`.
        image_shape: Channels, height and width.
    """

    def __init__(
        self,
        encoder: nn.Module,
        slots: nn.Module,
        decoder: nn.Module,
        slot_noise: str,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.video = SlotVideo(slots, noise=slot_noise)
        self.image_shape = image_shape

    def forward(self, x: Tensor) -> Scene:
        """Take the images apart.

        Raises:
            ZooError: They are of another size than the model was built for.
        """
        if x.ndim not in (4, 5) or tuple(x.shape[-3:]) != self.image_shape:
            raise ZooError(
                f"images of shape {tuple(x.shape)} do not fit; allowed: (B, C, H, W) or "
                f"(B, T, C, H, W) with (C, H, W) = {self.image_shape}"
            )
        frames = x if x.ndim == 5 else x[:, None]
        inputs = self.encoder(2 * frames.flatten(0, 1) - 1).unflatten(0, frames.shape[:2])
        slots = self.video(inputs, generator=chance(self, x))
        parts, logits = self.decoder(slots.flatten(0, 1))
        masks = logits.softmax(1)
        image = (masks[:, :, None] * parts).sum(1)
        if x.ndim == 4:
            return Scene(image, masks, parts, slots[:, 0])
        lead = frames.shape[:2]
        return Scene(*(item.unflatten(0, lead) for item in (image, masks, parts)), slots)


@model("slot_autoencoder", kinds=("slots",), facts=("image_shape", "max_objects"))
def slot_autoencoder(
    attention: str = "slot",
    *,
    image_shape: Sequence[int],
    max_objects: int,
    slots: int | None = None,
    dim: int = 64,
    width: int = 32,
    encoder: str = "cnn",
    stride: int = 1,
    encoder_attention: str = "mha",
    decoder: str = "spatial_broadcast",
    upsample: int = 1,
    patch: int = 4,
    depth: int = 2,
    heads: int = 4,
    slot_noise: str = "none",
) -> SlotAutoencoder:
    """Build an object-discovery model; the defaults are the paper's for images of 64 x 64.

    Args:
        attention: A mechanism of kind "slots".
        image_shape: Channels, height and width.
        max_objects: Most objects of a scene, M.
        slots: Slots K, at least M; None takes one more than M, for the background.
        dim: Channels of a slot.
        width: Channels of encoder and decoder.
        encoder: "cnn" or "vit".
        stride: Of the first convolution of the cnn.
        encoder_attention: Token mixer of the vit.
        decoder: "spatial_broadcast" or "transformer".
        upsample: Sides of the image over those of the grid that slots are broadcast to: 1 (the
            paper's for small images), 2, 4 or 8.
        patch: Side of a patch of the vit and of the transformer decoder.
        depth: Layers of the vit and of the transformer decoder.
        heads: Their heads.
        slot_noise: Noise on slots between frames: "none", "fixed" or "learned".

    Raises:
        ZooError: A size does not fit, there are fewer slots than objects, or a name is unknown.
    """
    shape = check_image_shape(image_shape)
    sizes = {"dim": dim, "width": width, "stride": stride, "patch": patch, "depth": depth}
    for name, size in {**sizes, "heads": heads, "max_objects": max_objects}.items():
        check_whole(name, size, 1)
    count = max_objects + 1 if slots is None else slots
    check_slots(count, max_objects)
    if encoder not in ("cnn", "vit"):
        raise unknown("encoder", encoder, ("cnn", "vit"))
    if decoder not in ("spatial_broadcast", "transformer"):
        raise unknown("decoder", decoder, ("spatial_broadcast", "transformer"))
    encode: nn.Module
    decode: nn.Module
    if encoder == "cnn":
        encode = ConvEncoder(shape[0], width, stride, width)
    else:
        encode = TokenEncoder(shape, encoder_attention, patch, width, depth, heads, width)
    if decoder == "spatial_broadcast":
        decode = BroadcastDecoder(dim, shape[0], shape[1:], upsample, width)
    else:
        decode = TransformerDecoder(dim, shape[0], shape[1:], patch, width, depth, heads)
    module = slot_module(attention, width, dim, count)
    return SlotAutoencoder(encode, module, decode, slot_noise, shape)


def check_slots(slots: int, max_objects: int) -> None:
    """Refuse fewer slots than there may be objects.

    Raises:
        ZooError: There are fewer.
    """
    check_whole("slots", slots, 1)
    if slots < max_objects:
        raise ZooError(
            f"slots={slots} cannot hold the max_objects={max_objects} objects of the data; "
            f"allowed: at least {max_objects}, better {max_objects + 1} with one for the background"
        )
