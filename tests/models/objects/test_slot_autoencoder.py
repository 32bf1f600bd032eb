"""Object discovery: shapes, the mixture of parts, both decoders, videos, chance, bad sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import models
from zoo.errors import CompatibilityError, ZooError
from zoo.models.objects._slot_decoders import BroadcastDecoder, TransformerDecoder
from zoo.models.objects._slot_encoders import ConvEncoder, SoftPosition, TokenEncoder
from zoo.models.objects.slot_autoencoder import Scene, SlotAutoencoder
from zoo.runs import cost
from zoo.testing.tolerances import assert_close

SPECS = ("slot", "slot(normalizer=sinkhorn)", "mesh", "zoo.slots.slot:SlotAttention")


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    facts = {"image_shape": (3, 8, 12), "max_objects": 2}
    sizes: dict[str, Any] = {"dim": 8, "width": 8, "hidden": 8}
    if options.get("encoder") == "vit" or options.get("decoder") == "transformer":
        sizes["heads"] = 2
    return models.create("slot_autoencoder", **{**facts, **sizes, **options})


def images(*lead: int) -> Tensor:
    return torch.rand(*(lead or (2,)), 3, 8, 12, generator=torch.Generator().manual_seed(1))


class Mean(nn.Module):
    """Slots that are all the mean of their inputs: another module of kind "slots"."""

    kind = "slots"

    def __init__(self, dim_in: int, dim: int = 64, slots: int = 7, *, shift: float = 0.0) -> None:
        super().__init__()
        self.out, self.slots, self.shift = nn.Linear(dim_in, dim), slots, shift

    def forward(self, x, slots=None, *, mask=None, generator=None, return_weights=False):
        y = self.out(x.mean(1, keepdim=True)).expand(-1, self.slots, -1) + self.shift
        return (y, x.new_ones(len(x), x.shape[1], self.slots)) if return_weights else y


@pytest.mark.parametrize("attention", SPECS)
@pytest.mark.parametrize("encoder", ["cnn", "vit"])
@pytest.mark.parametrize("decoder", ["spatial_broadcast", "transformer"])
def test_every_combination_reproduces_images_and_trains_all_its_weights(
    attention, encoder, decoder
):
    more = {"upsample": 2} if decoder == "spatial_broadcast" else {}
    model = tiny(attention=attention, encoder=encoder, decoder=decoder, **more)
    x = images()
    scene = model(x)
    shapes = [tuple(item.shape) for item in scene]
    assert shapes == [(2, 3, 8, 12), (2, 3, 8, 12), (2, 3, 3, 8, 12), (2, 3, 8)]
    assert_close(scene.masks.sum(1), torch.ones(2, 8, 12), "shares")
    assert_close(scene.image, torch.einsum("bkhw,bkchw->bchw", scene.masks, scene.parts), "image")
    F.mse_loss(scene.image, x).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_the_paper_sizes():
    model = models.create("slot_autoencoder", image_shape=(3, 64, 64), max_objects=6)
    count = {name: cost.parameters(part) for name, part in model.named_children()}
    convs = 3 * 25 * 32 + 3 * 32 * 25 * 32 + 4 * 32
    encoder = convs + 5 * 32 + 2 * 32 + 2 * (32 * 32 + 32)
    decoder = 5 * 64 + 64 * 25 * 32 + 2 * 32 * 25 * 32 + 3 * 32 + 32 * 9 * 4 + 4
    assert (count["encoder"], count["decoder"]) == (encoder, decoder)
    assert model.video.slots.slots == 7
    assert [layer.kernel_size for layer in model.decoder.layers[::2]] == [(5, 5)] * 3 + [(3, 3)]


def test_soft_positions_are_distances_to_the_four_sides():
    layer = SoftPosition(4)
    with torch.no_grad():
        layer.embed.weight.copy_(torch.eye(4))
        layer.embed.bias.zero_()
    found = layer(torch.zeros(1, 4, 2, 3))[0]
    along, down = torch.tensor([[0, 0.5, 1]] * 2), torch.tensor([[0.0] * 3, [1.0] * 3])
    assert_close(found, torch.stack([along, down, 1 - along, 1 - down]), "distances")


def test_images_reach_the_encoder_between_minus_one_and_one():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(2).mT

    model = SlotAutoencoder(
        Look(), Mean(3, 8, 2), BroadcastDecoder(8, 3, (8, 12), 2, 4), (3, 8, 12)
    )
    x = images()
    model(x)
    assert_close(seen[0], 2 * x - 1, "input")


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_cnn_has_an_input_for_each_step(stride):
    steps = -(-8 // stride) * -(-12 // stride)
    assert ConvEncoder(3, 4, stride, 5)(images()).shape == (2, steps, 5)


def test_the_vit_takes_any_token_mixer():
    encoder = TokenEncoder((3, 8, 12), "linear", 4, 8, 1, 2, 5)
    assert encoder(images()).shape == (2, 6, 5)


@pytest.mark.parametrize("upsample", [1, 2, 4, 16])
def test_slots_paint_alone(upsample):
    decoder = BroadcastDecoder(8, 3, (16, 32), upsample, 4)
    slots = torch.randn(1, 3, 8)
    parts, logits = decoder(slots)
    assert (parts.shape, logits.shape) == ((1, 3, 3, 16, 32), (1, 3, 16, 32))
    other = slots.clone()
    other[:, 1] += 1
    again, masks = decoder(other)
    assert_close(again[:, [0, 2]], parts[:, [0, 2]], "parts of the others")
    assert_close(masks[:, [0, 2]], logits[:, [0, 2]], "logits of the others")
    assert (again[:, 1] - parts[:, 1]).abs().max() > 1e-4


def test_slots_in_another_order_paint_the_same_in_that_order():
    for decoder in (
        BroadcastDecoder(8, 3, (8, 12), 2, 4),
        TransformerDecoder(8, 3, (8, 12), 4, 8, 2, 2),
    ):
        slots = torch.randn(2, 4, 8)
        order = [2, 0, 3, 1]
        parts, logits = decoder(slots)
        moved_parts, moved_logits = decoder(slots[:, order])
        assert_close(moved_parts, parts[:, order], "parts")
        assert_close(moved_logits, logits[:, order], "logits")


def test_masks_of_the_transformer_are_the_weights_of_its_last_layer():
    decoder = TransformerDecoder(8, 3, (8, 12), 4, 8, 1, 2)
    slots = torch.randn(2, 3, 8)
    _, weights = decoder.attend[0](
        decoder.norms[0](decoder.queries.expand(2, -1, -1)),
        context=decoder.slots(slots),
        need_weights=True,
    )
    share = decoder(slots)[1].softmax(1)[..., ::4, ::4]  # one pixel of each patch
    assert_close(share, weights.mean(1).mT.unflatten(-1, (2, 3)), "masks")


def test_a_patch_of_the_transformer_lies_where_it_belongs():
    decoder = TransformerDecoder(8, 3, (8, 12), 4, 8, 1, 2)
    with torch.no_grad():
        decoder.out[1].weight.zero_()
        decoder.out[1].bias.copy_(torch.arange(48.0))
    parts, _ = decoder(torch.randn(1, 2, 8))
    patch = torch.arange(48.0).view(3, 4, 4)
    assert torch.equal(parts[0, 1], patch.repeat(1, 2, 3))


def test_a_video_of_one_frame_is_an_image_and_slots_are_carried_on():
    model = tiny().eval()
    x = images(2, 2)
    video, first = model(x), model(x[:, 0])
    for whole, frame, name in zip(video, first, Scene._fields, strict=True):
        assert_close(whole[:, 0], frame, name)
    inputs = model.encoder(2 * x[:, 1] - 1)
    assert_close(video.slots[:, 1], model.video.slots(inputs, video.slots[:, 0]), "second frame")


def test_noise_between_frames_is_trained_and_weighed():
    model = tiny(slot_noise="learned")
    model(images(2, 3))
    assert model.video.aux_losses["slot_noise"] > 0
    with pytest.raises(ZooError, match="slot_noise='learned' comes between frames"):
        model(images())
    with pytest.raises(ZooError, match="did you mean 'learned'"):
        tiny(slot_noise="lerned")


@pytest.mark.parametrize("attention", ["slot", "mesh"])
def test_chance_is_repeated_in_evaluation_and_only_there(attention):
    model = tiny(attention=attention)
    x = images()
    assert not torch.equal(model(x).slots, model(x).slots)
    model.eval()
    before = torch.get_rng_state()
    a, b = model(x), model(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.slots, b.slots)
    assert torch.equal(a.image, b.image)
    # The slots of one image begin at different places all the same.
    assert (a.slots[:, 0] - a.slots[:, 1]).abs().max() > 1e-2


def test_options_reach_the_slots():
    module = tiny(iterations=5, hidden=12, slots=4).video.slots
    assert (module.iterations, module.mlp[0].out_features, module.slots) == (5, 12, 4)
    assert tiny(attention="slot(iterations=2)").video.slots.iterations == 2
    with pytest.raises(ZooError, match=r"'iterations' is an option of the model and of"):
        tiny(attention="slot(iterations=2)", iterations=3)


def test_a_class_of_another_package_may_be_the_slots(monkeypatch):
    spec = f"{__name__}:Mean"
    model = tiny(attention=spec, hidden=None)
    assert isinstance(model.video.slots, Mean)
    # Slots that are all the same share every pixel evenly.
    assert_close(model(images()).masks, torch.full((2, 3, 8, 12), 1 / 3), "masks")
    with pytest.raises(ZooError, match="hidden"):
        tiny(attention=spec, hidden=8)


def test_operations_are_counted():
    assert cost.flops(tiny(attention="slot(init=identical)").eval(), images(1)) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_objects": 5, "slots": 4}, r"slots=4 cannot hold the max_objects=5 .*better 6"),
        ({"slots": 0}, "slots=0 must be a whole number of at least 1"),
        ({"max_objects": 0}, "max_objects=0"),
        ({"dim": 0}, "dim=0"),
        ({"encoder": "cn"}, "unknown encoder 'cn'; did you mean 'cnn'"),
        ({"decoder": "broadcast"}, "did you mean 'spatial_broadcast'"),
        ({"upsample": 3}, "upsample=3 must be a power of two that divides the 8 x 12"),
        ({"upsample": 8}, "upsample=8 must be a power of two that divides"),
        ({"encoder": "vit", "stride": 2}, "stride belongs to encoder='cnn'"),
        ({"encoder_attention": "linear"}, "encoder_attention belongs to encoder='vit'"),
        ({"decoder": "transformer", "upsample": 2}, "upsample belongs to"),
        ({"patch": 2}, "patch belongs to encoder='vit' and decoder='transformer'"),
        ({"depth": 1}, "depth belongs to"),
        ({"heads": 2}, "heads belongs to"),
        ({"decoder": "transformer", "patch": 3}, "patch=3 must divide height 8"),
        ({"decoder": "transformer", "heads": 3}, "heads=3 must divide width=8"),
        ({"encoder": "vit", "patch": 3}, "patch=3 must divide"),
        ({"image_shape": (3, 8)}, r"image_shape=\(3, 8\)"),
        ({"attention": "mha"}, "attention='mha' is of kind 'project'; allowed: 'slots'"),
        ({"attention": "slots"}, "did you mean 'slot'"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        tiny(**options)


def test_images_of_another_size_are_refused():
    with pytest.raises(ZooError, match=r"images of shape \(2, 3, 8, 8\) do not fit"):
        tiny()(torch.zeros(2, 3, 8, 8))


def test_only_slots_are_hosted():
    models.check_hosted("slot_autoencoder", "mesh")
    with pytest.raises(CompatibilityError, match="hosts: slots"):
        models.check_hosted("slot_autoencoder", "se")
