"""Tasks on a Ray cluster: who answers, what fits its machines, what is begun again, and what its errors mean."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from mergekit_px._version import __version__
from mergekit_px.errors import (
    ClusterError,
    InputError,
    MemoryBudgetError,
    PlanError,
    PxmergeError,
    RunError,
    UsageError,
)
from mergekit_px.execute.events import Progress
from mergekit_px.plan.budget import plan_budget
from mergekit_px.plan.model import Plan

_TRIES = 4
_MOST_THREADS = 4
"""Of a task, where nothing else is asked for; a machine with more cores takes several."""
_ANSWER = 5.0
"""Seconds in which a cluster must answer."""
_ALONE = 60.0
"""Seconds for which no machine may be there that fits a task."""
_LOOK = 1.0
"""Seconds between two looks at tasks that run."""
_FAREWELL = 3.0
"""Seconds in which a task that was asked to end does so."""
_TOLD = 0.5
"""Seconds between two reports of a task."""
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of HTTP/2 says first, with no settings; what answers with settings may be Ray, which waits long for
what does not (RFC 9113, 3.4)."""

Work = Callable[..., Any]


@dataclass(frozen=True)
class SharedFolders:
    """What all machines must see.

    Attributes:
        current: that relative paths are relative to.
        output: what messages call the output.
        witness: a file in the output's folder and what it holds, where the workers use a folder.
    """

    current: str
    output: str
    witness: tuple[str, bytes] | None

    def enter(self) -> None:
        """Go there, on this worker. Raises ``PlanError`` where it does not see what it must."""
        host = socket.gethostname()
        shared = "run in a folder, and write to one, that all machines share"
        try:
            os.chdir(self.current)
        except OSError:
            raise PlanError(f"the worker on {host} does not see the folder {self.current}", hint=shared) from None
        if self.witness is not None:
            path, content = self.witness
            seen = None
            with suppress(OSError):
                seen = Path(path).read_bytes()
            if seen != content:
                raise PlanError(f"the worker on {host} does not see the output folder {self.output}", hint=shared)


@contextmanager
def same_inputs() -> Iterator[Callable[[object, object], None]]:
    """Inside, an input that a worker cannot read is said to be that; and a function for what must be equal there.

    Raises ``PlanError``.
    """
    host, others = socket.gethostname(), "give inputs that all machines see, on a shared file system or in a store"

    def require_equal(here: object, there: object) -> None:
        if here != there:
            raise PlanError(f"the worker on {host} sees other inputs than this machine", hint=others)

    try:
        yield require_equal
    except InputError as error:
        raise PlanError(f"the worker on {host} cannot read an input: {error}", hint=others) from error


class Assignment(Protocol):
    """What all tasks are told."""

    def begin(self) -> Any:
        """What they work with, on this worker. Raises ``PlanError`` where it cannot do what is asked."""

    def stop(self) -> None:
        """End at once what a task of this worker began."""


class RayTasks:
    """Tasks of one kind.

    Attributes:
        threads: of each task.
        device: that each computes on.
        places: how many run at once.
        lost: how many were begun again.
    """

    def __init__(self, ray: Any, plan: Plan, device: str, beside: int) -> None:
        self._ray = ray
        self.lost = 0
        options = plan.options
        cores = [_cores(node) for node in self._machines(1, 0)] or [1]
        self.threads = options.threads or max(1, min(_MOST_THREADS, *cores))
        self._memory = plan_budget(plan.items, memory=options.memory, threads=self.threads).total + beside
        self.device = "cuda" if device.startswith("cuda") else device
        self._check_machines(max(cores))
        fitting = self._machines(self.threads, self._memory)
        self.places = sum(
            min(_cores(node) // self.threads, int(node["Resources"].get("memory", 0) // self._memory))
            for node in fitting
        )
        self._task = ray.remote(
            num_cpus=self.threads,
            num_gpus=1 if self.device == "cuda" else 0,
            memory=self._memory,
            max_retries=0,
            scheduling_strategy="SPREAD",
        )(on_worker)
        self._common: tuple[Any, ...] = ()
        self._prepared: list[Any] = []
        self._stopped = False

    @classmethod
    @contextmanager
    def connected(cls, address: str | None, plan: Plan, device: str, beside: int = 0) -> Iterator[RayTasks]:
        """Tasks on the cluster at an address; without one, on one that is begun here and ends with the block.

        Args:
            plan: of a merge that a task is, or is a part of.
            device: that each computes on.
            beside: bytes that a task needs beside those of the merge.

        Raises:
            ClusterError: it does not answer.
            PlanError: no machine of it fits a task.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray = importlib.import_module("ray")
        logging.getLogger("ray").setLevel(logging.ERROR)
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            # No other machine is to reach it, and its own store is hardly used.
            # Its workers are as important as a merge in this process would be.
            os.environ.setdefault("RAY_worker_niceness", "0")
            own = {"address": "local", "include_dashboard": False, "object_store_memory": 100 << 20}
            settings |= {**own, "_node_ip_address": "127.0.0.1"}
        elif address != "auto":
            _check_answer(ray, address)
        # What Ray prints of its machines is said here in the end; stdout is for the result.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            try:
                ray.init(**({"address": address} | settings))
            except (Exception, SystemExit) as error:
                reason = " ".join(str(error.__cause__ or error).split())[:200]
                raise ClusterError(
                    f"Ray refuses: {reason}",
                    where=address or "this machine",
                    hint="join a cluster from one of its machines, with the versions of Python and Ray that it has",
                ) from error
            try:
                yield cls(ray, plan, device, beside)
            finally:
                ray.shutdown()

    def begin(self, assignment: Assignment) -> None:
        """What all tasks are told."""
        self._common = (__version__, self._ray.put(pickle.dumps(assignment)))

    def prepare(self, work: Work) -> None:
        """Begin ``work(begun, number, None, [], report)`` in each place, and do not wait for it."""
        self._prepared = [self._submit(work, number, None, []) for number in range(self.places)]

    def _submit(self, work: Work, number: int, argument: Any, shared: Any) -> Any:
        return self._task.remote(*self._common, pickle.dumps(work), number, argument, shared)

    def run(self, work: Work, arguments: Mapping[int, Any], shared: Any, tell: Callable[[int, Progress], None]) -> Any:
        """``work(begun, number, argument, shared, report)`` for each; number -> what it returned.

        Several threads may run their own at once.

        Raises what the first of them raised that failed, ``RunError`` for one that was lost too often.
        """
        shared = self._ray.put(shared)
        results: dict[int, Any] = {}
        tries = dict.fromkeys(arguments, 0)

        def submit(number: int) -> Any:
            tries[number] += 1
            return self._submit(work, number, arguments[number], shared)

        running = {submit(number): number for number in arguments}
        seen = time.monotonic()
        try:
            while running:
                ready, _ = self._ray.wait(list(running), timeout=_LOOK, fetch_local=False)
                if self._stopped:
                    raise RunError("it was stopped")
                if self._machines(self.threads, self._memory):
                    seen = time.monotonic()
                elif time.monotonic() > seen + _ALONE:
                    raise RunError("no machine of the cluster is left", hint="go on with --resume")
                for stream in ready:
                    number = running[stream]
                    try:
                        found = self._ray.get(next(stream))
                    except StopIteration:
                        del running[stream]
                        continue
                    except self._ray.exceptions.RayError as error:
                        del running[stream]
                        raise_own(error)
                        if tries[number] == _TRIES:
                            raise _lost(error) from error
                        self.lost += 1
                        running[submit(number)] = number
                        continue
                    if isinstance(found, Progress):
                        tell(number, found)
                    else:
                        results[number] = found[0]
        finally:
            self._end(list(running))
        return results

    def stop(self) -> None:
        """End what other threads run."""
        self._stopped = True

    def _end(self, streams: list[Any]) -> None:
        """End tasks: asked first, so that they end what they began, then by force."""
        for force in (False, True):
            for stream in streams:
                self._ray.cancel(stream, force=force)
            if streams and not force:
                self._ray.wait(
                    [stream.completed() for stream in streams],
                    num_returns=len(streams),
                    timeout=_FAREWELL,
                    fetch_local=False,
                )

    def _machines(self, cores: int, memory: int) -> list[Mapping[str, Any]]:
        """Those that fit a task."""
        return [
            node
            for node in self._ray.nodes()
            if node["Alive"] and _cores(node) >= cores and node["Resources"].get("memory", 0) >= memory
        ]

    def _check_machines(self, most_cores: int) -> None:
        if not self._machines(self.threads, 0):
            raise PlanError(
                f"no machine of the cluster has {self.threads} cores for a worker; the largest has {most_cores}",
                hint="lower --threads",
            )
        if not self._machines(self.threads, self._memory):
            most = max(node["Resources"].get("memory", 0) for node in self._machines(self.threads, 0))
            raise MemoryBudgetError(
                f"a worker needs {self._memory / 1e6:.0f} MB, and no machine of the cluster has more than"
                f" {most / 1e6:.0f} MB for it",
                hint="lower it by --memory or --threads",
            )


def parse_cluster(text: str) -> str | None:
    """The address in ``ray:HOST:PORT`` or ``ray:auto``; None for ``ray``. Raises ``UsageError``."""
    kind, colon, address = text.partition(":")
    host, _, port = address.rpartition(":")
    if kind == "ray" and (not colon or address == "auto" or (host and port.isdigit() and int(port) < 1 << 16)):
        return address or None
    raise UsageError(
        f"--cluster: '{text[:60]}' is no cluster",
        hint="write ray, ray:HOST:PORT for one that runs, or ray:auto for the one that this machine is part of",
    )


def _check_answer(ray: Any, address: str) -> None:
    host, _, port = address.rpartition(":")
    if host in ("localhost", "127.0.0.1", "[::1]"):
        host = ray.util.get_node_ip_address()  # which is where Ray itself looks then
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as connection:
            connection.sendall(_GREETING)
            answer = connection.recv(9)
    except OSError:
        answer = b""
    if answer[3:4] != _GREETING[-6:-5]:
        raise ClusterError(
            "no Ray cluster answers there",
            where=address,
            hint="`ray status` on its head says whether it runs; the port is that of `ray start --head`",
        )


@lru_cache(maxsize=1)
def _begun(assignment: bytes) -> tuple[Assignment, Any]:
    """An assignment, and what tasks work with, made once by a worker."""
    told: Assignment = pickle.loads(assignment)
    return told, told.begin()


def on_worker(version: str, assignment: bytes, work: bytes, number: int, argument: Any, shared: Any) -> Iterator[Any]:
    """What a worker does: reports as it goes on, and its result as the one entry of a tuple."""
    if version != __version__:
        raise PlanError(
            f"the worker on {socket.gethostname()} has pxmerge {__version__}, and this machine has {version}",
            hint="install the same version on all machines",
        )
    states: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            _, begun = _begun(assignment)
            states.put((pickle.loads(work)(begun, number, argument, shared, states.put),))
        except BaseException as error:
            states.put(error)

    threading.Thread(target=run, daemon=True).start()
    told = 0.0
    while True:
        try:
            state = states.get(timeout=_LOOK)
        except queue.Empty:
            continue
        except KeyboardInterrupt:  # it was asked to end
            pickle.loads(assignment).stop()
            os._exit(1)
        if isinstance(state, BaseException):
            raise state
        if not isinstance(state, Progress):
            yield state
            return
        if time.monotonic() > told + _TOLD:
            told = time.monotonic()
            yield state


def raise_own(error: Any) -> None:
    """Raise what the task itself raised, if that is what an error of Ray stands for."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, PxmergeError):
        raise cause from None
    if isinstance(cause, ImportError):
        raise PlanError(
            f"a worker cannot import {cause.name}", hint="install the same pxmerge on all machines of the cluster"
        ) from error
    if cause is not None:
        raise cause from error


def _lost(error: Exception) -> RunError:
    reason = {
        "OutOfMemoryError": "their machines ran out of memory; lower --memory or --threads",
        "NodeDiedError": "their machines are gone",
    }.get(type(error).__name__, "their processes ended")
    return RunError(f"the workers of a task were lost {_TRIES} times: {reason}", hint="go on with --resume")


def _cores(node: Mapping[str, Any]) -> int:
    return int(node["Resources"].get("CPU", 0))
