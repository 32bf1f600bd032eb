"""What models are trained for: Lightning modules with their losses and torchmetrics, by name."""

from __future__ import annotations

from zoo.errors import unknown
from zoo.tasks.base import Task
from zoo.tasks.classification import ImageClassification
from zoo.tasks.collapse import CollapseProbe, representation_gap
from zoo.tasks.language import LanguageModelling
from zoo.tasks.optim import SCHEDULES, Optim, parameter_groups, schedule
from zoo.tasks.regression import Regression
from zoo.tasks.tagging import TokenTagging

__all__ = [
    "SCHEDULES",
    "TASKS",
    "CollapseProbe",
    "ImageClassification",
    "LanguageModelling",
    "Optim",
    "Regression",
    "Task",
    "TokenTagging",
    "find",
    "parameter_groups",
    "representation_gap",
    "schedule",
]

TASKS: dict[str, type[Task]] = {
    "classification": ImageClassification,
    "collapse": CollapseProbe,
    "language": LanguageModelling,
    "regression": Regression,
    "tagging": TokenTagging,
}


def find(name: str) -> type[Task]:
    """Return the task of that name.

    Raises:
        ZooError: There is none.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
