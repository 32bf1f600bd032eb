"""What the operators of all kernels share: argument lists said once, gradients asked for once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, Signature
from itertools import islice
from typing import Any, NoReturn, get_type_hints

from torch import Tensor
from torch.library import CustomOpDef

from zoo.errors import ZooError


def spread(form: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the fields of a form's named tuples, one after the other.

    PyTorch's operators take no tuples of different things: with this, a form, the one for tensors
    without data and their backward passes can share a named tuple of what all of them are given.

    Args:
        form: Annotated throughout; arguments whose types are named tuples are spread.
    """
    hints = get_type_hints(form)
    returned = hints.pop("return")
    fields: dict[str, Any] = {}
    tuples = []
    for name, kind in hints.items():
        own = get_type_hints(kind) if hasattr(kind, "_fields") else {name: kind}
        fields |= own
        tuples.append(kind if hasattr(kind, "_fields") else None)

    @wraps(form)
    def flat(*given: Any) -> Any:
        rest = iter(given)
        return form(
            *(next(rest) if t is None else t._make(islice(rest, len(t._fields))) for t in tuples)
        )

    kind = Parameter.POSITIONAL_OR_KEYWORD
    flat.__dict__["__signature__"] = Signature(
        [Parameter(name, kind, annotation=hint) for name, hint in fields.items()],
        return_annotation=returned,
    )
    return flat


def refuse_second(backward: CustomOpDef, reason: str) -> None:
    """Make the derivative of an operator that is a derivative itself an error.

    Args:
        backward: The operator.
        reason: What the error says.
    """

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise ZooError(reason)

    backward.register_autograd(refuse)


def wanted(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Those gradients of the first inputs that are asked for, and None for the others."""
    asked = ctx.needs_input_grad[: len(grads)]
    return tuple(x if needed else None for x, needed in zip(grads, asked, strict=True))
