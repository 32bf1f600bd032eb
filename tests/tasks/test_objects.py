"""Object discovery as a task: figures, losses, pictures, and figures that can be had again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import datasets, models
from zoo.errors import ZooError
from zoo.models.objects.slot_autoencoder import Scene
from zoo.pictures.figures import segments
from zoo.runs.callbacks import Keeper
from zoo.runs.train import run
from zoo.runs.training import Training
from zoo.tasks import Optim, find
from zoo.tasks.objects import in_order

SMALL = [
    *("data.val_size=6", "data.test_size=6", "data.eval_batch_size=4", "batch=4"),
    *("data.height=16", "data.width=16", "data.min_visible=4", "model.dim=8", "model.width=4"),
]


class Told(nn.Module):
    """Gives masks and an image that it was told to give."""

    def __init__(self, masks: Tensor, image: Tensor) -> None:
        super().__init__()
        self.masks, self.image = masks, image
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Scene:
        masks = self.masks.float()
        parts = self.image.unsqueeze(-4).expand(*masks.shape[:-2], *self.image.shape[-3:])
        return Scene(self.image + self.weight, masks, parts, masks.flatten(-2))


def drawn(name: str, **options: Any) -> Any:
    sizes = {"height": 16, "width": 20, "sizes": [0.4], "val_size": 5, "test_size": 5}
    data = datasets.create(name, **{**sizes, "min_visible": 4, **options})
    data.setup()
    return data, next(iter(data.val_dataloader()))


def made(name: str, model: nn.Module) -> Any:
    return find(name)(model, Optim(lr=1.0), max_steps=10, test_names=["test"])


def figures(task: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    task.validation_step(batch, 0)
    found = {name: float(value) for name, value in task.figures[0].compute().items()}
    assert tuple(found) == task.names
    return found


def truth(masks: Tensor) -> Tensor:
    """Masks of slots that are perfect: the objects and the background."""
    return torch.cat([masks, ~masks.any(-3, keepdim=True)], -3)


def test_perfect_slots_in_images():
    _, batch = drawn("scenes")
    task = made("objects", Told(truth(batch["masks"]), batch["image"]))
    assert figures(task, batch) == {"fg_ari": 1, "ari": 1, "miou": 1, "loss": 0}


def test_one_slot_for_everything_finds_nothing():
    _, batch = drawn("scenes")
    masks = truth(batch["masks"])
    alone = torch.zeros_like(masks)
    alone[:, 0] = True
    found = figures(made("objects", Told(alone, torch.zeros_like(batch["image"]))), batch)
    assert (found["fg_ari"], found["ari"]) == (0, 0)
    assert 0 < found["miou"] < 0.2
    assert found["loss"] == pytest.approx(float(batch["image"].square().mean()))


def test_slots_that_spill_over_the_background_lose_only_where_it_counts():
    _, batch = drawn("scenes", min_objects=2)
    masks = truth(batch["masks"])
    masks[:, 0] |= masks[:, -1]
    masks[:, -1] = False
    found = figures(made("objects", Told(masks, batch["image"])), batch)
    assert found["fg_ari"] == 1
    assert found["ari"] < 0.9
    assert found["miou"] < 0.9


def test_objects_that_change_slots_between_frames():
    _, batch = drawn("moving_scenes", frames=3, enter=0.0)
    kept = truth(batch["masks"])
    task = made("object_videos", Told(kept, batch["video"]))
    assert figures(task, batch) == {"fg_ari": 1, "ari": 1, "miou": 1, "tca": 1, "loss": 0}
    moved = kept.clone()
    moved[:, 1] = kept[:, 1].roll(1, 1)
    found = figures(made("object_videos", Told(moved, batch["video"])), batch)
    assert found["tca"] == 0
    assert found["fg_ari"] < 0.9
    assert found["miou"] < 0.9


def test_data_without_masks_have_a_loss_only():
    _, batch = drawn("scenes")
    model = Told(truth(batch["masks"]), batch["image"])
    del batch["masks"]
    task = made("objects", model)
    task.validation_step(batch, 0)
    found = {k: float(v) for k, v in task.figures[0].compute().items()}
    assert found["loss"] == 0
    assert all(found[name] != found[name] for name in ("fg_ari", "ari", "miou"))
    assert list(task.pictures(batch)) == ["slots"]


def test_loss_is_the_error_over_all_pixels_and_frames():
    _, batch = drawn("moving_scenes", frames=2)
    task = made("object_videos", Told(truth(batch["masks"]), batch["video"] + 0.5))
    scene = task.logits(batch)
    loss = task.loss(scene, batch)
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    assert float(task.model.weight.grad) == pytest.approx(1.0)


@pytest.mark.parametrize("video", [False, True])
def test_slots_are_sorted_by_what_they_fit_best(video):
    _, batch = drawn("moving_scenes" if video else "scenes", max_objects=3)
    masks = batch["masks"]
    perfect = truth(masks).float()
    empty = torch.zeros_like(perfect[..., :1, :, :])
    shuffled = torch.cat([perfect, empty], -3)[..., [2, 4, 0, 3, 1], :, :]
    found = in_order(shuffled, masks)
    assert found.shape[-3] == 1 + 3 + 5
    wanted = torch.cat([~masks.any(-3, keepdim=True), masks], -3)
    assert torch.equal(found.argmax(-3), wanted.byte().argmax(-3))


def test_segments_have_a_colour_each_and_a_black_background():
    masks = torch.eye(4).view(4, 2, 2)
    picture = segments(masks)
    colours = {tuple(c) for c in picture.flatten(1).T.tolist()}
    assert picture.shape == (3, 2, 2)
    assert len(colours) == 4
    assert picture[:, 0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("data", "task", "panels"),
    [("scenes", "objects", 4 * (4 + 5)), ("moving_scenes", "object_videos", 3 * (4 + 5))],
)
def test_pictures_show_every_slot(data, task, panels):
    options = {"frames": 3} if data == "moving_scenes" else {}
    module, batch = drawn(data, **options)
    model = models.create(
        "slot_autoencoder", dim=8, width=4, stride=2, upsample=4, **module.model_facts()
    ).eval()
    with torch.no_grad():
        figure = made(task, model).pictures(batch)["slots"]
    assert len([axis for axis in figure.axes if axis.images]) == panels


RECIPES = ("scenes", "scenes_video")


@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_repeats_and_leaves_training_as_it_was(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "draw", lambda self: [])
    small = [*SMALL, "attention=mesh", "steps=4"]

    def trained(where, every):
        record = run(
            name,
            [*small, f"trainer.eval_every={every}"],
            records=tmp_path / where,
            runs=tmp_path / where,
            quiet=True,
        )
        return record.history[-1], record

    # Validations in between change neither the random numbers of training nor their own.
    (seldom, _), (often, record) = trained("a", 4), trained("b", 2)
    assert seldom == often
    (again, same) = trained("c", 2)
    assert (again, same.metrics) == (often, record.metrics)


@pytest.mark.parametrize("name", RECIPES)
def test_more_objects_than_slots_are_refused_before_training(name, tmp_path):
    with pytest.raises(ZooError, match="slots=3 cannot hold the max_objects=4 objects"):
        run(name, [*SMALL, "model.slots=3"], records=tmp_path, runs=tmp_path, quiet=True)


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "draw", lambda self: [])
    options = [*SMALL, "attention=mesh", "steps=4", "trainer.eval_every=2"]
    whole = run("scenes", options, records=tmp_path / "a", runs=tmp_path / "a", quiet=True)
    saved = Keeper.on_validation_end

    def stop(self, trainer, task):
        saved(self, trainer, task)
        raise RuntimeError("stop")

    where: dict[str, Any] = {"records": tmp_path / "b", "runs": tmp_path / "b", "quiet": True}
    monkeypatch.setattr(Keeper, "on_validation_end", stop)
    with pytest.raises(RuntimeError, match="stop"):
        run("scenes", options, **where)
    monkeypatch.setattr(Keeper, "on_validation_end", saved)
    resumed = run("scenes", options, resume=True, **where)
    assert (resumed.metrics, resumed.history) == (whole.metrics, whole.history)
