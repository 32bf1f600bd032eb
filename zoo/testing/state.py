"""Contracts on state: saving, copying, devices, seeds, and how many parameters there are."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import torch
from torch import nn

from zoo.errors import ZooError
from zoo.host.attention import Attention
from zoo.host.spec import PartSpec, parse
from zoo.parts import Layout
from zoo.registry import Entry
from zoo.testing.subject import CHANNELS, FACTS, SLOTS, Build, settle
from zoo.testing.tolerances import assert_close
from zoo.testing.values import flag


def check_state_dict(build: Build) -> None:
    """A state_dict, through a file, brings another instance to the same outputs, also once used."""
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        x = build.input(2, 8)
        settle(module, x)
        expected = module(x)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = build(seed=1, dtype=torch.float64, **flag(build, causal)).eval()
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), expected), "outputs after load_state_dict differ"


def check_copy(build: Build) -> None:
    """Deep copies and pickles, before and after a training pass, give the same outputs."""
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal))
        x = build.input(2, 8)
        for state in ("new", "after a pass"):
            module.eval()
            expected = module(x)
            assert torch.equal(copy.deepcopy(module)(x), expected), f"deepcopy of a {state} module"
            found = pickle.loads(pickle.dumps(module))(x)
            assert torch.equal(found, expected), f"pickle of a {state} module"
            module.train()
            settle(module, x)


def check_device(build: Build) -> None:
    """Built on the meta device it holds no memory, and is whole once it is given its state."""
    for causal in build.modes:
        real = build(dtype=torch.float64, **flag(build, causal)).eval()
        empty = build(dtype=torch.float64, device="meta", **flag(build, causal)).eval()
        for name, item in itertools.chain(empty.named_parameters(), empty.named_buffers()):
            assert item.is_meta, f"{name} is on {item.device}, not on meta"
        empty.to_empty(device="cpu")  # poisoned with NaN by the tests' conftest
        empty.load_state_dict(real.state_dict())
        x = build.input(2, 8)
        assert_close(empty(x), real(x), "outputs of a module built on meta")


def check_seed(build: Build) -> None:
    """The same seed gives the same outputs and gradients in training; dropout is not ignored."""
    for causal in build.modes:
        x = build.input(2, 9)
        facts: dict[str, Any] = {"dtype": torch.float64, **flag(build, causal)}
        if build.takes("dropout"):
            facts["dropout"] = 0.4
        try:
            module = build(**facts).train()
        except ZooError as error:
            assert "dropout" in str(error)  # noqa: PT017 (to refuse it is right as well)
            facts.pop("dropout")
            module = build(**facts).train()
        torch.manual_seed(11)
        first = settle(module, x)
        torch.manual_seed(11)
        second = settle(module, x)
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{name} differs under one seed"
        again = build(**facts).train()
        torch.manual_seed(11)
        assert torch.equal(settle(again, x)["output"], first["output"]), "construction is random"
        if "dropout" in facts:
            torch.manual_seed(12)
            other = settle(module, x)["output"]
            assert not torch.equal(other, first["output"]), "dropout=0.4 does nothing in training"
            facts["dropout"] = 0.0
            plain = build(**facts).eval()
            assert torch.equal(module.eval()(x), plain(x)), "dropout acts outside training"


def expected_parameters(entry: Entry, facts: dict[str, Any], layout: Layout | None) -> int:
    """Evaluate an entry's formula for the number of its parameters."""
    names = {n: p.default for n, p in entry.options.items() if p.default is not p.empty}
    names.update(vars(layout) if layout is not None else {})
    names.update(facts)
    return eval(entry.parameters, {"__builtins__": {}}, names)


def _facts(build: Build) -> list[dict[str, Any]]:
    if build.entry.kind in ("feature", "slots"):
        return [{}]
    kv = (4, 2) if build.is_host and build.traits.grouped else (None,)
    biases = (False, True) if build.takes("bias") else (None,)
    depths = (0, 3) if build.takes("depth") else (None,)
    widths = (None, 6) if build.takes("head_dim") else (None,)
    found = []
    for causal, kv_heads, bias, depth, head_dim in itertools.product(
        build.modes, kv, biases, depths, widths
    ):
        values = {"kv_heads": kv_heads, "bias": bias, "depth": depth, "head_dim": head_dim}
        given = {name: value for name, value in values.items() if value is not None}
        found.append({**flag(build, causal), **given})
    return found


def check_parameters(build: Build) -> None:
    """The number of parameters is what the registered formula says, for all facts of the host."""
    (part,) = parse(build.spec)
    for facts in _facts(build):
        try:
            module = build(**facts)
        except ZooError as error:
            # A part may want one kv_heads or an even width; then it says so.
            named = [f for f in ("kv_heads", "head_dim") if f in facts and f in str(error)]
            assert named, f"refused {facts}: {error}"  # noqa: PT017
            continue
        counted: nn.Module = module
        layout = None
        known: dict[str, Any] = {"causal": False, "bias": False, "depth": 0, **FACTS, **facts}
        if build.entry.kind == "feature":
            known = {"channels": CHANNELS}
        if build.entry.kind == "slots":
            known = dict(SLOTS)
        if isinstance(module, Attention):
            counted = getattr(module, part.entry.kind)
            layout = module.layout
            known.update(kv_heads=module.kv_heads, head_dim=module.head_dim)
        else:
            known.setdefault("head_dim", FACTS["dim"] // FACTS["heads"])
            known.setdefault("kv_heads", FACTS["heads"])
        due = expected_parameters(part.entry, {**known, **_options(part)}, layout)
        count = sum(p.numel() for p in counted.parameters())
        assert count == due, f"{count} parameters, {part.entry.parameters!r} gives {due} ({facts})"
        trained = part.entry.taxonomy.trainable_params
        assert trained == (count > 0), f"taxonomy trainable_params={trained}, but {count} exist"


def _options(part: PartSpec) -> dict[str, Any]:
    return {name: value for name, value in part.options.items() if name in part.entry.options}
