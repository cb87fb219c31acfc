"""What every scheduler, worker and client of this project is set to, and what a worker offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lablog import layout
from lablog.provenance import available_memory_bytes

PATIENCE = "20s"  # until a scheduler answers
SETTINGS: Mapping[str, Any] = {
    "distributed.worker.daemon": False,  # a task's process may have processes of its own
    "distributed.worker.memory.terminate": False,  # it sees the worker's memory, not the task's
    "distributed.worker.memory.pause": False,
    "distributed.scheduler.allowed-failures": 2,  # deaths of workers under one task
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.comm.timeouts.connect": PATIENCE,
    "logging": {"distributed": "error"},
    "temporary-directory": str(layout.built("worker", "scratch")),
    # Looking at themselves every few milliseconds costs idle workers a twentieth of a core.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "5s",
    # Threads are set for each task, exactly; the engine would quietly allow one.
    "distributed.nanny.pre-spawn-environ": {},
}


def offered(slots: int) -> dict[str, float]:
    """What a worker of this machine with so many threads has for tasks."""
    import torch

    return {"threads": float(slots), "gpus": float(torch.cuda.device_count()),
            "memory": float(available_memory_bytes())}
