"""Names that modules had before the house got its rooms: each still works and warns once.

An import of an old name gives the module under its new one, so that classes, pickles and patches
are the same by both. Old names end with version 0.3.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "zoo.attention": "zoo.host.attention",
    "zoo.catalogue": "zoo.docs.catalogue",
    "zoo.collect": "zoo.host.collect",
    "zoo.colour": "zoo.pictures.colour",
    "zoo.compositions": "zoo.docs.compositions",
    "zoo.datasets.bytes_stdlib": "zoo.datasets.language.bytes_stdlib",
    "zoo.datasets.checks": "zoo.checks",
    "zoo.datasets.cifar10": "zoo.datasets.vision.cifar10",
    "zoo.datasets.count_ones": "zoo.datasets.synthetic.count_ones",
    "zoo.datasets.counting": "zoo.datasets.synthetic.counting",
    "zoo.datasets.delete_and_copy": "zoo.datasets.synthetic.delete_and_copy",
    "zoo.datasets.digits": "zoo.datasets.vision.digits",
    "zoo.datasets.fashion_mnist": "zoo.datasets.vision.fashion_mnist",
    "zoo.datasets.flip_flop": "zoo.datasets.synthetic.flip_flop",
    "zoo.datasets.idx": "zoo.datasets.vision.idx",
    "zoo.datasets.images": "zoo.datasets.vision.images",
    "zoo.datasets.induction": "zoo.datasets.synthetic.induction",
    "zoo.datasets.istd": "zoo.datasets.vision.istd",
    "zoo.datasets.istd_files": "zoo.datasets.vision.istd_files",
    "zoo.datasets.moving_scenes": "zoo.datasets.vision.moving_scenes",
    "zoo.datasets.mqar": "zoo.datasets.synthetic.mqar",
    "zoo.datasets.needle": "zoo.datasets.synthetic.needle",
    "zoo.datasets.noisy_recall": "zoo.datasets.synthetic.noisy_recall",
    "zoo.datasets.object_files": "zoo.datasets.vision.object_files",
    "zoo.datasets.object_folders": "zoo.datasets.vision.object_folders",
    "zoo.datasets.parity": "zoo.datasets.synthetic.parity",
    "zoo.datasets.point_sets": "zoo.datasets.vision.point_sets",
    "zoo.datasets.same_different": "zoo.datasets.vision.same_different",
    "zoo.datasets.scene_sets": "zoo.datasets.vision.scene_sets",
    "zoo.datasets.scenes": "zoo.datasets.vision.scenes",
    "zoo.datasets.selective_copy": "zoo.datasets.synthetic.selective_copy",
    "zoo.datasets.shadow_synthesis": "zoo.datasets.vision.shadow_synthesis",
    "zoo.datasets.shadows": "zoo.datasets.vision.shadows",
    "zoo.datasets.sprites": "zoo.datasets.vision.sprites",
    "zoo.datasets.text": "zoo.datasets.language.text",
    "zoo.datasets.text_files": "zoo.datasets.language.text_files",
    "zoo.datasets.wikitext103": "zoo.datasets.language.wikitext103",
    "zoo.engine": "zoo.host.engine",
    "zoo.factory": "zoo.host.factory",
    "zoo.flops": "zoo.ops.flops",
    "zoo.linear_core": "zoo.ops.linear",
    "zoo.models.decoder_lm": "zoo.models.language.decoder_lm",
    "zoo.models.efficientnet": "zoo.models.vision.efficientnet",
    "zoo.models.rasm": "zoo.models.vision.rasm",
    "zoo.models.residual_attention": "zoo.models.vision.residual_attention",
    "zoo.models.set_autoencoder": "zoo.models.objects.set_autoencoder",
    "zoo.models.set_prediction": "zoo.models.objects.set_prediction",
    "zoo.models.slot_autoencoder": "zoo.models.objects.slot_autoencoder",
    "zoo.models.swin": "zoo.models.vision.swin",
    "zoo.models.transnormer": "zoo.models.language.transnormer",
    "zoo.partial": "zoo.ops.partial",
    "zoo.routes": "zoo.host.routes",
    "zoo.runs.board": "zoo.leaderboard.board",
    "zoo.runs.claim_schema": "zoo.claims.schema",
    "zoo.runs.claim_table": "zoo.leaderboard.page.claim_table",
    "zoo.runs.claims": "zoo.claims.trials",
    "zoo.runs.cluster": "zoo.sweeps.cluster",
    "zoo.runs.cluster_address": "zoo.sweeps.cluster_address",
    "zoo.runs.comparison": "zoo.leaderboard.comparison",
    "zoo.runs.current": "zoo.leaderboard.current",
    "zoo.runs.efficiency": "zoo.leaderboard.efficiency",
    "zoo.runs.environment": "zoo.report.environment",
    "zoo.runs.expressions": "zoo.claims.expressions",
    "zoo.runs.fields": "zoo.runs.record_fields",
    "zoo.runs.figures": "zoo.leaderboard.page.figures",
    "zoo.runs.grid": "zoo.sweeps.grid",
    "zoo.runs.html": "zoo.leaderboard.page.html",
    "zoo.runs.leaderboard": "zoo.leaderboard.page.markdown_page",
    "zoo.runs.leash": "zoo.sweeps.leash",
    "zoo.runs.markdown": "zoo.report.markdown",
    "zoo.runs.nursery": "zoo.sweeps.nursery",
    "zoo.runs.processes": "zoo.sweeps.processes",
    "zoo.runs.remote": "zoo.sweeps.remote",
    "zoo.runs.spawn": "zoo.sweeps.spawn",
    "zoo.runs.standings": "zoo.leaderboard.page.standings",
    "zoo.runs.stats": "zoo.statistics.spread",
    "zoo.runs.summary": "zoo.leaderboard.summary",
    "zoo.runs.sweep": "zoo.sweeps.sweep",
    "zoo.runs.tournament": "zoo.leaderboard.tournament",
    "zoo.runs.tracks": "zoo.leaderboard.tracks",
    "zoo.runs.verdicts": "zoo.claims.verdicts",
    "zoo.show": "zoo.pictures.show",
    "zoo.spec": "zoo.host.spec",
    "zoo.tiling": "zoo.ops.tiling",
}
"""New name by old name."""
PACKAGES = {
    "zoo.datasets.synthetic": "zoo.datasets.synthetic.sequences",
    "zoo.models.vision": "zoo.models.vision.hosts",
    "zoo.pictures": "zoo.pictures.figures",
}
"""Where the contents are of a module whose name is a package now."""
FUNCTIONS = {
    "zoo.checks": dict.fromkeys(
        (
            *("check_cache", "check_facts", "check_input", "check_packed", "check_positions"),
            *("spread", "spread_gate"),
        ),
        "zoo.host.checks",
    ),
    "zoo.runs.config": {
        "claim": "zoo.claims.recipes",
        "resolved_claim": "zoo.claims.recipes",
    },
    "zoo.runs.records": {"replace_text": "zoo.report.files"},
}
"""Where single functions went, by the module that they left."""


class _Loader(Loader):
    """Puts the module of the new name in place of that of the old one."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to Python."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Import the new module; what `sys.modules` holds afterwards is what the importer gets."""
        old = module.__name__
        warnings.warn(f"{old} is called {MODULES[old]} now", FutureWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(MODULES[old])


class _Finder(MetaPathFinder):
    """Finds old names; asked last, when no module has them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to load an old name, None for all others."""
        return ModuleSpec(name, _Loader()) if name in MODULES else None


def install() -> None:
    """Let Python find old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def content(package: str, name: str) -> Any:
    """Return what `name` was while `package` was a module; for its ``__getattr__``.

    Raises:
        AttributeError: It was nothing.
    """
    module = None if name.startswith("_") else importlib.import_module(PACKAGES[package])
    if not hasattr(module, name):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return _take(package, name, PACKAGES[package])


def function(module: str, name: str) -> Any:
    """Return a function that left `module`; for its ``__getattr__``.

    Raises:
        AttributeError: None of that name did.
    """
    if name not in FUNCTIONS[module]:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return _take(module, name, FUNCTIONS[module][name])


def _take(old: str, name: str, new: str) -> Any:
    """Warn, and leave the value where it was looked for, so that it warns once."""
    warnings.warn(f"{old}.{name} is called {new}.{name} now", FutureWarning, stacklevel=4)
    value = getattr(importlib.import_module(new), name)
    setattr(sys.modules[old], name, value)
    return value
