"""Whole modules that choose a backend as the host chooses a route."""

from __future__ import annotations

from typing import ClassVar

from zoo.errors import unknown


class Backends:
    """A module with a `backend`, which also goes by the name of a route.

    Its own constructor checks and sets the backend.
    """

    # Backends that may be asked for by name.
    routes: ClassVar[tuple[str, ...]] = ()
    backend: str

    @property
    def route(self) -> str | None:
        """The backend under the name that `zoo bench NAME@ROUTE` goes by; None is "auto"."""
        return None if self.backend == "auto" else self.backend

    @route.setter
    def route(self, value: str | None) -> None:
        if value not in (None, *self.routes):
            raise unknown("route", value, self.routes)
        self.backend = value or "auto"
