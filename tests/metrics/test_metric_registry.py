"""Metrics by name: found, built, equal to their functions, added up over batches and processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

import zoo
from zoo import metrics
from zoo.errors import ZooError
from zoo.metrics import registry
from zoo.metrics.objects import adjusted_rand, bind, counts, overlaps, slot_labels
from zoo.metrics.restoration import NAMES, shadow_metrics
from zoo.metrics.sets import average_precision, detections, set_errors

SOURCE = torch.Generator()


def uniform(*shape):
    return torch.rand(shape, generator=SOURCE)


def masks(*shape, objects=3):
    labels = torch.randint(objects + 1, shape, generator=SOURCE)
    return torch.stack([labels == m + 1 for m in range(objects)], -3)


def scenes():
    return uniform(5, 4, 6, 6), masks(5, 6, 6)


def videos():
    return uniform(5, 3, 4, 6, 6), masks(5, 3, 6, 6)


def sets():
    return uniform(5, 4, 3), uniform(5, 2, 3)


def properties():
    wanted = torch.cat([uniform(5, 3, 2), uniform(5, 3, 1).round()], -1)
    return torch.cat([uniform(5, 4, 2) * 0.5 + 0.2, uniform(5, 4, 1)], -1), wanted


def shadows():
    target = uniform(5, 3, 8, 10)
    region = uniform(5, 1, 8, 10) < 0.4
    region[3] = False
    return target * 0.8 + 0.1 * uniform(5, 3, 8, 10), target, region


def foreground_ari(soft, truth):
    labels = slot_labels(soft, truth).flatten(1)
    return adjusted_rand(counts(labels, truth.flatten(2), soft.shape[1])).nanmean()


def matched_iou(soft, truth):
    _, found = bind(overlaps(slot_labels(soft, truth).flatten(1), truth.flatten(2)))
    there = truth.flatten(2).any(-1)
    return torch.stack([row[seen].mean() for row, seen in zip(found, there, strict=True)]).mean()


def slot_consistency(soft, truth):
    kept = []
    for picture, wanted in zip(soft, truth, strict=True):
        slot, _ = bind(overlaps(picture.argmax(1).flatten(1), wanted.flatten(2)))
        seen = wanted.flatten(2).any(-1)
        for t in range(len(wanted) - 1):
            for m in (seen[t] & seen[t + 1]).nonzero()[:, 0].tolist():
                kept.append(float(slot[t, m] == slot[t + 1, m] >= 0))
    return torch.tensor(kept).mean()


def set_precision(predicted, wanted):
    right = detections(predicted, wanted, coordinates=2, classes=()).flatten(0, 1)
    flags, objects = predicted[..., -1].flatten(), wanted[..., -1].sum()
    limits = ("inf", "1", "0.5", "0.25", "0.125")
    columns = zip(limits, right.unbind(1), strict=True)
    return {f"ap_{limit}": average_precision(flags, column, objects) for limit, column in columns}


def shadow_removal(pred, target, region):
    found = shadow_metrics(pred, target, region)
    return {name: value.nanmean() for name, value in found.items()}


# Options, what makes random inputs, and the figure of all of them from the functions.
CASES = {
    "foreground_ari": ({}, scenes, foreground_ari),
    "matched_iou": ({}, scenes, matched_iou),
    "slot_consistency": ({}, videos, slot_consistency),
    "set_error": ({}, sets, lambda x, y: set_errors(x, y, "mse").mean()),
    "set_precision": ({"coordinates": 2, "classes": ()}, properties, set_precision),
    "shadow_removal": ({}, shadows, shadow_removal),
}


@pytest.fixture(params=CASES)
def case(request):
    """A metric that has seen nothing, inputs, and the figures that are expected of them."""
    SOURCE.manual_seed(0)
    options, make, function = CASES[request.param]
    inputs = make()
    return metrics.create(request.param, **options), inputs, figures(function(*inputs))


def figures(found) -> dict[str, float]:
    """Figures by name; a single one has none."""
    found = {"": found} if isinstance(found, Tensor) else found
    return {name: float(value) for name, value in found.items()}


def cut(inputs, start, end):
    return [item[start:end] for item in inputs]


def assert_same(found, expected):
    found = figures(found)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        assert value == value, name  # inputs of which nothing can be said would show nothing


def test_every_metric_is_found_and_has_a_case_here():
    assert metrics.names() == sorted(CASES)


def test_every_metric_is_told_of():
    for name in metrics.names():
        known = metrics.info(name)
        assert known.name == name
        assert issubclass(known.cls, Metric)
        assert known.summary.endswith((".", ":"))
        assert getattr(metrics, known.cls.__name__) is known.cls
        assert known.cls.__name__ in dir(metrics)
        assert set(CASES[name][0]) <= {*known.options, *known.required}
    known = metrics.info("set_precision")
    assert known.required == ("coordinates", "classes")
    assert known.options["extent"] == 6.0
    assert metrics.info("matched_iou").options == {"joint": False}


def test_a_metric_gives_what_its_function_gives(case):
    metric, inputs, expected = case
    metric.update(*inputs)
    assert_same(metric.compute(), expected)


def test_batches_add_up_to_the_whole(case):
    metric, inputs, expected = case
    for start, end in ((0, 1), (1, 4), (4, 5)):
        metric.update(*cut(inputs, start, end))
    assert_same(metric.compute(), expected)


def test_reset_forgets(case):
    metric, inputs, expected = case
    metric.update(*cut(inputs, 1, 3))
    metric.reset()
    metric.update(*inputs)
    assert_same(metric.compute(), expected)


def test_two_processes_give_the_figures_of_one(case):
    """As torchmetrics gathers the states of all processes and reduces each in its own way."""
    metric, inputs, expected = case
    other = metric.clone()
    metric.update(*cut(inputs, 0, 2))
    other.update(*cut(inputs, 2, 5))
    alone = figures(metric.compute())
    states = (getattr(other, name) for name in metric._reductions)
    theirs = iter([x if isinstance(x, Tensor) else dim_zero_cat(x) for x in states])
    metric.dist_sync_fn = lambda state, group: [state, next(theirs)]
    metric.distributed_available_fn = lambda: True
    metric._computed = None
    assert_same(metric.compute(), expected)
    assert alone != pytest.approx(expected)


def test_the_state_of_another_process_can_be_taken_in(case):
    metric, inputs, expected = case
    other = metric.clone()
    metric.update(*cut(inputs, 0, 2))
    other.update(*cut(inputs, 2, 5))
    metric.merge_state(other)
    assert_same(metric.compute(), expected)


def test_options_reach_the_class():
    assert metrics.create("foreground_ari", background=True).background
    assert metrics.create("set_error", cost="huber").cost == "huber"
    chosen = metrics.create("shadow_removal", white="D50", names=("psnr", "lab_mae_lit"))
    SOURCE.manual_seed(0)
    inputs = shadows()
    chosen.update(*inputs)
    each = shadow_metrics(*inputs, white="D50")
    found = chosen.compute()
    assert list(found) == ["psnr", "lab_mae_lit"]
    for name, value in found.items():
        assert float(value) == pytest.approx(float(each[name].mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("matched_iuo", {}, "unknown metric 'matched_iuo'; did you mean 'matched_iou'"),
        ("matched_iou", {"jiont": True}, "unknown option of metric 'matched_iou' 'jiont'; .*joint"),
        ("set_precision", {"coordinates": 2}, "'set_precision' needs the option 'classes'; it has"),
        ("set_error", {"cost": "mes"}, "unknown cost 'mes'; did you mean 'mse'"),
        ("shadow_removal", {"white": "D56"}, "unknown white 'D56'; did you mean 'D65' or 'D50'"),
        ("shadow_removal", {"names": ["psnr_lid"]}, "unknown figure 'psnr_lid'; .*'psnr_lit'"),
        ("shadow_removal", {"names": ()}, r"names=\(\) must be a list of at least one of: lab_mae"),
        ("shadow_removal", {"names": "psnr"}, "names='psnr' must be a list"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, message):
    with pytest.raises(ZooError, match=message):
        metrics.create(name, **options)


def test_nothing_is_known_of_an_unknown_metric():
    with pytest.raises(ZooError, match="unknown metric 'psnr'"):
        metrics.info("psnr")
    for name in ("MatchedIuo", "matched_iou", "_MatchedIoU"):
        with pytest.raises(AttributeError, match=f"'zoo.metrics' has no attribute '{name}'"):
            getattr(metrics, name)


def test_a_metric_is_registered_once_and_in_snake_case(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    assert "matched_iou" in metrics.names()
    with pytest.raises(ZooError, match=r"'matched_iou' is taken by zoo\.metrics\.objects\.Matched"):
        metrics.metric("matched_iou")(Metric)
    with pytest.raises(ZooError, match="metric name 'IoU' is not snake_case"):
        metrics.metric("IoU")

    class Mine(Metric):
        """Mine."""

    assert metrics.metric("mine")(Mine) is Mine
    assert metrics.info("mine").cls is Mine
    assert metrics.Mine is Mine


def test_torchmetrics_is_imported_when_a_metric_is_asked_for():
    code = (
        "import sys, zoo.metrics; heavy = {'torchmetrics', 'scipy', 'lightning'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert zoo.metrics.MatchedIoU(joint=True).joint; assert 'torchmetrics' in sys.modules;"
        "from zoo.metrics import objects; assert objects.MatchedIoU is zoo.metrics.MatchedIoU"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_they_are_an_attribute_of_the_zoo():
    assert zoo.metrics.ShadowRemoval().names == NAMES
