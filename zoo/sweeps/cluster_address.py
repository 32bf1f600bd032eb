"""The address of a Ray cluster, made sure of before Ray is asked to connect.

Ray itself waits for minutes at an address where nobody answers. So the port is tried first, and
then the connection, by another process that can be ended when it takes too long.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from zoo.errors import ZooError

LIMIT = 10.0  # seconds until an address must have answered, beside what it takes to import torch
_KNOCK = 4.0  # seconds of them for the port
_ALLOWED = "allowed: HOST:PORT, ray://HOST:PORT, auto (a cluster of this machine) or local"
_PORTS = range(1, 65536)

# An error of Ray has many lines; its first one says what is wrong.
_TRIAL = """
import sys, ray
try:
    ray.init(sys.argv[1], logging_level="critical", log_to_driver=False)
except BaseException as error:
    error = error.__cause__ or error
    sys.exit("answer: " + (str(error).strip() or type(error).__name__).splitlines()[0])
"""


def resolve(address: str) -> str | None:
    """Return the address of a cluster that answers; None for an instance on this machine.

    Args:
        address: HOST:PORT, ray://HOST:PORT, `auto` or `local`.

    Raises:
        ZooError: The address is malformed, or nobody answers there in time.
    """
    begun, wanted = time.monotonic(), address
    if address == "local":
        return None
    if address == "auto":
        address = _find()
    host, port = parse(address)
    _knock(wanted, host, port, _KNOCK)
    if address.startswith("ray://") and importlib.util.find_spec("grpc") is None:
        raise ZooError(f"ray address {wanted!r} takes more of Ray: pip install 'ray[client]'")
    _try(wanted, address, LIMIT - (time.monotonic() - begun))
    return address


def parse(address: str) -> tuple[str, int]:
    """Return host and port of an address.

    Args:
        address: HOST:PORT or ray://HOST:PORT; an IPv6 host stands in brackets.

    Raises:
        ZooError: It is neither.
    """
    text = address.removeprefix("ray://")
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text)
    if found is None:
        raise ZooError(f"ray address {address!r} cannot be read; {_ALLOWED}")
    port = int(found[3])
    if port not in _PORTS:
        raise ZooError(f"ray address {address!r} has port {port}; allowed: 1 to 65535")
    return found[1] or found[2], port


def _find() -> str:
    """Return the address of a cluster that was started on this machine, as Ray notes it."""
    if given := os.environ.get("RAY_ADDRESS"):
        if given in ("auto", "local"):
            raise ZooError(f"RAY_ADDRESS={given!r} names no cluster; {_ALLOWED}")
        return given
    place = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    with contextlib.suppress(OSError):
        if text := place.read_text(encoding="utf-8").strip():
            return text
    raise ZooError(
        "ray address 'auto': no cluster was started on this machine (ray start --head); "
        "give its address, or none for an instance of the sweep's own"
    )


def _knock(wanted: str, host: str, port: int, limit: float) -> None:
    """Connect to a port and hang up.

    Raises:
        ZooError: It cannot be reached in time.
    """
    said: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), limit).close()
            said.append("")
        except OSError as error:
            said.append(error.strerror or str(error) or "no answer")

    # The look-up of a name knows no time limit, so it is left behind if it takes too long.
    worker = threading.Thread(target=connect, daemon=True)
    worker.start()
    worker.join(limit)
    why = said[0] if said else f"no answer within {limit:g} s"
    if why:
        raise ZooError(f"ray address {wanted!r}: cannot reach {host} port {port}: {why}")


def _try(wanted: str, address: str, limit: float) -> None:
    """Let another process connect.

    Raises:
        ZooError: It cannot, or not in time.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL, address],
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = _last(error.stderr)
        raise ZooError(
            f"ray address {wanted!r}: something listens there, but no Ray cluster let us in "
            f"within {LIMIT:g} s" + (f": {said}" if said else "")
        ) from None
    if done.returncode:
        raise ZooError(f"ray address {wanted!r}: {_last(done.stderr) or 'it said nothing'}")


def _last(stderr: bytes | None) -> str:
    """Return the last words of the other process, without time and place of a line of a log."""
    lines = (stderr or b"").decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return re.sub(r"^answer: |^\[[^]]*\] (\S+: )?", "", said[-1])[:300] if said else ""
