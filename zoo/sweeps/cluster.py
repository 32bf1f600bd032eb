"""Runs of a sweep as tasks of Ray: on a cluster, or on an instance of Ray on this machine.

    with RaySpawner("head:6379") as spawner:
        sweep("mqar", grid, jobs=spawner.places, spawner=spawner, identify=run_id)

A task takes the resolved recipe to a machine, runs it there in a process of its own (`remote`), and
brings back what it said and its record. Only these are kept: the folder of the run, with its
checkpoints, is gone, so that a run that was cut off begins anew.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import zoo
from zoo.errors import ZooError
from zoo.report.files import replace_text
from zoo.sweeps import cluster_address, remote
from zoo.sweeps.processes import cores

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["RaySpawner"]

_PAUSE = 0.05  # seconds between two looks at a task
_GREETING = 60.0  # seconds for every machine to answer
_LOST = 1  # exit code of a run that could not say how it ended


class Needs(NamedTuple):
    """What a run takes of a machine.

    Args:
        cpus: Cores.
        gpus: Cards.
    """

    cpus: int
    gpus: int


class RaySpawner:
    """Starts runs as tasks of Ray; see `zoo.sweeps.spawn.Spawner`.

    Args:
        address: HOST:PORT, ray://HOST:PORT or `auto` for a cluster; `local` for an instance on
            this machine that ends with the spawner.
        cpus: Cores for each run, or for each of its processes.

    Raises:
        ZooError: Ray is not installed, the cluster does not answer, or one of its machines has
            another source of the zoo.
    """

    def __init__(self, address: str = "local", *, cpus: int = 1) -> None:
        try:
            import ray
        except ImportError:
            raise ZooError("Ray is not installed: pip install 'attention-zoo[ray]'") from None
        self._ray: Any = ray
        self.cpus = cpus
        package = str(Path(zoo.__file__).parent)
        self._ours = {"package": package, "version": zoo.__version__}
        self._ours["hash"] = remote.source_hash(package)
        if ray.is_initialized():
            raise ZooError("this process is connected to Ray already; ray.shutdown() first")
        self._connect(cluster_address.resolve(address))
        try:
            ray.cloudpickle.register_pickle_by_value(remote)
            self._machines = [node for node in ray.nodes() if node["Alive"]]
            self._greet()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RaySpawner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def places(self) -> int:
        """Number of runs with the given number of cores that fit at once."""
        return max(1, sum(int(self._has(node, "CPU")) // self.cpus for node in self._machines))

    def start(
        self, arguments: Sequence[str], log: BinaryIO, environment: Mapping[str, str]
    ) -> RayRun:
        """Start a run; see `zoo.sweeps.spawn.Spawner.start`.

        Args:
            arguments: Recipe, overrides and options, as `zoo run` takes them.
            log: File for its output, which comes when the run has ended.
            environment: Left aside: the variables are those of the machine that it runs on.

        Raises:
            OSError: No machine has what it takes, or Ray is not there any more.
        """
        from omegaconf import OmegaConf

        from zoo.runs import config  # takes seconds, which a dead address need not wait for

        words, records = _words(arguments)
        try:
            resolved = config.load(words[0], words[1:])
        except ZooError as error:
            raise OSError(str(error)) from None
        needs = self._needs(resolved)
        task = {
            "ours": self._ours,
            "id": config.identify(resolved).id,
            "config": OmegaConf.to_yaml(resolved),
            "folder": os.getcwd(),
            "environment": {
                "OMP_NUM_THREADS": str(self.cpus),
                "NO_COLOR": "1",
                "PYTHONUNBUFFERED": "1",
            },
        }
        options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_retries": 0}
        try:
            remote_run = self._ray.remote(remote.execute).options(name=task["id"], **options)
            reference = remote_run.remote(task)
        except Exception as error:
            raise OSError(_line(error)) from None
        return RayRun(self._ray, reference, log, records / f"{task['id']}.json")

    def close(self) -> None:
        """Let go of the cluster; an instance on this machine ends, and runs on the way with it."""
        with contextlib.suppress(ValueError):
            self._ray.cloudpickle.unregister_pickle_by_value(remote)
        self._ray.shutdown()

    def _connect(self, address: str | None) -> None:
        options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
        if address is None:
            options |= {"num_cpus": cores(), "include_dashboard": False}
        switches = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray warns it will do later
            "RAY_worker_niceness": "0",  # a run is what the machine is for, as in a local sweep
        }
        with _variables(switches):
            try:
                self._ray.init(address or "local", **options)
            except (Exception, SystemExit) as error:
                raise ZooError(f"cannot start or reach Ray: {_line(error)}") from None

    def _greet(self) -> None:
        """Ask every machine that may run something for its source.

        Raises:
            ZooError: One of them has another, or does not answer.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        locate = self._ray.remote(remote.locate)
        asked = [
            locate.options(
                num_cpus=0, max_retries=0, scheduling_strategy=On(node["NodeID"], soft=False)
            ).remote(self._ours)
            for node in self._machines
            if self._has(node, "CPU") >= self.cpus
        ]
        if not asked:
            raise ZooError(f"no machine of the cluster has {self.cpus} cores for a run")
        try:
            answers = self._ray.get(asked, timeout=_GREETING)
        except self._ray.exceptions.GetTimeoutError:
            raise ZooError(
                f"a machine of the cluster has not answered within {_GREETING:g} s"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise ZooError(f"a machine of the cluster cannot be used: {_line(error)}") from None
        for place, said in answers:
            if place is None:
                raise ZooError(remote.refusal(self._ours, said))

    def _needs(self, resolved: DictConfig) -> Needs:
        """Return what a run takes, which some machine must have.

        Raises:
            OSError: None has; Ray would wait for one.
        """
        trainer = resolved.trainer
        some = any(self._has(node, "GPU") for node in self._machines)
        card = trainer.accelerator == "cuda" or (trainer.accelerator == "auto" and some)
        needs = Needs(self.cpus * trainer.devices, trainer.devices if card else 0)
        for node in self._machines:
            if self._has(node, "CPU") >= needs.cpus and self._has(node, "GPU") >= needs.gpus:
                return needs
        raise OSError(
            f"no machine of the cluster has {needs.cpus} cores and {needs.gpus} cards (GPU)"
            if needs.gpus
            else f"no machine of the cluster has {needs.cpus} cores"
        )

    @staticmethod
    def _has(node: Mapping[str, Any], what: str) -> float:
        return float(node["Resources"].get(what, 0))


class RayRun:
    """A run on a cluster; see `zoo.sweeps.spawn.Handle`.

    Args:
        ray: The module.
        reference: What the task will give.
        log: File for its output; kept open, and with it the lock, until the run has ended.
        record: Where its record goes.
    """

    pid = None

    def __init__(self, ray: Any, reference: Any, log: BinaryIO, record: Path) -> None:
        self._ray = ray
        self._reference = reference
        self._log = os.fdopen(os.dup(log.fileno()), "ab")
        self._record = record
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """See `Handle.poll`; once the run has ended its output and its record are here."""
        if self.returncode is None:
            code = self._look()
            if code is not None:
                self._log.close()
                self.returncode = code
        return self.returncode

    def terminate(self) -> None:
        """See `Handle.terminate`."""
        self._cancel(force=False)

    def kill(self) -> None:
        """See `Handle.kill`."""
        self._cancel(force=True)

    def wait(self) -> int:
        """See `Handle.wait`."""
        while (code := self.poll()) is None:
            time.sleep(_PAUSE)
        return code

    def _cancel(self, *, force: bool) -> None:
        if self.poll() is None:
            with contextlib.suppress(Exception):  # whatever it is, `poll` meets it too
                self._ray.cancel(self._reference, force=force)

    def _look(self) -> int | None:
        try:
            ready, _ = self._ray.wait([self._reference], timeout=0)
            if not ready:
                return None
            found = self._ray.get(self._reference)
        except self._ray.exceptions.TaskCancelledError:
            return -signal.SIGTERM
        except Exception as error:  # of many kinds: a process, a machine or the cluster is gone
            return self._lost(f"the run was lost on the cluster: {_line(error)}")
        try:
            self._log.write(found["output"])
            if found["record"] is not None:
                replace_text(self._record, found["record"])
        except (OSError, ZooError) as error:
            return self._lost(str(error))
        return int(found["code"])

    def _lost(self, why: str) -> int:
        """Note as the last words of the run why it failed."""
        with contextlib.suppress(OSError):
            self._log.write(f"\n{why}\n".encode())
        return _LOST


def _words(arguments: Sequence[str]) -> tuple[list[str], Path]:
    """Return recipe and overrides, and the folder of the records."""
    words = list(arguments)
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    options = words[first:]
    if "--records" not in options:
        raise OSError("a run on a cluster needs a folder for its record")
    return words[:first], Path(options[options.index("--records") + 1])


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for a while, unless they are set."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    cause = getattr(error, "cause", None) or error  # what a task raised, without its traceback
    text = " ".join(str(cause).split())[:300]
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
