"""What a machine of a cluster does for a sweep: it runs one run and hands back what came of it.

The functions travel to the machine as they stand, so that one without the zoo, or with another
version of it, can still say so. They use the standard library alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_POLL = 0.05  # seconds between two looks at the run
_GRACE = 5.0  # seconds for a cancelled run to put its things in order
_OUTPUT = 1 << 20  # bytes of output that travel back


def source_hash(package: str) -> str:
    """Return the hash of all Python files of a package, by their places in it.

    Args:
        package: Its folder.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(package).rglob("*.py"), key=lambda path: path.as_posix()):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        name = path.relative_to(package).as_posix()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def version_of(package: str) -> str:
    """Return the version that a package states, without importing it.

    Args:
        package: Its folder.
    """
    text = Path(package, "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)
    return found[1] if found else "unknown"


def locate(ours: dict[str, str]) -> tuple[str | None, str]:
    """Look for the sweep's own source on this machine.

    Args:
        ours: `package` (its folder where the sweep runs), `version` and `hash`.

    Returns:
        The folder of the package, and an empty text; or None, and what is here instead.
    """
    places = [ours["package"]]  # the same folder may be mounted here
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("zoo")
        if spec is not None and spec.origin is not None:
            places.append(str(Path(spec.origin).parent))
    said = "it is not installed there"
    for place in places:
        if Path(place, "__init__.py").is_file():
            found = source_hash(place)
            if found == ours["hash"]:
                return place, ""
            said = f"there it is {version_of(place)}, source {found[:12]}"
    return None, said


def execute(task: dict[str, Any]) -> dict[str, Any]:
    """Run one run in a process of its own and in a folder that is removed afterwards.

    Args:
        task: `ours` (see `locate`), `config` (the resolved recipe), `id` (of the record), `folder`
            (where the sweep was started) and `environment` (variables for the run).

    Returns:
        `code` (exit code, negative for a signal), `output` (bytes) and `record` (text, or None).
    """
    package, said = locate(task["ours"])
    if package is None:
        return {"code": 2, "output": refusal(task["ours"], said).encode(), "record": None}
    folder = tempfile.mkdtemp(prefix="zoo-")
    try:
        # It is how Ray cancels a task, and a worker may have been started to ignore it.
        with _interrupts(signal.default_int_handler):
            return _run_in(Path(folder), package, task)
    finally:
        with _interrupts(signal.SIG_IGN):
            shutil.rmtree(folder, ignore_errors=True)


def _run_in(folder: Path, package: str, task: dict[str, Any]) -> dict[str, Any]:
    config = folder / "config.yaml"
    config.write_text(task["config"], encoding="utf-8")
    command = [sys.executable, "-m", "zoo.sweeps.leash", "run", str(config), "--quiet"]
    command += ["--records", str(folder / "records"), "--runs", str(folder / "runs")]
    here = os.environ.get("PYTHONPATH")
    root = str(Path(package).parent)
    environment = {
        **os.environ,
        **task["environment"],
        "PYTHONPATH": f"{root}{os.pathsep}{here}" if here else root,
        "ZOO_LEASH_FOLDER": str(folder),
        "PYTHONSAFEPATH": "1",  # nothing is to be imported from where the sweep was started
    }
    # Paths in a recipe may be relative, which makes sense where folders are shared.
    start = task["folder"] if Path(task["folder"]).is_dir() else str(folder)
    with open(folder / "output", "w+b") as output:
        code = _run(command, start, environment, output)
        output.seek(max(0, output.seek(0, os.SEEK_END) - _OUTPUT))
        text = output.read()
    record = folder / "records" / f"{task['id']}.json"
    found = record.read_text(encoding="utf-8") if record.is_file() else None
    return {"code": code, "output": text, "record": found}


def refusal(ours: dict[str, str], said: str) -> str:
    """Return why a machine is not used.

    Args:
        ours: See `locate`.
        said: What is on the machine.
    """
    return (
        f"a machine of the cluster has not the same attention-zoo as this one, which is "
        f"{ours['version']}, source {ours['hash'][:12]}: {said}"
    )


def _run(command: list[str], folder: str, environment: dict[str, str], output: Any) -> int:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,  # the leash
        stdout=output,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    assert process.stdin is not None
    try:
        while process.poll() is None:
            time.sleep(_POLL)  # short, since a cancelled task is interrupted between two of them
    finally:
        with _interrupts(signal.SIG_IGN):
            _end(process)
            process.stdin.close()
    return process.returncode


@contextlib.contextmanager
def _interrupts(handler: Any) -> Iterator[None]:
    """Let interrupts be handled in some way for a while; they may come again and again."""
    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:  # no interrupt reaches any thread but the main one
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a run that is cancelled, and what it has started."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
