"""What a worker does with a task: check, bring its files, make the call, tell where it was."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distributed import get_worker
from distributed.worker import thread_state

from lablog import layout
from lablog.cluster import fingerprint
from lablog.cluster.child import run_alone
from lablog.cluster.parcels import Entry, Parcel, Places, listed, put
from lablog.files import repository

PLACES = ("artifacts", "clone")
"""The places of every task: the artifacts of the client's run, then its clone."""


@dataclass(frozen=True)
class Work:
    """One call on its way: its packed arguments and all that its worker must know.

    name: what errors call it; places: the client's; shared: whether the worker sees the client's
    files; reads: files that must be there; preload: modules that its process should find loaded.
    """

    name: str
    call: bytes = field(repr=False)
    places: Mapping[str, str]
    shared: bool
    reads: tuple[Entry, ...]
    threads: int
    preload: tuple[str, ...]
    software: Mapping[str, str] = field(repr=False)


def perform(work: Work, head: bytes, files: Mapping[str, bytes]) -> Parcel:
    """Make the call of `work`, whose function lies in `head`; `files` holds bytes by SHA-256."""
    worker = get_worker()
    fingerprint.check(work.software, worker.address)
    places = places_of(work)
    if work.shared and not places["clone"].is_dir():
        raise FileNotFoundError(
            f"the worker {worker.address} does not see {places['clone']}, which those do that were "
            "there when the run began: share that folder with it, or with none, and run again")
    for entry in () if work.shared else work.reads:
        put(entry, files[entry.sha256], places)
    task = thread_state.key

    def wanted() -> bool:
        state = worker.state.tasks.get(task)
        # Resumed: let go of, and asked for again before it had ended.
        return state is not None and state.state in ("executing", "resumed")

    began = time.perf_counter()
    result, paths = run_alone(head, work.call, places, work.threads, work.name, work.preload,
                              wanted)
    took = time.perf_counter() - began
    made: dict[Entry, bytes] = {}
    if not work.shared:
        inside = [path for path in paths
                  if path.exists() and any(path.is_relative_to(root) for root in places.values())]
        made = {entry: path.read_bytes() for entry, path in listed(inside, places).items()
                if entry not in work.reads}
    return Parcel(result, took, here(worker.address), made)


def places_of(work: Work) -> Places:
    """Where this machine has what the client calls by these names."""
    if work.shared:
        return {name: Path(work.places[name]) for name in PLACES}
    return {"artifacts": layout.lent_artifacts(), "clone": repository()}


def here(address: str) -> str:
    """A worker for readers: host, its processor's vector instructions and, unless the client is the
    worker, its address."""
    import torch

    host = f"{socket.gethostname()} ({torch.backends.cpu.get_cpu_capability()})"
    return host if address.startswith("inproc:") else f"{host} {address}"


def sees(token: str) -> bool:
    """Whether this machine sees a file that the client has just written."""
    return Path(token).is_file()
