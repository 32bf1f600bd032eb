"""Criteria as text: comparisons of figures, such as `"cope.ood < 0.5 * min(absolute.ood, 1)"`.

What may be written is what a table can be asked: figures as `variant.figure`, numbers, `+ - * /`,
brackets, `min`, `max`, `abs`, and `< <= > >= == !=` between sums of those. The text is read into
Python's syntax tree and walked by this file alone; nothing of it is ever run as code, and powers,
attributes of anything else, other calls and conditions are refused.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from zoo.errors import ZooError, unknown

LONGEST = 300  # characters; a criterion that needs more cannot be judged by a reader

_OPERATIONS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_COMPARISONS: dict[type[ast.AST], Callable[..., bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max, "abs": abs}
_FORM = "write comparisons of variant.figure and numbers with + - * / min max abs"

Figure = tuple[str, str]
"""A variant and the short name of one of its figures."""


@dataclass(frozen=True)
class Comparison:
    """A statement about figures that holds or does not.

    Args:
        text: The statement, such as `"cope.ood < 0.5 * absolute.ood"`.

    Raises:
        ZooError: The text is not a comparison of figures and numbers.
    """

    text: str

    def __post_init__(self) -> None:
        for _ in _nodes(self.text, self._tree):  # reading all of it is what checks it
            pass

    @cached_property
    def _tree(self) -> ast.Compare:
        if len(self.text) > LONGEST:
            raise ZooError(f"criterion {self.text[:60]!r}... is longer than {LONGEST} characters")
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error) or "too deep"
            raise ZooError(f"criterion {self.text!r} cannot be read: {reason}") from None
        if not isinstance(tree, ast.Compare):
            raise ZooError(f"criterion {self.text!r} compares nothing; use <, <=, >, >=, == or !=")
        return tree

    @cached_property
    def figures(self) -> frozenset[Figure]:
        """Every figure that the text names."""
        found = set()
        for node in _nodes(self.text, self._tree):
            if isinstance(node, ast.Attribute):
                assert isinstance(node.value, ast.Name)
                found.add((node.value.id, node.attr))
        return frozenset(found)

    def holds(self, values: Mapping[Figure, float]) -> bool | None:
        """Return whether the statement holds; None where it divides by zero.

        Args:
            values: The value of each of `figures`.
        """
        try:
            sides = [_value(node, values) for node in (self._tree.left, *self._tree.comparators)]
        except ZeroDivisionError:
            return None
        return all(
            _COMPARISONS[type(compare)](left, right)
            for compare, left, right in zip(self._tree.ops, sides, sides[1:], strict=False)
        )


def _nodes(text: str, tree: ast.Compare) -> Iterator[ast.expr]:
    """Yield every operand of a comparison, refusing whatever does not belong there."""
    for compare in tree.ops:
        if type(compare) not in _COMPARISONS:
            raise _refusal(text, f"a comparison by {type(compare).__name__.lower()!r}")
    waiting = [tree.left, *tree.comparators]
    while waiting:
        node = waiting.pop()
        waiting += _operands(text, node)
        yield node


def _operands(text: str, node: ast.expr) -> list[ast.expr]:
    """Check one node and return what it is made of."""
    if isinstance(node, ast.Constant):
        if type(node.value) not in (int, float) or not math.isfinite(_number(node)):
            raise _refusal(text, f"the value {str(node.value)[:40]!r}")
        return []
    if isinstance(node, ast.Attribute):
        if not isinstance(node.value, ast.Name):
            raise _refusal(text, f"{ast.unparse(node)!r}")
        return []
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return [node.operand]
    if isinstance(node, ast.Call):
        return _arguments(text, node)
    if isinstance(node, ast.Name):
        raise ZooError(f"criterion {text!r}: {node.id!r} alone is no figure; write variant.figure")
    raise _refusal(text, f"{ast.unparse(node)[:60]!r}")


def _arguments(text: str, node: ast.Call) -> list[ast.expr]:
    if not isinstance(node.func, ast.Name):
        raise _refusal(text, f"a call of {ast.unparse(node.func)[:60]!r}")
    name = node.func.id
    if name not in FUNCTIONS:
        raise unknown(f"function in criterion {text!r}:", name, FUNCTIONS)
    count = len(node.args)
    if node.keywords or any(isinstance(item, ast.Starred) for item in node.args):
        raise _refusal(text, f"{ast.unparse(node)[:60]!r}")
    if (count != 1) if name == "abs" else (count < 2):
        takes = "one value" if name == "abs" else "two values or more"
        raise ZooError(f"criterion {text!r}: {name} takes {takes}, not {count}")
    return node.args


def _refusal(text: str, what: str) -> ZooError:
    return ZooError(f"criterion {text!r}: {what} is not allowed; {_FORM}")


def _number(node: ast.Constant) -> float:
    try:
        return float(node.value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf


def _value(node: ast.expr, values: Mapping[Figure, float]) -> float:
    """Compute an operand that `_operands` has let pass."""
    if isinstance(node, ast.Constant):
        return _number(node)
    if isinstance(node, ast.Attribute):
        assert isinstance(node.value, ast.Name)
        return values[node.value.id, node.attr]
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.UnaryOp):
        return _OPERATIONS[type(node.op)](_value(node.operand, values))
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return FUNCTIONS[node.func.id](*(_value(item, values) for item in node.args))
