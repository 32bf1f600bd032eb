"""Which pairs of query and key meet, as a mechanism itself says at a small size.

Nothing is trained, and what is drawn holds for every choice of parameters: pairs that always, never
or sometimes have a weight, seen over many random inputs, and what a bias fixes beforehand. Where
nothing is hidden and nothing fixed a sentence says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.host import engine
from zoo.host.attention import Attention
from zoo.host.factory import create
from zoo.registry import FORMS, SOCKETS, Entry

LENGTH = 36
"""Tokens of a pattern; a square, since some mechanisms see them on a grid."""
SOMETIMES = 0.3
"""Shade of a pair that meets for some inputs only."""
BANDS = (0.9, 0.5, 0.2)
"""Shades of neighbouring distances that do not share a number of the bias."""
_DIM, _HEADS, _SAMPLES = 32, 4, 64
# Inputs so large that the scores lie far apart: then contents decide whatever they can decide.
_SIZE = 3.0


@dataclass(frozen=True)
class Panel:
    """A square of queries and keys.

    Args:
        title: What it shows.
        shades: From 0 (empty) to 1 (dark), a row for each query.
    """

    title: str
    shades: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Pattern:
    """Which pairs meet.

    Args:
        caption: What the panels show or, without any, why there is nothing to show.
        panels: The panels.
    """

    caption: str
    panels: tuple[Panel, ...] = ()


def pattern(entry: Entry) -> Pattern | None:
    """Ask a mechanism which pairs meet, the same answer every time.

    Args:
        entry: The mechanism; None is returned for one that fills no socket.

    Raises:
        ZooError: It cannot be built at this size.
    """
    if entry.kind not in SOCKETS:
        return None
    forms = [form for form in FORMS if getattr(entry.traits, form)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        hosts = {form: _host(entry.contender_in(form), form) for form in forms}
        if entry.kind == "position" and next(iter(hosts.values())).position.static:
            return _of_bias(hosts)
        if not all(host.traits.weights for host in hosts.values()):
            return Pattern("It forms no weights for pairs, so that there is no pattern to draw.")
        return _of_weights(entry, hosts)


def _host(spec: str, form: str) -> Attention:
    torch.manual_seed(0)
    causal, made = form == "causal", torch.float64
    host = create(spec, dim=_DIM, heads=_HEADS, causal=causal, max_len=LENGTH, dtype=made)
    assert isinstance(host, Attention)
    return host.eval()


def _inputs(samples: int) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return _SIZE * torch.randn(samples, LENGTH, _DIM, generator=source, dtype=torch.float64)


def _of_weights(entry: Entry, hosts: dict[str, Attention]) -> Pattern:
    """Pairs with a weight: in every sample and head, in some, in none."""
    panels, plain, varied, axes = [], True, False, 1
    for form, host in hosts.items():
        _, weights = host(_inputs(_SAMPLES), need_weights=True)
        meets = (weights != 0).flatten(0, 1)  # (samples * heads, N, M)
        always, ever = meets.all(0), meets.any(0)
        plain &= bool((always == _visible(form)).all())
        varied |= bool((ever & ~always).any())
        axes = max(axes, getattr(host.select, "ndim", 1))
        panels.append(_panel(f"{host.spec}, {form}", always + SOMETIMES * (ever & ~always)))
    if plain and entry.kind != "select":
        return Pattern(_nothing_hidden(next(iter(hosts.values())), list(hosts)))
    light = "; light: it depends on what the tokens hold" * varied
    grid = f" On a grid, tokens are read row by row ({round(LENGTH**0.5)} to a row)." * (axes > 1)
    caption = f"Which query meets which key, {LENGTH} tokens. Dark: always{light}; empty: never."
    return Pattern(caption + grid, tuple(panels))


def _nothing_hidden(host: Attention, forms: list[str]) -> str:
    """Why there is no pattern, in words."""
    reach = "a query meets every key"
    if forms == ["causal"]:
        reach += " up to itself"
    elif "causal" in forms:
        reach += ", or every key up to itself in a causal layer"
    fixed = "Nothing is fixed beforehand"
    if host.position.biases:
        fixed = "Its bias on the scores depends on what the tokens hold"
    elif host.position.rotates:
        fixed = "Queries and keys are turned by where they stand, and the scores get no bias"
    elif host.position.embeds:
        fixed = "Positions are added to the embeddings, and the scores get no bias"
    return f"No pair is hidden: {reach}. {fixed}, so that there is no pattern to draw."


def _of_bias(hosts: dict[str, Attention]) -> Pattern:
    """What a bias that depends on positions alone does to pairs."""
    form, host = next(iter(hosts.items()))
    if not list(host.position.parameters()):
        terms = _bias(host).masked_fill(~_visible(form), -torch.inf)
        left = (terms - terms.amax(-1, keepdim=True)).exp()
        panels = [_panel(f"{host.spec}, {form}, head {h + 1}", one) for h, one in enumerate(left)]
        caption = (
            f"What the bias leaves of a weight, e to its power, for {_HEADS} heads and {LENGTH} "
            "tokens. Dark: all of it; empty: nothing."
        )
        return Pattern(caption, tuple(panels))
    biases = {form: _bias(one)[0] for form, one in hosts.items()}
    if not all(_by_distance(one) for one in biases.values()):
        return Pattern("No pair is hidden; each may get a learned number of its own.")
    panels = [
        _panel(f"{hosts[form].spec}, {form}", _bands(bias) * _visible(form))
        for form, bias in biases.items()
    ]
    caption = (
        f"Pairs that share one learned number of the bias, {LENGTH} tokens: a band of one shade. "
        "The shades only tell neighbouring bands apart; what the numbers are, training decides."
    )
    return Pattern(caption, tuple(panels))


def _bias(host: Attention) -> Tensor:
    """The static term of a position, (heads, N, M)."""
    call = host.begin(_inputs(1))
    (strip,) = engine.strips(call, host.select, whole=True)
    return host.position.bias(strip, None)[0].expand(_HEADS, LENGTH, LENGTH)


def _by_distance(bias: Tensor) -> bool:
    """Whether pairs at one distance have one number, (N, M)."""
    return bool((bias[1:, 1:] == bias[:-1, :-1]).all())


def _bands(bias: Tensor) -> Tensor:
    """Shades by which neighbouring distances with different numbers differ, (N, M)."""
    shades = torch.zeros_like(bias)
    for way in (1, -1):  # to the past and to the future, beginning at the query
        steps = [bias.diagonal(-way * distance)[0].item() for distance in range(LENGTH)]
        band = 0
        for distance, value in enumerate(steps):
            band += distance > 0 and value != steps[distance - 1]
            shades.diagonal(-way * distance).fill_(BANDS[band % len(BANDS)])
    return shades


def _visible(form: str) -> Tensor:
    """Pairs that the form of a layer lets meet, (N, M)."""
    every = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return every.tril() if form == "causal" else every


def _panel(title: str, shades: Tensor) -> Panel:
    return Panel(title, tuple(map(tuple, shades.double().tolist())))
