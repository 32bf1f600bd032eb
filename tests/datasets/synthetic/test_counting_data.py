"""Variable counting: run every program and compare the answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.synthetic.counting import counting, vocabulary
from zoo.errors import ZooError

OPTIONS = {
    "seq_len": 60,
    "variables": 2,
    "max_value": 10,
    "min_statements": 3,
    "max_statements": 20,
    "set_weight": 1,
    "increment_weight": 7,
    "pass_weight": 10,
}


def run(row: list[int], words: tuple[str, ...], max_value: int) -> tuple[int, int, int]:
    """Run a program: statements, place of the question's last token, and the answer."""
    text = [words[token] for token in row]
    values: dict[str, int] = {}
    place = statements = 0
    while text[place] != "print":
        statements += 1
        if text[place] == "pass;":
            place += 1
        elif text[place + 1] == "++;":
            values[text[place]] += 1
            assert values[text[place]] <= max_value
            place += 2
        else:
            assert text[place + 1 : place + 4] == ["=", "0", ";"]
            assert text[place].isalpha()
            values[text[place]] = 0
            place += 4
    assert set(text[place + 2 :]) <= {"<pad>"}
    return statements, place + 1, values[text[place + 1]]


@given(
    seq_len=st.integers(6, 60),
    variables=st.integers(1, 5),
    max_value=st.integers(1, 10),
    low=st.integers(1, 10),
    more=st.integers(0, 15),
    weights=st.sampled_from([(1, 7, 10), (1, 7, 0), (5, 1, 1), (1, 30, 1), (1, 0, 1)]),
    seed=st.integers(0, 2**32),
)
def test_running_the_program_gives_the_answer(
    seq_len, variables, max_value, low, more, weights, seed
):
    words = vocabulary(variables, max_value)
    tokens, targets = counting(
        4,
        torch.Generator().manual_seed(seed),
        seq_len=seq_len,
        variables=variables,
        max_value=max_value,
        min_statements=low,
        max_statements=low + more,
        set_weight=weights[0],
        increment_weight=weights[1],
        pass_weight=weights[2],
    )
    assert tokens.shape == targets.shape == (4, seq_len)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        statements, place, answer = run(row, words, max_value)
        assert statements <= low + more
        assert words[wanted[place]] == str(answer)
        assert [target for target in wanted if target != IGNORE] == [wanted[place]]
        # A program is shorter than it was meant to be only where the next statement did not fit.
        assert statements >= low or place + 1 > seq_len - 4


def test_statements_are_uniform_and_have_their_weights():
    # All variables are set at once and far from full, so that no statement is impossible.
    options = {**OPTIONS, "seq_len": 400, "variables": 1, "max_value": 200}
    options |= {"set_weight": 2, "increment_weight": 3, "pass_weight": 5, "max_statements": 90}
    words = vocabulary(1, 200)
    tokens, _ = counting(3000, torch.Generator().manual_seed(0), **options)
    lengths, after = [], torch.zeros(3)
    for row in tokens.tolist():
        text = [words[token] for token in row]
        lengths.append(run(row, words, 200)[0])
        text = text[text.index("=") + 3 : text.index("print")]
        after += torch.tensor([text.count("="), text.count("++;"), text.count("pass;")])
    share = after / after.sum()
    torch.testing.assert_close(share, torch.tensor([0.2, 0.3, 0.5]), rtol=0, atol=0.01)
    # Short programs without a variable were drawn again; long ones hardly ever.
    counts = torch.tensor(lengths).bincount(minlength=91)[31:91].reshape(3, 20).sum(dim=1)
    torch.testing.assert_close(counts / counts.sum(), torch.full((3,), 1 / 3), rtol=0, atol=0.06)


def test_a_full_variable_leaves_the_other_its_share():
    # Where one of two variables is full, half of the increments drawn are impossible and drawn
    # again with everything else: increments keep half their weight, 3 of 1 + 3 + 2.
    options = {**OPTIONS, "max_value": 1, "seq_len": 120, "max_statements": 40}
    options |= {"set_weight": 1, "increment_weight": 6, "pass_weight": 2}
    tokens, _ = counting(600, torch.Generator().manual_seed(0), **options)
    words = vocabulary(2, 1)
    seen = {"pass;": 0, "=": 0, "++;": 0}
    for row in tokens.tolist():
        text = [words[token] for token in row]
        values: dict[str, int] = {}
        place = 0
        while text[place] != "print":
            kind = "pass;" if text[place] == "pass;" else text[place + 1]
            if sorted(values.values()) == [0, 1]:
                seen[kind] += 1
            if kind != "pass;":
                values[text[place]] = 0 if kind == "=" else values[text[place]] + 1
            place += {"pass;": 1, "=": 4, "++;": 2}[kind]
    total = sum(seen.values())
    assert total > 1000
    shares = [seen[kind] / total for kind in ("=", "++;", "pass;")]
    assert shares == pytest.approx([1 / 6, 1 / 2, 1 / 3], abs=0.06)


def test_all_set_variables_are_asked_for_equally():
    options = {**OPTIONS, "set_weight": 40, "pass_weight": 0, "min_statements": 15}
    tokens, _ = counting(3000, torch.Generator().manual_seed(0), **options)
    words = vocabulary(2, 10)
    asked = [words[row[run(row, words, 10)[1]]] for row in tokens.tolist()]
    assert asked.count("a") / len(asked) == pytest.approx(0.5, abs=0.05)


def test_longer_programs_become_a_test_set(whole):
    data = datasets.create(
        "counting", max_statements=20, seq_len=50, test_statements=[40], test_size=50
    )
    assert data.test_names == ["test", "statements40"]
    words = data.vocabulary
    plain, longer = (whole(loader)["tokens"] for loader in data.test_dataloader())
    assert longer.shape == (50, 100)
    assert data.max_seq_len == 100
    assert all(run(row, words, 10)[0] <= 20 for row in plain.tolist())
    assert all(21 <= run(row, words, 10)[0] <= 40 for row in longer.tolist())


def test_the_default_answers_are_spread_over_all_values(whole):
    data = datasets.create("counting")
    targets = whole(data.val_dataloader())["targets"]
    answers = targets[targets != IGNORE].bincount(minlength=12)[1:] / len(targets)
    assert (answers > 0.02).all()
    assert answers.max() < 0.2


def test_the_vocabulary_names_every_token():
    data = datasets.create("counting", variables=3, max_value=2)
    assert data.vocab_size == len(data.vocabulary) == 12
    assert data.vocabulary == (
        *("<pad>", "0", "1", "2"),
        *("=", ";", "++;", "pass;", "print"),
        *("a", "b", "c"),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 5}, "seq_len=5 must be a whole number of at least 6"),
        ({"variables": 0}, "variables=0 must be a whole number from 1 to 26"),
        ({"variables": 27}, "variables=27 must be a whole number from 1 to 26"),
        ({"max_value": 0}, "max_value=0 must be a whole number of at least 1"),
        ({"min_statements": 65}, "max_statements=64 must be a whole number of at least 65"),
        ({"set_weight": 0}, "set_weight=0 must be a number above 0"),
        ({"pass_weight": -1}, "pass_weight=-1 must be a number of at least 0"),
        ({"increment_weight": float("inf")}, "increment_weight=inf must be a number of at least 0"),
        ({"test_statements": [64]}, r"test_statements\[0\]=64 must be .* number of at least 65"),
        ({"test_statements": 128}, "test_statements=128 must be a list"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("counting", **options)


def test_programs_that_never_set_a_variable_are_an_error_and_not_an_endless_loop():
    options = {**OPTIONS, "set_weight": 1e-12, "max_statements": 3}
    with pytest.raises(ZooError, match=r"set_weight 1e-12 is too small beside pass_weight 10"):
        counting(2, torch.Generator().manual_seed(0), **options)
