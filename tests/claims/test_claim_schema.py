"""The section `claim` of a recipe: read, checked, and without a say in what is run."""

from __future__ import annotations

import pytest
from claim_examples import GONE, RECIPE, write

from zoo.claims import recipes as stated
from zoo.claims.recipes import claim, resolved_claim
from zoo.claims.schema import read_claim
from zoo.claims.trials import names
from zoo.errors import ZooError
from zoo.runs.config import contents, identify, load, recipes, settings


def read(**changes):
    return read_claim({**RECIPE["claim"], **changes}, "claim")


def test_a_claim_is_read_as_it_is_written(tmp_path):
    found = claim(write(tmp_path))
    assert found.subject == "ours"
    assert list(found.variants) == ["ours", "softmax", "narrow"]
    assert found.overrides("narrow", 1) == ["attention=mha", "model.heads=1", "seed=1"]
    assert (found.seeds, found.needs) == (2, None)
    assert found.criterion == RECIPE["claim"]["criterion"]
    assert claim(write(tmp_path, claim__seeds=GONE)).seeds == 3


def test_a_recipe_without_a_claim():
    assert claim("mqar") is None
    with pytest.raises(ZooError, match="recipe 'mqar' states no claim; 'zoo claims' lists"):
        resolved_claim("mqar")


def test_the_variants_are_resolved(tmp_path):
    path = write(tmp_path)
    _, variants = resolved_claim(path)
    for name, overrides in RECIPE["claim"]["variants"].items():
        config = load(path, [*overrides, "seed=0"])
        assert variants[name].id == identify(config).id
        assert variants[name].config == contents(config)
    assert "test_noise/loss" in variants["ours"].metrics


def test_a_claim_a_budget_and_a_description_do_not_change_a_run(tmp_path):
    path = write(tmp_path)
    base = load(path)
    assert "claim" not in base
    for change in (
        {"claim__criterion": ["ours.loss < 1"]},
        {"claim": GONE},
        {"description": "Something else altogether."},
        {"budget__seeds": 7},
    ):
        other = load(write(tmp_path, **change))
        assert identify(other) == identify(base)
        assert settings(other) == settings(base)
    assert {"claim", "budget", "description"}.isdisjoint(settings(base))
    changed = load(write(tmp_path, model__dim=16))
    assert identify(changed).id != identify(base).id


def test_the_hash_is_that_of_every_word_and_of_the_order_of_the_variants():
    base = read()
    variants = RECIPE["claim"]["variants"]
    backwards = dict(reversed(variants.items()))
    assert read().hash == base.hash
    assert read(figures=dict(reversed(RECIPE["claim"]["figures"].items()))).hash == base.hash
    changes = [
        {"statement": "Another."},
        {"source": "Table 2"},
        {"seeds": 3},
        {"needs": "gpu"},
        {"requires": []},
        {"criterion": ["ours.loss < 3 * softmax.loss"]},
        {"variants": {**variants, "narrow": ["model.heads=4"]}},
        {"figures": {**RECIPE["claim"]["figures"], "loss": "val/loss"}},
        {"variants": backwards, "criterion": ["narrow.loss < 1"]},
        {"variants": variants, "criterion": ["narrow.loss < 1", "ours.loss < 9"]},
    ]
    assert len({base.hash, *(read(**change).hash for change in changes)}) == len(changes) + 1
    same = {"criterion": ["narrow.loss < softmax.loss + ours.loss"]}
    assert read(variants=backwards, **same).hash != read(**same).hash


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"criterium": []}, "unknown key in claim 'criterium'; did you mean 'criterion'"),
        ({"seeds": "many"}, "claim: seeds: Value 'many'"),
        ({"seeds": 0}, "claim: seeds=0 must be a whole number of at least 1"),
        ({"needs": "tpu"}, "unknown value of needs 'tpu'; did you mean 'gpu'"),
        ({"statement": " "}, "claim: statement is empty"),
        ({"source": ""}, "claim: source is empty"),
        ({"mechanism": "diferential"}, "unknown mechanism 'diferential'; did you mean"),
        ({"mechanism": "softmax_attention_that_is_not"}, "unknown mechanism"),
        ({"variants": {}}, "claim: variants is empty"),
        ({"variants": {"ours": "attention=mha"}}, "claim: variants"),
        ({"variants": {"our s": []}}, "variants: 'our s' must be a word"),
        ({"variants": {"min": []}}, "variants: 'min' must be a word"),
        ({"variants": {"class": []}}, "variants: 'class' must be a word"),
        ({"variants": {"ours": ["seed=3"]}}, "variant 'ours': 'seed=3' would make it a run of"),
        ({"variants": {"ours": ["metrics.report=x"]}}, "a variant may not change claim, metrics"),
        ({"variants": {"ours": ["name=x"]}}, "'name=x' would make it"),
        ({"figures": {}}, "claim: figures is empty"),
        ({"figures": {"a-b": "test/loss"}}, "figures: 'a-b' must be a word"),
        ({"criterion": []}, "claim: criterion is empty"),
        ({"criterion": ["our.loss < 1"]}, "unknown variant in 'our.loss < 1': 'our'; did you mean"),
        ({"criterion": ["ours.los < 1"]}, "unknown figure in 'ours.los < 1': 'los'; did you mean"),
        ({"requires": ["our.loss < 1"]}, "unknown variant in 'our.loss < 1': 'our'"),
        ({"criterion": ["ours.loss <"]}, "criterion 'ours.loss <' cannot be read"),
        ({"criterion": ["ours.loss ** 9 < 1"]}, "is not allowed"),
        ({"criterion": ["softmax.loss < 1"]}, "the criterion says nothing of 'ours'"),
    ],
)
def test_what_is_wrong_in_the_section_is_named(changes, said):
    with pytest.raises(ZooError) as caught:
        read(**changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["statement", "mechanism", "source", "variants", "criterion"])
def test_what_is_missing_is_named(key):
    section = {k: v for k, v in RECIPE["claim"].items() if k != key}
    with pytest.raises(ZooError, match=f"claim: {key} is missing; it has no default"):
        read_claim(section, "claim")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"claim": 3}, "claim must be a mapping"),
        ({"claim__criterion": ["ours.los < 1"]}, "recipe tiny_claim.yaml: claim: unknown figure"),
        ({"claim__figures__loss": "test/los"}, "variant 'ours': unknown metric of figure 'loss'"),
        ({"claim__figures__loss": "test_nose/loss"}, "did you mean 'test_noise/loss'"),
        ({"claim__figures__size": "parameter"}, "did you mean 'parameters'"),
        ({"claim__figures__size": "lr"}, "unknown metric of figure 'size'"),
        ({"claim__variants__narrow": ["model.hedas=1"]}, "variant 'narrow': unknown override"),
        ({"claim__variants__narrow": ["attention=mhaa"]}, "did you mean 'mha'"),
        ({"claim__variants__narrow": ["attention=mha"]}, "'softmax' and 'narrow' are the same run"),
        ({"claim__variants__ours": ["model.heads=4"]}, "'ours', does not use 'differential'"),
        ({"claims": 1}, "unknown key in recipe tiny_claim.yaml 'claims'; did you mean 'claim'"),
    ],
)
def test_a_recipe_with_a_wrong_claim_is_refused_when_it_is_loaded(tmp_path, changes, said):
    path = write(tmp_path, **changes)
    with pytest.raises(ZooError) as caught:
        stated.load(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_claim_is_no_claim_left_out(tmp_path):
    path = write(tmp_path, claim=GONE)
    path.write_text(path.read_text() + "claim:\n")
    with pytest.raises(ZooError, match="claim must be a mapping"):
        load(path)


def test_the_command_line_cannot_change_a_claim(tmp_path):
    path = write(tmp_path)
    for text in ("claim.seeds=9", "claim={}", "claim.criterion=['ours.loss < 9']"):
        with pytest.raises(ZooError, match="a claim is what its file says"):
            load(path, [text])


def test_a_mechanism_may_stand_in_the_layers_or_the_position_of_a_model(tmp_path):
    layers = ["model.layers.first=differential", "attention=mha"]
    assert stated.load(write(tmp_path, claim__variants__ours=layers)).name == "tiny_claim"


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_in_the_folder_of_claims_states_one_and_no_other(name):
    if name not in names():
        assert claim(name) is None
        return
    found, variants = resolved_claim(name)
    assert list(variants) == list(found.variants)
    assert found.seeds >= 3
    assert len(found.statement) > 20
