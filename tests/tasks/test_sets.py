"""Sets as a task: figures and losses by hand, layouts of targets, pictures, repeated figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import datasets, models
from zoo.errors import ZooError
from zoo.runs.train import run
from zoo.runs.training import Training
from zoo.tasks import Optim, find

SMALL = ["data.val_size=6", "data.test_size=6", "data.eval_batch_size=4", "batch=4"]


class Told(nn.Module):
    """Gives the set that it was told to give."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer


def made(data: Any, answer: Tensor) -> Any:
    facts = data.task_facts()
    task = find(data.task)
    return task(Told(answer), Optim(lr=1.0), max_steps=10, test_names=["test"], **facts)


def drawn(name: str, **options: Any) -> Any:
    data = datasets.create(name, val_size=5, test_size=5, **options)
    data.setup()
    return data, next(iter(data.val_dataloader()))


def figures(task: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    task.validation_step(batch, 0)
    found = {name: float(value) for name, value in task.figures[0].compute().items()}
    assert tuple(found) == task.names
    return found


@pytest.mark.parametrize("name", ["point_sets", "scene_sets"])
def test_the_right_set_in_any_order_is_perfect(name):
    data, batch = drawn(name)
    found = figures(made(data, batch["targets"][:, [2, 0, 3, 1]].clone()), batch)
    precision = [value for key, value in found.items() if key.startswith("ap_")]
    assert precision == ([1] * 5 if name == "scene_sets" else [])
    assert (found["set_mse"], found["loss"]) == (0, 0)


def test_points_are_paired_and_leftovers_cost_nothing():
    data, batch = drawn("point_sets", points=2, coordinates=2)
    batch = {key: value[:1] for key, value in batch.items()}
    batch["targets"] = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    answer = torch.tensor([[[1.0, 0.8], [9.0, 9.0], [0.0, 0.4]]])
    task = made(data, answer)
    wanted = (0.2**2 + 0.4**2) / 4
    assert figures(task, batch) == pytest.approx({"set_mse": wanted, "loss": wanted})
    task.loss(task.logits(batch), batch).backward()
    slope = task.model.answer.grad[0]
    assert torch.allclose(slope, torch.tensor([[0.0, -0.1], [0.0, 0.0], [0.0, 0.2]]))


def test_the_loss_of_properties_fills_up_the_set_with_no_object():
    data, batch = drawn("scene_sets")
    width = batch["targets"].shape[-1]
    answer = torch.zeros(5, 6, width)
    task = made(data, answer)
    wanted = F.smooth_l1_loss(torch.zeros_like(batch["targets"]), batch["targets"]) * 4 / 6
    assert task.loss(task.logits(batch), batch).item() == pytest.approx(float(wanted))
    found = figures(task, batch)
    assert found["loss"] == pytest.approx(float(wanted))
    assert found["set_mse"] == pytest.approx(float(batch["targets"].square().mean() * 4 / 6))


def test_a_wrong_colour_is_no_detection():
    data, batch = drawn("scene_sets")
    answer = batch["targets"].clone()
    first = 2 + sum(data.classes[:2])
    answer[..., first:-1] = answer[..., first:-1].roll(1, -1)
    assert figures(made(data, answer), batch)["ap_inf"] == 0


def test_each_task_takes_the_layout_it_is_for():
    points, scenes = datasets.create("point_sets"), datasets.create("scene_sets")
    for name, data, message in (
        ("sets", scenes, "use task 'properties'"),
        ("properties", points, "flagged=False; use task 'sets'"),
    ):
        with pytest.raises(ZooError, match=message):
            find(name)(
                Told(torch.zeros(1)),
                Optim(lr=1.0),
                max_steps=10,
                test_names=["test"],
                **data.task_facts(),
            )


@pytest.mark.parametrize(
    ("name", "options"),
    [("point_sets", {}), ("point_sets", {"coordinates": 1}), ("scene_sets", {})],
)
def test_pictures_show_true_and_predicted_sets(name, options):
    data, batch = drawn(name, **options)
    figure = made(data, batch["targets"].clone()).pictures(batch)["sets"]
    assert len(figure.axes) == 4
    circles, crosses = figure.axes[0].collections
    assert len(circles.get_offsets()) == int(batch["present"][0].sum())
    assert len(crosses.get_offsets()) == batch["targets"].shape[1]
    assert len(figure.axes[0].images) == (name == "scene_sets")
    x = circles.get_offsets()[0, 0]
    assert math.isclose(float(x), float(batch["targets"][0, 0, 0]), rel_tol=1e-6)


@pytest.mark.parametrize("name", ["point_sets", "scene_sets"])
def test_evaluation_repeats_and_leaves_training_as_it_was(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "draw", lambda self: [])
    small = [*SMALL, "model.dim=8", "model.width=4", "attention=mesh", "steps=4"]

    def trained(where, every):
        options = [*small, f"trainer.eval_every={every}"]
        folder = tmp_path / where
        return run(name, options, records=folder, runs=folder, quiet=True)

    seldom, often = trained("a", 4), trained("b", 2)
    assert seldom.history[-1] == often.history[-1]
    assert trained("c", 2).metrics == often.metrics


def test_more_objects_than_slots_are_refused_before_training(tmp_path):
    for name in ("point_sets", "scene_sets"):
        with pytest.raises(ZooError, match="slots=3 cannot hold the max_objects=4"):
            run(name, [*SMALL, "model.slots=3"], records=tmp_path, runs=tmp_path, quiet=True)


@pytest.mark.slow
def test_identical_slots_need_mesh():
    """The claim in small: 250 steps are enough for MESH, and no help to a softmax."""
    errors = {}
    for attention in ("slot(init=identical)", "mesh(init=identical)"):
        torch.manual_seed(0)
        data = datasets.create("point_sets", batch_size=32)
        data.setup()
        model = models.create("set_autoencoder", attention=attention, **data.model_facts())
        task = find("sets")(
            model, Optim(lr=1e-3), max_steps=250, test_names=["test"], **data.task_facts()
        )
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _, batch in zip(range(250), data.train_dataloader(), strict=False):
            adam.zero_grad()
            task.loss(task.logits(batch), batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
        model.eval()
        for batch in data.val_dataloader():
            task.validation_step(batch, 0)
        errors[attention] = float(task.figures[0].compute()["set_mse"])
    assert errors["slot(init=identical)"] > 0.2
    assert errors["mesh(init=identical)"] < 0.02
