"""One task in a process of its own.

llama.cpp, OpenMP and CUDA memory end with it, a crash is an error of that task alone, and a call
that holds Python's lock for minutes cannot cost a worker its life. Processes are forked from a
server that has imported the libraries already, so that one starts in some 20 ms.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker, spawn
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lablog.cluster.parcels import Places, pack, unpack
from lablog.determinism import seed_everything

THREADS = "OMP_NUM_THREADS"
"""What numerical libraries read that are loaded later; those that are loaded already are told."""
TASK = "a task of lablog"
"""What tasks' processes are called."""

GOODBYE = 5.0
"""Seconds that a task's process has to end by itself once it has answered: as it ends it removes
its locks from shared memory, that of its progress bars among them."""

_prepared = spawn.get_preparation_data


def _prepared_for_a_task(name: str) -> dict[str, Any]:
    """Let a task's process not run the program's main module first, as others do: it needs none of
    it, and would wait for all that a benchmark or a test imports."""
    main = sys.modules["__main__"]
    if not hasattr(main, "__spec__"):  # IPython's %reset takes it away, and it is asked for
        main.__spec__ = None
    data = dict(_prepared(name))
    if name == TASK:
        data = {part: value for part, value in data.items() if not part.startswith("init_main")}
    return data


spawn.get_preparation_data = _prepared_for_a_task


class TaskCrashed(RuntimeError):
    """A task's process ended without a result."""


def run_alone(head: bytes, call: bytes, places: Places, threads: int, name: str,
              preload: Sequence[str], wanted: Callable[[], bool] = lambda: True,
              ) -> tuple[bytes, list[Path]]:
    """Make a packed call in a process of its own; its packed result, and the paths in it.

    `head` holds the function and what all its calls share, `call` the rest of its arguments.
    Raises what the call raised, TaskCrashed naming it where the process died, and
    InterruptedError once `wanted` says that nobody waits for it any more.
    """
    start_server(preload)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, head, call, dict(places), threads),
                              name=TASK, daemon=False)  # it may have processes of its own
    process.start()
    theirs.close()
    try:
        while not wait([ours, process.sentinel], timeout=1):
            if not wanted():
                raise InterruptedError(f"{name}: nobody waits for it any more")
        try:
            ended, *told = ours.recv()
        except (EOFError, OSError):  # OSError: in the middle of its answer
            process.join()
            raise TaskCrashed(f"{name} ended without a result: {_reason(process.exitcode)}"
                              ) from None
        process.join(GOODBYE)
    finally:
        process.kill()
        process.join()
        ours.close()
    if ended == "error":
        error, where = told
        error.add_note(f"in the task {name}:\n{where}")
        raise error
    return told[0], told[1]


def start_server(preload: Sequence[str]) -> None:
    """Start the server that tasks are forked from, if there is none, and let it load `preload`.

    It inherits that Ctrl-C is blocked: what it loads would else end in the middle, with a
    traceback for every process, and the parent ends it anyway.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([*preload])
    resource_tracker.ensure_running()  # which the server would start, and unblock Ctrl-C again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (
            " (the system does this where memory runs out)" if name == "SIGKILL" else "")
    return f"its process ended with exit code {code}"


def _serve(pipe: Connection, head: bytes, call: bytes, places: Places, threads: int) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _use(threads)
    try:
        function, common = unpack(head, places)
        result = function(*common, *unpack(call, places))
        sent: Any = ("done", *pack(result, places))
    except BaseException as error:
        sent = ("error", _sendable(error), traceback.format_exc())
    pipe.send(sent)
    pipe.close()


def _use(threads: int) -> None:
    """Let numerical libraries use so many threads, since sums are taken in another order with
    others, and no draw depend on what the process did before."""
    from threadpoolctl import threadpool_limits

    os.environ[THREADS] = str(threads)
    seed_everything(0, threads)
    threadpool_limits(threads)


def _sendable(error: BaseException) -> BaseException:
    """`error`, or one with its words where it cannot be sent."""
    import pickle

    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return again if isinstance(again, Exception) else RuntimeError(
        f"{type(error).__name__}: {error}")


def end_with_parent() -> None:
    """End this process as soon as the one that asked for it has: a killed one tells its children
    nothing, and the server that forked them lives as long as they do."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def imported_here() -> tuple[str, ...]:
    """What a server of processes loads first: modules of this package's folders that are loaded
    here already, without those that draw."""
    loaded = (name for name in sys.modules if name.startswith("lablog.") and name.count(".") == 2)
    return ("lablog.cluster.warm", *sorted(
        name for name in loaded if not name.endswith(("plots", "__main__", "cluster.client"))))
