"""Hands tasks to a cluster and takes their results back in order.

Where nothing is said the cluster is one worker in this process with a slot for every core. Named,
it is one that runs already (``tcp://127.0.0.1:8786``, ``tls://HOST:8786``) or jobs of a queue
(``slurm.yaml``). Tasks are handed over a few at a time: a scheduler that gets a hundred thousand at
once does nothing else for a minute, and workers that join late find something to do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import uuid
import warnings
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import distributed
from distributed import Client, Future, LocalCluster, as_completed
from distributed.comm import CommClosedError
from distributed.gc import GCDiagnosis
from distributed.scheduler import KilledWorker

from lablog import layout
from lablog.cluster import addresses, work
from lablog.cluster.child import TaskCrashed, imported_here, start_server
from lablog.cluster.fingerprint import fingerprint
from lablog.cluster.parcels import Parcel, Places, listed, pack, unload
from lablog.cluster.settings import PATIENCE, SETTINGS, offered
from lablog.cluster.work import Work, perform
from lablog.files import repository
from lablog.progress import progress
from lablog.provenance import usable_threads
from lablog.record import TaskPlace
from lablog.tasks import told_nobody

if TYPE_CHECKING:
    from lablog.run import Run

AHEAD = 2  # tasks handed over for every slot of the cluster


# Dask times every collection of garbage. One that Ctrl-C falls into has a beginning and no end, and
# from then on each ends in a traceback.
GCDiagnosis._gc_callback = lambda *_: None  # type: ignore[method-assign]


class ClusterLost(ConnectionError):
    """The scheduler has gone. What was finished is kept."""


class Cluster:
    """A connection to workers; a context manager, or `close` it.

    where: an address, a .yaml file of jobs, or "" for a worker of this process with so many
    `slots`, by default one a core. artifacts: the folder of results that tasks read and write.
    ran: where each task ran, and how long, is added to it. dashboard: the port, on this machine
    alone, of the engine's own pages about a local worker (else any that is free).
    """

    def __init__(self, where: str, artifacts: Path, slots: int | None = None,
                 ran: list[TaskPlace] | None = None, dashboard: int | None = None) -> None:
        self.where, self.ran = where, [] if ran is None else ran
        self.places: Places = {"artifacts": artifacts, "clone": repository()}
        self.cluster: Any = None
        dask.config.set(SETTINGS)
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        with _quiet():
            self.client = self._connect(slots, dashboard)
        self.shared = self._shares_files()

    @classmethod
    def of(cls, run: Run, slots: int | None = None) -> Cluster:
        """The cluster that a run was told to use; where tasks ran goes into its record."""
        return cls(run.cluster, run.artifacts, slots, run.tasks, run.dashboard)

    def _connect(self, slots: int | None, dashboard: int | None) -> Client:
        if not self.where:
            slots = slots or usable_threads()
            start_server(imported_here())  # it loads while the chapter prepares its data
            # The worker is a part of this process: where it is not heard of, the machine slept.
            with dask.config.set({"distributed.scheduler.worker-ttl": None}):
                self.cluster = LocalCluster(
                    n_workers=1, threads_per_worker=slots, processes=False, memory_limit=0,
                    dashboard_address=f"127.0.0.1:{dashboard or 0}",
                    worker_dashboard_address="127.0.0.1:0", resources=offered(slots),
                    # Pages that nobody asked for keep their scheduler for as long as Python runs.
                    scheduler_kwargs={"dashboard": dashboard is not None})
            return Client(self.cluster, set_as_default=False)
        if self.where.endswith((".yaml", ".yml")):
            from lablog.cluster.jobs import job_cluster

            self.cluster = job_cluster(repository() / self.where)
            return Client(self.cluster, set_as_default=False)
        security = addresses.security_for(self.where)
        try:
            return Client(self.where, security=security, set_as_default=False,
                          timeout=PATIENCE)
        except OSError as error:
            raise ClusterLost(f"no scheduler answers at {self.where} ({error}): start one with "
                              "`make cluster`, or leave CLUSTER out") from error

    def _shares_files(self) -> bool:
        """Whether all workers see this clone's files, which a file tells that was just written."""
        if self.where == "":
            return True
        self._wait_for_workers()
        token = layout.built(f".cluster-{uuid.uuid4().hex}")
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        try:
            seen = self.client.run(work.sees, str(token))
        finally:
            token.unlink()
        return bool(seen) and all(seen.values())

    def _wait_for_workers(self) -> None:
        try:
            self.client.wait_for_workers(1, timeout=600 if self.cluster is not None else 60)
        except TimeoutError:
            raise ClusterLost(f"the scheduler at {self.where} has no worker: start one with "
                              f"`make worker SCHEDULER={self.where}`") from None

    def map(self, kind: str, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *,
            common: tuple[Any, ...] = (), reads: Sequence[Path] = (), threads: int = 1,
            gpus: float = 0, memory: int = 0, unit: str = "run", names: Sequence[str] = (),
            done: Callable[[int, Any], None] = told_nobody) -> list[Any]:
        """Results of ``function(*common, *call)`` for all `calls`, in their order.

        function: one of this package, and the same for equal arguments, since it may run twice.
        reads: files and folders that it reads. threads: how many it uses, exactly; gpus, memory
        (bytes): what else it needs. names: of the calls, in errors and in the record; else the
        plain values among their arguments. `done` is told of each result as it comes. Paths in what
        it returns are brought here if the workers have file systems of their own.

        Raises what a call raised, with a note that names it; ValueError if no worker has what
        is needed; ClusterLost where the scheduler has gone.
        """
        needs = {"threads": float(threads)} | {
            name: float(value) for name, value in (("gpus", gpus), ("memory", memory)) if value}
        head, _ = pack((function, common), self.places)
        entries = {} if self.shared else listed(reads, self.places)
        shown = [f"{kind} {name}" for name in names or map(_shown, calls)]
        software, preload, named = fingerprint(), imported_here(), dict[str, str]()

        def submitted(index: int) -> Future:
            call, _ = pack(calls[index], self.places)
            one = Work(shown[index], call, {n: str(p) for n, p in self.places.items()},
                       self.shared, tuple(entries), threads, preload, software)
            # What it computes, so that two clients that ask the same get it from one task.
            # Where files are shared, also where: results of another folder are none of this one's.
            where = sorted(one.places.items()) if self.shared else None
            told = hashlib.sha256(b"\0".join([
                head, call, repr((threads, software, where)).encode(),
                repr(sorted(e.sha256 for e in entries)).encode()]))
            task = f"{kind.replace(' ', '-')}-{told.hexdigest()[:24]}"
            named[task] = shown[index]
            with _quiet():
                return self.client.submit(perform, one, heads, files, pure=False, resources=needs,
                                          key=task)

        results: list[Any] = [None] * len(calls)
        if not calls:
            return results
        with progress(len(calls), kind, unit) as bar, self._faults(named):
            slots = self._slots(needs, kind)
            heads = self._placed(head)
            files = {entry.sha256: self._placed(path.read_bytes())
                     for entry, path in entries.items()}
            for index, parcel in handed_over(self.client, submitted, len(calls), slots):
                results[index] = unload(parcel, self.places)
                self.ran.append(TaskPlace(kind=kind, name=shown[index], worker=parcel.worker,
                                          seconds=parcel.seconds))
                done(index, results[index])
                bar.update()
        return results

    def _placed(self, data: bytes) -> Future:
        """Bytes on the cluster under their hash; made again there should its holder die."""
        with _quiet():
            return self.client.submit(bytes, data, key=f"data-{hashlib.sha256(data).hexdigest()}",
                                      pure=False)

    def _slots(self, needs: Mapping[str, float], kind: str) -> int:
        """How many such tasks the cluster can do at a time; ValueError if none."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        counts = [min(int(each["resources"].get(name, 0) / amount + 1e-9)
                      for name, amount in needs.items()) for each in workers]
        if not any(counts):
            most = {name: max((each["resources"].get(name, 0) for each in workers), default=0)
                    for name in needs}
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in needs.items())
            raise ValueError(
                f"a task of {kind} needs {wanted}, and no worker has more than "
                f"{', '.join(f'{amount:g} {name}' for name, amount in most.items())}: start one "
                f"that has, with `make worker`, or run with smaller settings")
        return sum(counts)

    @contextmanager
    def _faults(self, named: Mapping[str, str]) -> Iterator[None]:
        """The engine's ways to fail, in words; `named` tells a task's name by its key."""
        try:
            yield
        except KilledWorker as error:
            raise TaskCrashed(
                f"{named.get(str(error.task), error.task)}: {error.allowed_failures + 1} workers "
                "died one after the other while they had this task, so it is not tried again: "
                "look at their output, or run it with smaller settings") from error
        except (ClusterLost, CommClosedError, CancelledError) as error:
            raise ClusterLost(
                f"the scheduler at {self.where or 'this machine'} has gone: what was finished is "
                "kept; start it and run again, and only what is missing is computed") from error

    def close(self) -> None:
        """Let go of the workers; those on this machine end, with what they are doing."""
        with suppress(Exception), _quiet():
            self.client.close(timeout=5)
            if self.cluster is not None:
                self.cluster.close(timeout=5)
        with suppress(AttributeError):  # it remembers the methods of all schedulers there were
            distributed.core._expects_comm.cache_clear()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def handed_over(client: Client, submit: Callable[[int], Future], count: int,
                slots: int) -> Iterator[tuple[int, Parcel]]:
    """(index, parcel) of tasks 0 to `count` as they finish; only so many of them are with the
    scheduler at a time, and none is left there when this ends in an error.

    `submit` hands over the task of an index. Raises what a task raised, and ClusterLost.
    """
    waiting = iter(range(count))
    running: dict[object, tuple[Future, list[int]]] = {}
    finished = as_completed([], loop=client.loop, with_results=True, raise_errors=False)

    def more(number: int) -> None:
        for index in itertools.islice(waiting, number):
            future = submit(index)
            if future.key in running:  # equal calls are one task
                running[future.key][1].append(index)
            else:
                running[future.key] = future, [index]
                finished.add(future)

    try:
        more(max(AHEAD * slots, 4))
        for future, parcel in finished:
            if future.status == "error":
                raise future.exception()
            if not isinstance(parcel, Parcel):
                raise ClusterLost("the connection has ended")
            indices = running.pop(future.key)[1]
            for index in indices:
                yield index, parcel
            more(len(indices))
    finally:
        if running:
            with suppress(Exception):  # there may be no scheduler any more
                client.cancel([future for future, _ in running.values()])


def _shown(call: tuple[Any, ...]) -> str:
    """The plain values among the arguments of a call, also those inside dataclasses."""
    def plain(value: Any) -> list[str]:
        if isinstance(value, Path):
            return [value.name]
        if isinstance(value, str | int | float):
            return [str(value)]
        if dataclasses.is_dataclass(value):
            return [word for each in dataclasses.fields(value)
                    for word in plain(getattr(value, each.name))]
        return []

    words = " ".join(word for value in call for word in plain(value))
    return words if len(words) <= 80 else f"{words[:77]}..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the engine's advice about large graphs and ports that are taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
