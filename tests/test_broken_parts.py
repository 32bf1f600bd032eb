"""The contracts can fail: each meets parts that break it, and sound parts that do not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import broken_modules as modules
import broken_parts as broken
import pytest
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.gradcheck import GradcheckError

import zoo
from zoo.registry import Paper, Taxonomy, Traits, unregister
from zoo.testing.contract import CONTRACTS, owed
from zoo.testing.numerics import score_size
from zoo.testing.subject import Build

PLAIN = Taxonomy(
    sequences="self",
    levels="single",
    positions="global",
    representations="single",
    alignment="scaled_dot",
    distribution="inherited",
    complexity="quadratic",
)
SOFTMAX = replace(PLAIN, distribution="softmax")
TRAINED = replace(PLAIN, trainable_params=True)
LOCAL = Traits(cross=False, equivariant=False)


@contextmanager
def registered(cls: type, options: str = "", **facts: Any) -> Iterator[Build]:
    """Put a class into the registry for the length of a block."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
    settings = {
        "kind": cls.kind,  # type: ignore[attr-defined]
        "taxonomy": PLAIN,
        "traits": getattr(cls, "traits", Traits()),
        "paper": Paper("Parts that are wrong on purpose", 2026),
        **facts,
    }
    zoo.register(name, **settings)(cls)
    try:
        yield Build(name + options)
    finally:
        unregister(name)


SOUND = [
    (broken.SoundScore, {"taxonomy": TRAINED, "parameters": "score_heads"}),
    (modules.SoundFeature, {"taxonomy": TRAINED, "parameters": "64"}),
    (modules.SoundSlots, {"taxonomy": TRAINED, "parameters": "dim * (dim_in + slots)"}),
]
SLOTS = {"slot_order", "input_order", "slot_mask", "slot_chance"}


@pytest.mark.parametrize(("cls", "facts"), SOUND, ids=[c.__name__ for c, _ in SOUND])
def test_sound_parts_keep_every_contract(cls: type, facts: dict[str, Any]) -> None:
    with registered(cls, **facts) as build:
        names = owed(build)
        for name in names:
            CONTRACTS[name].check(build)
    kept = {"shape", "gradients", "batch", "gradcheck", "half", "large", "compile", "state_dict"}
    kept |= {"copy", "device", "seed", "parameters", "documented", "tested", "options", "repeat"}
    kept |= {"vmap", "door"}
    assert set(names) == {
        modules.SoundFeature: kept | {"formats"},
        modules.SoundSlots: kept | SLOTS,
    }.get(cls, set(CONTRACTS) - SLOTS - {"formats", "repeat"})


WINDOW = "(window=4)"
BROKEN: list[tuple[type, str, str, dict[str, Any]]] = [
    (broken.SoundScore, "documented", "no paper", {"paper": None}),
    (broken.Undocumented, "documented", "option 'start' undocumented", {}),
    (broken.Untested, "tested", "missing: tests/score/test_untested.py", {}),
    (broken.NoDefault, "options", r"without a default: \['sharpness'\]", {}),
    (broken.ManyArguments, "options", "args", {}),
    (modules.AcceptsAnything, "refusals", "nothing was refused", {}),
    (modules.OpenDoor, "door", "nothing was refused", {}),
    (broken.Idle, "bites", "equals plain attention", {}),
    (broken.WrongType, "shape", "type torch.float64 for torch.float32", {}),
    (broken.InPlace, "shape", "changed in place", {}),
    (modules.ShrinkingFeature, "shape", "output of shape", {}),
    (broken.DeadParameter, "gradients", "score.unused gets no gradient", {}),
    (broken.ZeroedParameter, "gradients", "gradient of score.unused is zero", {}),
    (broken.MixesBatch, "batch", "sample 0 alone", {}),
    (modules.MixingFeature, "batch", "sample 0 alone", {}),
    (broken.WrongGradient, "gradcheck", "Jacobian mismatch", {}),
    (broken.HalfPrecisionSum, "half", "bfloat16", {}),
    (broken.WrongType, "half", "output of type torch.float64", {}),
    (broken.Overflows, "large", "not finite", {}),
    (broken.BreaksGraph, "compile", "graph|data-dependent", {}),
    (broken.HasNoRule, "vmap", "does not have vmap support", {}),
    (broken.Forgetful, "state_dict", "after load_state_dict differ", {}),
    (broken.NotPicklable, "copy", "pickle|lambda", {}),
    (broken.AlwaysCpu, "device", "is on cpu, not on meta", {}),
    (broken.Noisy, "seed", "differs under one seed", {}),
    (modules.NoisyFeature, "seed", "differs under one seed", {}),
    (modules.IgnoresDropout, "seed", "dropout=0.4 does nothing", {}),
    (broken.SoundScore, "parameters", "4 parameters, '3'", {"parameters": "3"}),
    (
        broken.SoundScore,
        "parameters",
        "trainable_params=False, but 4",
        {"parameters": "score_heads"},
    ),
    (modules.Leaks, "causal", "d y_0 / d x_j", {}),
    (modules.LeaksByValue, "causal", "new future", {}),
    (broken.SeesHiddenKeys, "causal", "d y_1 / d x_j", {}),
    (modules.AlwaysCausal, "bidirectional", "does not see the second token", {}),
    (broken.PrefersEven, "equivariance", "permuted", {}),
    (broken.IgnoresPositions, "positions", r"positions of shape \(2, 9\)", {}),
    (broken.IgnoresMask, "padding", "padded against not padded", {}),
    (broken.SeesHiddenKeys, "padding", "padded against not padded", {}),
    (broken.AddsMasks, "additive", "hidden by", {}),
    (broken.IgnoresMask, "pairs", "sees a hidden key", {}),
    (broken.NanOnEmptyRows, "empty_rows", "not finite", {}),
    (broken.CountsFromZero, "decode", "decoded in pieces", {}),
    (broken.KeepsTooLittle, "decode", "decoded in pieces", {"options": WINDOW, "traits": LOCAL}),
    (broken.ForgetsMaskInOneRow, "decode_mask", "hidden tokens", {}),
    (
        broken.KeepsTooMuch,
        "cache",
        "its cache holds everything",
        {"options": WINDOW, "traits": LOCAL, "taxonomy": replace(PLAIN, complexity="linear")},
    ),
    (
        modules.GrowingState,
        "cache",
        "bytes of a recurrent state grow",
        {"taxonomy": replace(PLAIN, complexity="linear")},
    ),
    (modules.ModuloHeads, "grouped", "keys tiled to 4", {}),
    (broken.CountsOn, "packed", "packed sequences", {}),
    (modules.SeesHiddenContext, "cross", "new hidden context", {}),
    (broken.IgnoresBias, "bias", "the bias has no influence", {}),
    (modules.FalseWeights, "weights", "against weights times values", {}),
    (broken.Unnormalised, "distribution", "sum of a row's weights", {"taxonomy": SOFTMAX}),
    (broken.HoldsAllPairs, "memory", "the largest tensor grows", {}),
    (broken.DependsOnStrip, "strips", "route auto", {}),
    (modules.NoisyFeature, "repeat", "a second pass in evaluation differs", {}),
    (modules.LayoutFeature, "formats", "channels last", {}),
    (modules.OrderedSlots, "slot_order", "permuted slots", {}),
    (modules.OrderedInputs, "input_order", "permuted inputs", {}),
    (modules.SeesHiddenInputs, "slot_mask", "a hidden input has weight", {}),
    (modules.GlobalChance, "slot_chance", "the same generator gives other slots", {}),
]


@pytest.mark.parametrize(
    ("cls", "contract", "message", "facts"),
    BROKEN,
    ids=[f"{cls.__name__}-{contract}" for cls, contract, *_ in BROKEN],
)
def test_broken_parts_are_caught(
    cls: type, contract: str, message: str, facts: dict[str, Any]
) -> None:
    errors: tuple[type[BaseException], ...] = (AssertionError, pytest.fail.Exception)
    errors += {
        "gradcheck": (GradcheckError,),
        "compile": (TorchDynamoException,),
        "copy": (AttributeError,),
        "vmap": (RuntimeError,),
    }.get(contract, ())
    with registered(cls, **facts) as build:
        assert contract in owed(build), f"{contract} is not due for {cls.__name__}"
        with pytest.raises(errors, match=message):
            CONTRACTS[contract].check(build)


def test_every_contract_meets_a_part_that_breaks_it() -> None:
    assert {contract for _, contract, *_ in BROKEN} == set(CONTRACTS)


def test_a_check_is_not_content_with_tiny_scores() -> None:
    assert score_size(Build("mha")) > 1e4
