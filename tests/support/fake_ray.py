"""As much of Ray as a sweep takes: tasks that are done when they are asked for."""

from __future__ import annotations

import types


class RayError(Exception):
    pass


class GetTimeoutError(RayError):
    pass


class TaskCancelledError(RayError):
    pass


class Task:
    def __init__(self, call, options):
        self.call, self.options, self.ready, self.cancelled = call, options, True, []


class FakeRay:
    """Stands in for the module `ray`.

    Args:
        machines: Resources of each machine.
        ready: Whether tasks are done at once.
    """

    def __init__(self, *machines, ready=True):
        self.machines = machines or ({"CPU": 2.0},)
        self.ready = ready
        self.tasks, self.inits, self.calls = [], [], []
        self.exceptions = types.SimpleNamespace(
            RayError=RayError,
            GetTimeoutError=GetTimeoutError,
            TaskCancelledError=TaskCancelledError,
        )
        self.cloudpickle = types.SimpleNamespace(
            register_pickle_by_value=lambda module: self.calls.append("register"),
            unregister_pickle_by_value=lambda module: self.calls.append("unregister"),
        )

    def is_initialized(self):
        return False

    def init(self, address, **options):
        self.inits.append((address, options))

    def shutdown(self):
        self.calls.append("shutdown")

    def nodes(self):
        return [
            {"NodeID": str(i), "Alive": True, "Resources": resources}
            for i, resources in enumerate(self.machines)
        ] + [{"NodeID": "gone", "Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]

    def remote(self, function):
        def options(**given):
            def remote(argument):
                task = Task(lambda: function(argument), given)
                task.ready = self.ready or function.__name__ == "locate"
                self.tasks.append(task)
                return task

            return types.SimpleNamespace(remote=remote)

        return types.SimpleNamespace(options=options)

    def wait(self, tasks, timeout):
        assert timeout == 0
        return [t for t in tasks if t.ready], [t for t in tasks if not t.ready]

    def get(self, tasks, timeout=None):
        if isinstance(tasks, list):
            return [task.call() for task in tasks]
        return tasks.call()

    def cancel(self, task, force):
        task.cancelled.append(force)
