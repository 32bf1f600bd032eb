"""What models are trained for: Lightning modules with their losses and torchmetrics, by name."""

from __future__ import annotations

from zoo.errors import unknown
from zoo.tasks.base import Task
from zoo.tasks.classification import ImageClassification
from zoo.tasks.language import LanguageModelling
from zoo.tasks.optim import SCHEDULES, Optim, parameter_groups, schedule
from zoo.tasks.tagging import TokenTagging

__all__ = [
    "SCHEDULES",
    "TASKS",
    "ImageClassification",
    "LanguageModelling",
    "Optim",
    "Task",
    "TokenTagging",
    "find",
    "parameter_groups",
    "schedule",
]

TASKS: dict[str, type[Task]] = {
    "classification": ImageClassification,
    "language": LanguageModelling,
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
