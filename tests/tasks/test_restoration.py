"""Restoration: figures by region against plain loops, tiles, the task, and its pictures."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from zoo import datasets, models
from zoo.errors import ZooError
from zoo.metrics.restoration import (
    NAMES,
    best_gain,
    shadow_metrics,
)
from zoo.pictures.colour import to_lab
from zoo.tasks import Optim, _restoration_losses, find
from zoo.tasks._restoration_tiles import in_tiles, places

Restoration = find("restoration")


@pytest.fixture
def images():
    """Three pairs of smooth images with regions of unlike size."""
    source = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 14, 18, generator=source)
    pred = target + 0.1 * torch.randn(3, 3, 14, 18, generator=source)
    region = torch.zeros(3, 1, 14, 18, dtype=torch.bool)
    region[0, 0, :5, :7] = True
    region[1, 0, 3:, 2:9] = True
    region[2, 0, 6, 6] = True
    return pred, target, region


class Echo(nn.Module):
    """Gives the image back, times a weight."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image, mask):
        self.shapes.append(tuple(image.shape))
        assert mask.shape == (len(image), 1, *image.shape[2:])
        return image * self.factor


def make(model=None, **facts):
    return Restoration(model or Echo(), Optim(lr=0.1), max_steps=10, test_names=("test",), **facts)


def batch_of(pred, target, region):
    return {"image": pred.clamp(0, 1), "mask": region, "target": target, "region": region}


def evaluate(task, *batches):
    for batch in batches:
        task.eval().validation_step(batch, 0)
    return {name: float(value) for name, value in task.figures[0].compute().items()}


def test_figures_are_those_of_a_loop_over_pixels(images):
    pred, target, region = images
    found = shadow_metrics(pred, target, region)
    assert set(found) == set(NAMES)
    pred = pred.clamp(0, 1)
    away = to_lab(pred) - to_lab(target)
    for i in range(3):
        for name, part in (("", torch.ones(14, 18)), ("_shadow", region[i, 0]),
                           ("_lit", ~region[i, 0])):  # fmt: skip
            absolute, square, plain, count = 0.0, 0.0, 0.0, 0
            for y, x in part.nonzero().tolist():
                absolute += float(away[i, :, y, x].abs().sum())
                square += float(away[i, :, y, x].square().sum())
                plain += float((pred - target)[i, :, y, x].square().mean())
                count += 1
            assert found[f"lab_mae{name}"][i].item() == pytest.approx(absolute / count, rel=1e-4)
            rmse = math.sqrt(square / count)
            assert found[f"lab_rmse{name}"][i].item() == pytest.approx(rmse, rel=1e-4)
            psnr = -10 * math.log10(plain / count)
            assert found[f"psnr{name}"][i].item() == pytest.approx(psnr, rel=1e-4)


def test_whole_and_filled_figures_are_torchmetrics(images):
    pred, target, region = images
    found = shadow_metrics(pred, target, region)
    pred = pred.clamp(0, 1)
    for name, part in (("", None), ("_shadow_filled", region), ("_lit_filled", ~region)):
        a, b = (pred, target) if part is None else (pred * part, target * part)
        for i in range(3):
            psnr = peak_signal_noise_ratio(a[i : i + 1], b[i : i + 1], data_range=1.0)
            assert found[f"psnr{name}"][i].item() == pytest.approx(psnr.item(), rel=1e-4)
            ssim = structural_similarity_index_measure(a[i : i + 1], b[i : i + 1], data_range=1.0)
            assert found[f"ssim{name}"][i].item() == pytest.approx(ssim.item(), rel=1e-4)


def test_black_outside_a_region_flatters_it(images):
    """PSNR of whole images that are black outside R is that of R plus 10 log10(HW / n)."""
    found = shadow_metrics(*images)
    share = images[2].flatten(1).float().mean(1)
    torch.testing.assert_close(
        found["psnr_shadow_filled"], found["psnr_shadow"] - 10 * share.log10(), rtol=1e-4, atol=0
    )
    assert (found["ssim_shadow_filled"] > found["ssim_shadow"]).all()


def test_ssim_of_regions_makes_up_that_of_the_whole(images):
    found = shadow_metrics(*images)
    share = images[2].flatten(1).float().mean(1)
    joined = share * found["ssim_shadow"] + (1 - share) * found["ssim_lit"]
    torch.testing.assert_close(joined, found["ssim"])


def test_an_error_by_hand():
    """One of four pixels is black instead of white: 100 in L alone."""
    target = torch.ones(1, 3, 8, 8)
    pred = target.clone()
    region = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    region[..., :2, :2] = True
    pred[..., 0, 0] = 0
    found = {name: float(value) for name, value in shadow_metrics(pred, target, region).items()}
    assert found["lab_mae_shadow"] == pytest.approx(25, rel=1e-4)
    assert found["lab_mae"] == pytest.approx(100 / 64, rel=1e-4)
    assert found["lab_mae_lit"] == pytest.approx(0, abs=1e-4)
    assert found["lab_rmse_shadow"] == pytest.approx(50, rel=1e-4)
    assert found["psnr_shadow"] == pytest.approx(10 * math.log10(4), rel=1e-4)
    assert found["psnr_shadow_filled"] == pytest.approx(10 * math.log10(64), rel=1e-4)
    assert found["psnr_lit"] == 100
    assert found["ssim_lit"] < 1  # windows of lit pixels reach into the shadow
    assert found["ssim_lit_filled"] == pytest.approx(1)


def test_white_matters_and_is_checked(images):
    d65, d50 = (shadow_metrics(*images, white=white) for white in ("D65", "D50"))
    assert (d65["lab_mae"] - d50["lab_mae"]).abs().min() > 1e-3
    with pytest.raises(ZooError, match="unknown white"):
        shadow_metrics(*images, white="E")


def test_wrong_shapes_and_masks_are_refused(images):
    pred, target, region = images
    with pytest.raises(ZooError, match="must have one shape"):
        shadow_metrics(pred[:2], target, region)
    with pytest.raises(ZooError, match=r"mask of shape \(3, 14, 18\)"):
        shadow_metrics(pred, target, region[:, 0])
    with pytest.raises(ZooError, match=r"region has dtype torch.float32; allowed: bool"):
        shadow_metrics(pred, target, region.float())
    with pytest.raises(ZooError, match=r"\(3, 3, 14, 5\) is too small for SSIM; allowed: .* 6"):
        shadow_metrics(*(x[..., :5] for x in images))
    assert shadow_metrics(*(x[..., :6, :6] for x in images))["ssim"].isfinite().all()


def test_figures_are_means_over_images_whatever_the_batches(images):
    pred, target, region = images
    whole = evaluate(make(Echo(0.9)), batch_of(pred, target, region))
    parts = [batch_of(*(x[a:b] for x in images)) for a, b in ((0, 1), (1, 3))]
    cut = evaluate(make(Echo(0.9)), *parts)
    assert set(whole) == set(Restoration.names)
    for name in Restoration.names:
        assert whole[name] == pytest.approx(cut[name], rel=1e-5), name
    each = shadow_metrics(pred.clamp(0, 1) * 0.9, target, region)
    for name in NAMES:
        assert whole[name] == pytest.approx(each[name].mean().item(), rel=1e-4)


def test_doing_nothing_is_the_input_and_the_gain_is_better(images):
    pred, target, region = images
    image = torch.where(region, target * torch.tensor([0.3, 0.4, 0.5])[:, None, None], target)
    found = evaluate(make(), batch_of(image, target, region))
    for name in Restoration.names:
        if name.endswith("_input"):
            assert found[name] == found[name.removesuffix("_input")]
    assert found["shadow_left"] == 1
    assert found["lab_mae_shadow_input"] > 20
    assert found["lab_mae_shadow_gain"] < 1e-3
    torch.testing.assert_close(best_gain(image, target, region), target)
    # With noise, no factor near the best one is better.
    best = best_gain(pred, target, region)
    for factor in (0.99, 1.01):
        other = torch.where(region, best * factor, best)
        assert ((other - target).square().sum((2, 3)) >= (best - target).square().sum((2, 3))).all()


def test_an_image_without_shadow_does_not_count_for_it(images):
    pred, target, region = images
    region = region.clone()
    region[1] = False
    found = evaluate(make(), batch_of(pred, target, region))
    each = shadow_metrics(pred, target, region)
    assert each["lab_mae_shadow"].isnan().tolist() == [False, True, False]
    for name in NAMES:
        values = each[name][~each[name].isnan()]
        assert found[name] == pytest.approx(values.mean().item(), rel=1e-4), name
    assert each["ssim_shadow_filled"].isnan().tolist() == [False, True, False]
    none = evaluate(make(), batch_of(pred, target, torch.zeros_like(region)))
    assert math.isnan(none["lab_mae_shadow"])
    assert math.isfinite(none["lab_mae"])


def test_an_output_that_is_not_a_number_shows(images):
    pred, target, region = images
    found = evaluate(make(Echo(math.nan)), batch_of(pred, target, region))
    assert math.isnan(found["loss"])
    assert math.isnan(found["lab_mae_shadow"])


def test_the_mask_is_the_region_where_there_is_no_other(images):
    batch = batch_of(*images)
    del batch["region"]
    assert evaluate(make(), batch) == evaluate(make(), batch_of(*images))
    drawn = {**batch_of(*images), "mask": torch.ones_like(images[2])}
    assert evaluate(make(), drawn) == evaluate(make(), batch_of(*images))


def test_images_are_compared_at_the_side_that_was_asked_for():
    """Checkers of single pixels are grey once they are half as large."""
    y, x = torch.arange(32)[:, None], torch.arange(32)
    checkers = ((x + y) % 2).float().expand(1, 3, 32, 32)
    grey = torch.full((1, 3, 32, 32), 0.5)
    region = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    region[..., :16] = True
    batch = batch_of(checkers, grey, region)
    assert evaluate(make(), batch)["psnr"] == pytest.approx(6.02, abs=0.01)
    small = evaluate(make(compare_at=8), batch)
    assert small["psnr"] > 25
    assert small["loss"] == pytest.approx(0.5, rel=1e-3)


def test_the_loss_is_charbonnier_of_the_clamped_output(images):
    _, target, region = images
    batch = batch_of(target, target, region)
    task = make(Echo(3.0)).train()
    logits = task.logits(batch)
    expected = (((3 * target).clamp(0, 1) - target).square() + 1e-6).sqrt().mean()
    assert task.loss(logits, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert evaluate(task, batch)["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_perceptual_loss_is_added_and_no_part_of_the_task(images, monkeypatch):
    untrained = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(30)))
    name = "zoo.tasks.restoration.vgg19_features"
    monkeypatch.setattr(name, lambda: untrained)
    _, target, region = images
    batch = batch_of(target, target, region)
    task, plain = make(Echo(0.5), perceptual=True), make(Echo(0.5))
    logits = task.logits(batch)
    extra = _restoration_losses.Perceptual(untrained)(logits, target)
    assert extra > 0
    difference = task.loss(logits, batch) - plain.loss(logits, batch)
    assert difference.item() == pytest.approx(0.001 * extra.item(), rel=1e-2)
    assert set(task.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize(("length", "tile"), [(5, 8), (8, 8), (9, 8), (40, 8), (41, 16), (7, 1)])
def test_tiles_cover_a_length_and_overlap(length, tile):
    found = places(length, tile)
    assert found[0] == 0
    assert max(found[-1] + tile, length) == max(length, tile)
    if length > tile:
        assert found[-1] + tile == length
        gaps = [b - a for a, b in pairwise(found)]
        assert min(gaps) >= 1
        assert max(gaps) <= max(1, tile - tile // 4)


@pytest.mark.parametrize("size", [(8, 8), (20, 13), (5, 30), (3, 4)])
def test_tiles_of_a_model_of_pixels_make_up_the_whole(size):
    source = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, *size, generator=source)
    mask = torch.rand(2, 1, *size, generator=source) < 0.5
    model = Echo(0.5)

    def marked(x, m):
        assert m.dtype == torch.bool
        return torch.where(m, model(x, m), x)

    found = in_tiles(marked, image, mask, (8, 8))
    torch.testing.assert_close(found, torch.where(mask, image * 0.5, image))
    assert {shape[2:] for shape in model.shapes} == {(8, 8)}


def test_tiles_count_most_in_their_middle():
    """A model that tells its number: between two tiles the output goes over without a step."""
    count = iter(range(10))
    image, mask = torch.zeros(1, 3, 8, 14), torch.zeros(1, 1, 8, 14, dtype=torch.bool)
    found = in_tiles(lambda x, m: torch.full_like(x, next(count)), image, mask, (8, 8))
    row = found[0, 0, 0]
    assert row[0] == 0
    assert row[-1] == 1
    assert (row[1:] >= row[:-1]).all()
    assert (row[1:] - row[:-1]).max() < 0.6


def test_a_model_of_one_size_is_evaluated_on_tiles_and_trained_whole(images):
    model = Echo()
    task = make(model, tile=(8, 8))
    batch = batch_of(*images)
    torch.testing.assert_close(task.eval().logits(batch), batch["image"])
    assert {shape[2:] for shape in model.shapes} == {(8, 8)}
    model.shapes.clear()
    task.train().logits(batch)
    assert model.shapes == [(3, 3, 14, 18)]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"tile": (8,)}, r"tile=\(8,\) must be 2 whole numbers of at least 1, or None"),
        ({"tile": (8, 0)}, r"tile=\(8, 0\) must be 2 whole numbers of at least 1, or None"),
        ({"compare_at": 4}, "compare_at=4 must be a whole number of at least 8, or None"),
        ({"white": "D56"}, "unknown white 'D56'"),
        ({"perceptual": 0.1}, "perceptual=0.1 must be True or False"),
    ],
)
def test_impossible_facts_are_refused(facts, message):
    with pytest.raises(ZooError, match=message):
        make(**facts)


def test_pictures_show_images_before_and_after(images):
    (figure,) = make().eval().pictures(batch_of(*images)).values()
    titles = [axis.get_title() for axis in figure.axes[:6]]
    assert titles == ["input", "mask", "output", "target", "error before", "error after"]
    assert len(figure.axes) == 3 * 6 + 1


def test_a_small_rasm_learns_and_beats_doing_nothing():
    """Forty steps on three images that have one and the same shadow, a half of their light."""
    torch.manual_seed(0)
    data = datasets.create("shadows", height=16, width=16, batch_size=3)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    batch["image"] = torch.where(batch["region"], batch["target"] * 0.5, batch["target"])
    batch["mask"] = batch["region"]
    model = models.create("rasm", attention="regional(kernel=3)", width=4, depths=1,
                          heads=(2, 2, 2), drop_path=0.0, **data.model_facts())  # fmt: skip
    nn.init.zeros_(model.output_proj.weight)
    nn.init.zeros_(model.output_proj.bias)
    task = make(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(task.logits(batch), batch).backward()
        optimizer.step()
    found = evaluate(task, batch)
    assert found["shadow_left"] < 0.7
    assert found["psnr_shadow"] > found["psnr_shadow_input"]
