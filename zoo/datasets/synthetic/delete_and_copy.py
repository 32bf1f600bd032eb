"""Delete and copy: signed sums, which weights that are all positive cannot give.

The task that the paper on negative attention weights ("More Expressive Attention with Negative
Weights", 2024, arXiv 2411.07176) motivates CoG attention by, made hard enough to decide: every
content token x_j has a type t_j and an item e_j; the last token, the command c, names the type to
delete and all others are to be copied. The target, at the command alone, is the signed bag of items

    y = sqrt(m / n) sum_j s(c, t_j) u(e_j),    s(c, t) = -1 if t = c, +1 otherwise,

with n = T - 1 content tokens, m items and u(e) the e-th unit vector of R^m. The factor gives every
number of y a variance of one where there are two types. The sign belongs to the pair of query and
key: no map of the values alone can put it there.

**One signed head can.** Let q(c) . k(x) = +b or -b after s(c, t), and 0 for the command itself.
With weights sign(p) softmax |p|, every content token gets weight s(c, t_j) / (n + exp(-b)), so that
the head gives the signed mean of its values, a multiple of y.

**One softmax head cannot**, whatever its scores and values are, in one layer without MLP, and
without positions that are added to the embeddings (rotary positions or biases change only the
scores). Take a sequence of n times the same token x = (t, e), and a command c. All content has one
value, so the head's output, added to the residual, normalised by a factor r > 0 and read out, is

    r (A_c + a (V(x) - U_c)),    0 < a <= 1 the weight that is not on the command,

with vectors A_c and U_c of the command alone and V(x) of the token alone. Say that it is the target
k s(c, t) u(e), k > 0, both for the command c = t and for another one, c'. Then

    V(x) = U_c - (k u(e) / r + A_c) / a    and    V(x) = U_c' + (k u(e) / r' - A_c') / a',

and the difference says that a positive multiple of u(e) lies in the span of U_c - U_c', A_c and
A_c', which has three dimensions at most. That must hold for every one of the m items: impossible
for m > 3. (For a single number, m = 1, it is possible: with most of the weight on the command,
softmax is a sum of any positive weights, and a constant added to them makes their signs. Two heads,
a second layer or an MLP can do it as well.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import checks
from zoo.datasets.registry import dataset
from zoo.datasets.synthetic.sequences import SyntheticData


def delete_and_copy(
    rows: int, generator: torch.Generator, *, seq_len: int, types: int, items: int
) -> tuple[Tensor, Tensor]:
    """Generate examples of delete and copy.

    Content tokens are ``type * items + item``; the commands come after them.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        seq_len: Tokens per example, the command included, T.
        types: Number of types.
        items: Number of items, m.

    Returns:
        Tokens (rows, T), and targets (rows, T, m) that are NaN but at the command.
    """
    count = seq_len - 1
    kind = torch.randint(types, (rows, count), generator=generator)
    item = torch.randint(items, (rows, count), generator=generator)
    command = torch.randint(types, (rows, 1), generator=generator)
    tokens = torch.cat([kind * items + item, types * items + command], 1)
    sign = torch.where(kind == command, -1.0, 1.0)
    bag = (sign[..., None] * F.one_hot(item, items)).sum(1)
    targets = torch.full((rows, seq_len, items), torch.nan)
    targets[:, -1] = bag * (items / count) ** 0.5
    return tokens, targets


@dataset("delete_and_copy")
@dataclass(kw_only=True, eq=False, repr=False)
class DeleteAndCopy(SyntheticData):
    """Delete and copy: the sum of the tokens to copy minus the sum of those to delete.

    After CoG attention, 2024, arXiv 2411.07176. Give it to a model of one layer and one head,
    without MLP and without positions in the embeddings.

    Args:
        seq_len: Tokens per example, the command included.
        types: Types of tokens, at least 2; the command names the one to delete.
        items: Items that a type has, at least 4: the numbers to predict.
        train_size: Number of training examples, repeated in epochs; None draws new ones forever.
        val_size: Number of validation examples.
        test_size: Number of examples in each test set.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size.
    """

    seq_len: int = 16
    types: int = 2
    items: int = 8

    task = "regression"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seq_len = checks.whole("seq_len", self.seq_len, 2)
        self.types = checks.whole("types", self.types, 2)
        # Fewer, and one softmax head can.
        self.items = checks.whole("items", self.items, 4)

    @property
    def vocab_size(self) -> int:
        """Number of tokens: every item of every type, and a command for each type."""
        return self.types * (self.items + 1)

    @property
    def num_outputs(self) -> int:
        """Numbers to predict, one for each item."""
        return self.items

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return delete_and_copy
