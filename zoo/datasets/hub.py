"""Data sets from the hub, with a clear and quick answer where there is no network."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from zoo.errors import ZooError

if TYPE_CHECKING:
    import datasets

TIMEOUT = 1.5
"""Seconds to wait for a connection; ``datasets`` itself would try again for much longer."""


def reachable(timeout: float = TIMEOUT) -> bool:
    """Tell whether the hub takes a connection.

    Behind a proxy, which alone knows, the answer is yes.

    Args:
        timeout: Seconds to wait.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if address.scheme in urllib.request.getproxies():
        return True
    answer: list[bool] = []

    def connect() -> None:
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname or "", port), timeout=timeout).close()
        except OSError:
            return
        answer.append(True)

    # Looking up a name has no time limit of its own, hence the thread.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answer)


def load(
    repository: str, configuration: str | None = None, *, name: str, instead: str, local: str
) -> datasets.DatasetDict:
    """Load all splits of a data set of the hub, or from the copy that an earlier load left.

    Args:
        repository: Name on the hub.
        configuration: Name of the configuration, if it has several.
        name: Name of the data set here.
        instead: Data set here that needs no network.
        local: How to use a local copy.

    Raises:
        ZooError: There is no network, or the hub does not have it.
    """
    import datasets

    def refuse(why: str) -> ZooError:
        return ZooError(
            f"data set {name!r} needs {repository!r} from the hub: {why}; "
            f"use {instead!r}, which needs no network, or a local copy: {local}"
        )

    offline: Any = datasets.config.HF_HUB_OFFLINE
    if not offline and not reachable():
        raise refuse(
            "the hub cannot be reached (with a copy in the cache of an earlier run, "
            "set HF_HUB_OFFLINE=1)"
        )
    try:
        return datasets.load_dataset(repository, configuration)
    except OSError as error:
        variables = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        switched = [variable for variable in variables if os.environ.get(variable)]
        why = f"{' and '.join(switched)} is set and there is no copy in the cache"
        raise refuse(why if offline and switched else str(error)) from error
