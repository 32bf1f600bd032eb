"""Object discovery: an image is taken apart into slots, and put together again.

    inputs = encoder(2 x - 1),   s = slots(inputs),   (parts, logits) = decoder(s)
    image = sum over K of softmax over K of (logits) * parts

Locatello et al. 2020, "Object-Centric Learning with Slot Attention" (arXiv 2006.15055), section on
object discovery, for images x from 0 to 1. In a video the slots of a frame begin where those of
the frame before ended (Zhang et al. 2023, arXiv 2301.13197). Nearly all of the cost is that of the
convolutions, most of it in the decoder, which runs once for each slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError, unknown
from zoo.models import model
from zoo.models.objects._slot_decoders import BroadcastDecoder, TransformerDecoder
from zoo.models.objects._slot_encoders import ConvEncoder, TokenEncoder
from zoo.models.objects._slot_module import chance, slot_count, slot_module
from zoo.slots import SlotVideo


class Scene(NamedTuple):
    """What an object-discovery model makes of images (B, ...) or videos (B, T, ...).

    Args:
        image: Reconstruction (..., C, H, W).
        masks: Share of each slot in each pixel (..., K, H, W), summing to 1 over the slots.
        parts: What each slot would paint (..., K, C, H, W).
        slots: The slots (..., K, D).
    """

    image: Tensor
    masks: Tensor
    parts: Tensor
    slots: Tensor


class SlotAutoencoder(nn.Module):
    """Images (B, C, H, W) or videos (B, T, C, H, W) from 0 to 1, to a `Scene`.

    Outside training the slots are drawn with one seed, so that figures can be had again.

    Args:
        encoder: From images to inputs (B, N, D_in).
        slots: A module of kind "slots".
        decoder: From slots (B, K, D) to parts (B, K, C, H, W) and logits (B, K, H, W).
        image_shape: Channels, height and width.
        slot_noise: What is added to slots between frames, as in `SlotVideo`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        slots: nn.Module,
        decoder: nn.Module,
        image_shape: tuple[int, int, int],
        slot_noise: str = "none",
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.video = SlotVideo(slots, noise=slot_noise)
        self.image_shape = image_shape

    def forward(self, x: Tensor) -> Scene:
        """Take images apart and put them together.

        Args:
            x: (B, C, H, W), or (B, T, C, H, W) for videos, from 0 to 1.

        Raises:
            ZooError: They are of another size than the model was built for.
        """
        if x.ndim not in (4, 5) or tuple(x.shape[-3:]) != self.image_shape:
            raise ZooError(
                f"images of shape {tuple(x.shape)} do not fit; allowed: (B, C, H, W) or "
                f"(B, T, C, H, W) with (C, H, W) = {self.image_shape}"
            )
        if x.ndim == 4 and self.video.noise != "none":
            raise ZooError(
                f"slot_noise={self.video.noise!r} comes between frames, which an image has none of"
            )
        frames = x if x.ndim == 5 else x[:, None]
        lead = frames.shape[:2]
        inputs = self.encoder(2 * frames.flatten(0, 1) - 1).unflatten(0, lead)
        slots = self.video(inputs, generator=chance(self, x))  # (B, T, K, D)
        parts, logits = self.decoder(slots.flatten(0, 1))
        masks = logits.softmax(1)
        image = (masks[:, :, None] * parts).sum(1)
        if x.ndim == 4:
            return Scene(image, masks, parts, slots[:, 0])
        image, masks, parts = (item.unflatten(0, lead) for item in (image, masks, parts))
        return Scene(image, masks, parts, slots)


@model("slot_autoencoder", kinds=("slots",), facts=("image_shape", "max_objects"))
def slot_autoencoder(
    attention: str = "slot",
    *,
    image_shape: Sequence[int],
    max_objects: int,
    slots: int | None = None,
    dim: int = 64,
    hidden: int | None = None,
    iterations: int | None = None,
    encoder: str = "cnn",
    width: int = 32,
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
        dim: Channels D of a slot.
        hidden: Width of the slots' MLPs; None leaves it to `attention`.
        iterations: Rounds of the slots; None leaves them to `attention`.
        encoder: "cnn", or "vit" with any token mixer of the zoo.
        width: Channels of encoder and decoder, and of the inputs of the slots.
        stride: Of the first convolution of the cnn.
        encoder_attention: Token mixer of the vit.
        decoder: "spatial_broadcast", or "transformer" (see `TransformerDecoder`).
        upsample: Sides of the image over those of the grid that slots are broadcast to, a power of
            two; 1 is the paper's for small images.
        patch: Side of a patch of the vit and of the transformer.
        depth: Layers of the vit and of the transformer.
        heads: Their heads.
        slot_noise: Noise on slots between frames: "none", "fixed" or "learned".

    Raises:
        ZooError: A size does not fit, there are fewer slots than objects, or a name is unknown.
    """
    shape = checks.image_shape("image_shape", image_shape)
    sizes = {"dim": dim, "width": width, "stride": stride, "upsample": upsample, "patch": patch}
    for name, size in {**sizes, "depth": depth, "heads": heads}.items():
        checks.whole(name, size)
    tokens = encoder == "vit" or decoder == "transformer"
    idle = {
        "stride": (stride != 1 and encoder == "vit", "encoder='cnn'"),
        "encoder_attention": (encoder_attention != "mha" and encoder == "cnn", "encoder='vit'"),
        "upsample": (upsample != 1 and decoder == "transformer", "decoder='spatial_broadcast'"),
        **{
            name: (given and not tokens, "encoder='vit' and decoder='transformer'")
            for name, given in (("patch", patch != 4), ("depth", depth != 2), ("heads", heads != 4))
        },
    }
    for name, (ignored, owner) in idle.items():
        if ignored:
            raise ZooError(f"{name} belongs to {owner} and would do nothing here")
    count = slot_count(slots, max_objects, background=1)
    module = slot_module(attention, width, dim, count, iterations=iterations, hidden=hidden)
    encode: nn.Module
    if encoder == "cnn":
        encode = ConvEncoder(shape[0], width, stride, width)
    elif encoder == "vit":
        encode = TokenEncoder(shape, encoder_attention, patch, width, depth, heads, width)
    else:
        raise unknown("encoder", encoder, ("cnn", "vit"))
    decode: nn.Module
    if decoder == "spatial_broadcast":
        decode = BroadcastDecoder(dim, shape[0], shape[1:], upsample, width)
    elif decoder == "transformer":
        decode = TransformerDecoder(dim, shape[0], shape[1:], patch, width, depth, heads)
    else:
        raise unknown("decoder", decoder, ("spatial_broadcast", "transformer"))
    return SlotAutoencoder(encode, module, decode, shape, slot_noise)
