"""Variable counting (CoPE, 2024, arXiv 2405.18719; facebookresearch/RAM, projects/cope).

A small program, then the question for the value of one variable, 0 to 10::

    pass; a = 0 ; pass; a ++; pass; a ++; print a   ->  2

Statements are drawn with weights 1 (set a variable to 0), 7 (increment one that is set) and 50
(pass); one that is impossible, an increment past 10 or of nothing, is drawn again. The number of
statements is uniform, 3 to 512 in the paper. A program without any variable is drawn again. The
only target is the answer, at the last token of the question; padding follows it.

The defaults, 3 to 64 statements with weight 10 for pass, are a short form in which the answers are
distributed much as they are at the paper's length.

Where we follow neither code nor paper: the official code cuts the beginning off a program that is
too long, which can remove what the question asks for. Here a program ends before the statement
that would not fit, so that every question has an answer.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import IGNORE
from zoo.datasets.registry import dataset
from zoo.datasets.synthetic.sequences import SyntheticData
from zoo.errors import ZooError

PAD = 0
_ROUNDS = 1000
_UNSET = -1


def vocabulary(variables: int, max_value: int) -> tuple[str, ...]:
    """Return the word of every token: padding, the numbers, the keywords, the variables."""
    numbers = [str(value) for value in range(max_value + 1)]
    keywords = ["=", ";", "++;", "pass;", "print"]
    return ("<pad>", *numbers, *keywords, *string.ascii_lowercase[:variables])


def counting(
    rows: int,
    generator: torch.Generator,
    *,
    seq_len: int,
    variables: int,
    max_value: int,
    min_statements: int,
    max_statements: int,
    set_weight: float,
    increment_weight: float,
    pass_weight: float,
) -> tuple[Tensor, Tensor]:
    """Generate examples of variable counting.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        seq_len: Tokens per example, T.
        variables: Number of variables, n.
        max_value: Largest value.
        min_statements: Fewest statements of a program.
        max_statements: Most statements of a program.
        set_weight: Weight of setting a variable to 0.
        increment_weight: Weight of an increment.
        pass_weight: Weight of a statement that does nothing.

    Raises:
        ZooError: Programs with a variable are so rare that none came up.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    found = 0
    for _ in range(_ROUNDS):
        tokens, targets = _programs(
            rows,
            generator,
            seq_len=seq_len,
            variables=variables,
            max_value=max_value,
            statements=(min_statements, max_statements),
            weights=(set_weight, increment_weight, pass_weight),
        )
        kept.append((tokens, targets))
        found += len(tokens)
        if found >= rows:
            tokens, targets = (torch.cat(column)[:rows] for column in zip(*kept, strict=True))
            return tokens, targets
    raise ZooError(
        f"set_weight {set_weight!r} is too small beside pass_weight {pass_weight!r}: "
        f"of {_ROUNDS * rows} programs, {found} set a variable; raise set_weight"
    )


def _programs(
    rows: int,
    generator: torch.Generator,
    *,
    seq_len: int,
    variables: int,
    max_value: int,
    statements: tuple[int, int],
    weights: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """Draw programs and keep those that have a variable to ask for: at most `rows` of them."""
    words = vocabulary(variables, max_value)
    token = {word: number for number, word in enumerate(words)}
    names = words[-variables:]
    # What can happen in one statement: pass, set variable 1 .. n, increment variable 1 .. n, and
    # nothing any more. All as four tokens, of which the next statement overwrites the padding.
    written = [
        ["pass;"],
        *([name, "=", "0", ";"] for name in names),
        *([name, "++;"] for name in names),
        [],
    ]
    cost = torch.tensor([len(line) for line in written])
    text = torch.tensor([[token[w] for w in line] + [PAD] * (4 - len(line)) for line in written])
    ended = len(written) - 1
    set_weight, increment_weight, pass_weight = weights

    low, high = statements
    counts = torch.randint(low, high + 1, (rows,), generator=generator)
    lots = torch.rand(rows, high, dtype=torch.float64, generator=generator)
    tokens = torch.full((rows, seq_len + 4), PAD)
    used = torch.zeros(rows, dtype=torch.int64)
    values = torch.full((rows, variables), _UNSET)
    open_ = torch.ones(rows, dtype=torch.bool)
    law = torch.zeros(rows, 1 + 2 * variables, dtype=torch.float64)
    law[:, 0] = pass_weight
    law[:, 1 : 1 + variables] = set_weight / variables
    for step in range(int(counts.max())):
        known = values != _UNSET
        # Drawing an increment again when its variable is full leaves the others their share.
        share = increment_weight / known.sum(dim=1, keepdim=True).clamp(min=1)
        law[:, 1 + variables :] = share * (known & (values < max_value))
        edges = law.cumsum(dim=1)
        event = (edges[:, :-1] <= lots[:, step, None] * edges[:, -1:]).sum(dim=1)
        open_ &= (step < counts) & (used + cost[event] <= seq_len - 2)
        event = torch.where(open_, event, ended)

        tokens.scatter_(1, used[:, None] + torch.arange(4), text[event])
        used += cost[event]
        which = ((event - 1) % variables)[:, None]
        old = values.gather(1, which)[:, 0]
        new = torch.where(event <= variables, 0, old + 1)
        new = torch.where((event == 0) | ~open_, old, new)
        values.scatter_(1, which, new[:, None])

    known = values != _UNSET
    lot = torch.rand(rows, variables, generator=generator)
    asked = torch.where(known, lot, -1.0).argmax(dim=1, keepdim=True)
    question = torch.cat((torch.full_like(asked, token["print"]), asked + token[names[0]]), dim=1)
    tokens.scatter_(1, used[:, None] + torch.arange(2), question)
    tokens = tokens[:, :seq_len]
    answer = values.gather(1, asked) + token["0"]
    targets = torch.full_like(tokens, IGNORE).scatter_(1, used[:, None] + 1, answer)
    answerable = known.any(dim=1)
    return tokens[answerable], targets[answerable]


@dataset("counting")
@dataclass(kw_only=True, eq=False, repr=False)
class Counting(SyntheticData):
    """Variable counting: how often was this variable incremented since it was last set.

    CoPE, 2024, arXiv 2405.18719, section on the counting task.

    Args:
        seq_len: Tokens per example, question included; a longer program ends early.
        variables: Number of variables, 1 to 26; the paper has 1, 3 and 5.
        max_value: Largest value a variable takes.
        min_statements: Fewest statements of a program.
        max_statements: Most statements of a program.
        set_weight: Weight of setting a variable to 0.
        increment_weight: Weight of an increment.
        pass_weight: Weight of a statement that does nothing.
        test_statements: Further test sets with more statements than training, up to these
            numbers, in sequences that are longer by the same ratio; named ``statements128``.
        train_size: Number of training examples, repeated in epochs; None draws new ones forever.
        val_size: Number of validation examples.
        test_size: Number of examples in each test set.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size or weight.
    """

    seq_len: int = 128
    variables: int = 1
    max_value: int = 10
    min_statements: int = 3
    max_statements: int = 64
    set_weight: float = 1
    increment_weight: float = 7
    pass_weight: float = 10
    test_statements: Sequence[int] = (128,)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Shorter, and no variable can be set before it is asked for.
        self.seq_len = checks.whole("seq_len", self.seq_len, 6)
        self.variables = checks.whole("variables", self.variables, 1, 26)
        self.max_value = checks.whole("max_value", self.max_value, 1)
        self.min_statements = checks.whole("min_statements", self.min_statements, 1)
        self.max_statements = checks.whole(
            "max_statements", self.max_statements, self.min_statements
        )
        self.set_weight = checks.number("set_weight", self.set_weight, above=0)
        for name in ("increment_weight", "pass_weight"):
            setattr(self, name, checks.number(name, getattr(self, name), 0))
        self._more = checks.each(checks.whole)(
            "test_statements", self.test_statements, self.max_statements + 1
        )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The word of every token."""
        return vocabulary(self.variables, self.max_value)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.vocabulary)

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return counting

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the test sets with longer programs."""
        return {
            f"statements{most}": {
                "min_statements": self.max_statements + 1,
                "max_statements": most,
                "seq_len": -(-self.seq_len * most // self.max_statements),
            }
            for most in self._more
        }
