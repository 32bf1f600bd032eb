"""Small pictures of mechanisms as data addresses: what `zoo show` draws of an untrained one."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from zoo.host.spec import canonical
from zoo.registry import SOCKETS, Entry

LENGTH = 36
"""Tokens of a map; a square, since some mechanisms see them on a grid."""
_HEADS, _DPI = 2, 80


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Args:
        caption: What it shows.
        address: The picture as a data address.
    """

    caption: str
    address: str


def shown(entry: Entry) -> str | None:
    """Return the specification under which a mechanism is drawn; None if it forms no weights.

    Args:
        entry: The mechanism.
    """
    if entry.kind in ("feature", "slots"):
        return canonical(entry.name)
    if entry.kind in SOCKETS and entry.traits.weights:
        return canonical(entry.contender_in(_form(entry)))
    return None


def picture(entry: Entry) -> Picture:
    """Draw a mechanism, the same bytes every time.

    Args:
        entry: A mechanism for which `shown` has a specification.

    Raises:
        ZooError: It cannot be built at this size.
    """
    import matplotlib

    spec = shown(entry)
    assert spec is not None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the settings of a user's matplotlib are not in the records
        if entry.kind in SOCKETS:
            from zoo.pictures.show import draw, host_maps

            causal = _form(entry) == "causal"
            maps = host_maps(spec, heads=_HEADS, length=LENGTH, causal=causal)
            figure = draw(maps, title=spec)
            what = "random input, causal" if causal else "random input"
            caption = f"Attention maps of {spec}, untrained, on {what}."
        else:
            from zoo.pictures.figures import module_figure

            figure = module_figure(spec)
            caption = f"What {spec}, untrained, makes of random features of a photograph."
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return Picture(caption, _address("png", file.getvalue()))


def figure(caption: str, svg: str) -> Picture:
    """Return a figure of the leaderboard as a picture inside the page.

    Args:
        caption: What it shows.
        svg: The figure.
    """
    return Picture(caption, _address("svg+xml", svg.encode()))


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _form(entry: Entry) -> str:
    return "bidirectional" if entry.traits.bidirectional else "causal"
