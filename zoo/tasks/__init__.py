"""What models are trained for: Lightning modules with their losses and torchmetrics, by name."""

from __future__ import annotations

from zoo.tasks.base import Batch, Figures, Task
from zoo.tasks.classification import ImageClassification
from zoo.tasks.collapse import CollapseProbe, representation_gap
from zoo.tasks.language import LanguageModelling
from zoo.tasks.optim import SCHEDULES, Optim, parameter_groups, schedule
from zoo.tasks.registry import find, names, task
from zoo.tasks.regression import Regression
from zoo.tasks.tagging import TokenTagging

__all__ = [
    "SCHEDULES",
    "Batch",
    "CollapseProbe",
    "Figures",
    "ImageClassification",
    "LanguageModelling",
    "Optim",
    "Regression",
    "Task",
    "TokenTagging",
    "find",
    "names",
    "parameter_groups",
    "representation_gap",
    "schedule",
    "task",
]
