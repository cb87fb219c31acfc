"""Workers that are jobs of a queue (Slurm, PBS, SGE, LSF), by dask-jobqueue.

The file says what a job is::

    queue: slurm        # or pbs, sge, lsf
    jobs: 4             # how many workers
    cores: 8            # threads of each
    memory: 32GB
    walltime: 24:00:00  # a job ends by itself an hour before, and hands over what it has
    gpus: 0             # for tasks; how the queue is asked for them stands in `options`
    options: {}         # further arguments of dask-jobqueue's class, such as account or interface

A job that ends before its time does so with a stagger, so that not all workers leave at once.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import dask_jobqueue
from dask.utils import parse_bytes
from pydantic import Field, ValidationError

from lablog.cluster.addresses import is_loopback, with_certificates
from lablog.strict import Strict
from lablog.yaml_file import read_yaml

CLASSES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster", "lsf": "LSFCluster"}


class Jobs(Strict):
    """What a file of jobs may say; see the module."""

    queue: Literal["slurm", "pbs", "sge", "lsf"]
    jobs: int = Field(ge=1)
    cores: int = Field(ge=1)
    memory: str
    walltime: str = Field(pattern=r"^(\d+-)?\d{1,3}:\d\d(:\d\d)?$")
    gpus: int = Field(0, ge=0)
    host: str = "127.0.0.1"  # of the scheduler, as the jobs reach it
    options: dict[str, Any] = Field(default_factory=dict)


def read_jobs(path: Path) -> Jobs:
    """The file of jobs at `path`; ValueError naming what is wrong in it."""
    if not path.is_file():
        raise FileNotFoundError(f"CLUSTER = {path} is missing: write it (the page on clusters has "
                                "one to begin with), or name an address")
    try:
        found = read_yaml(path, typed=False)  # 24:00:00 is no number
        return Jobs.model_validate(found, strict=False)
    except ValidationError as error:
        raise ValueError(f"{path} does not describe jobs: {error}") from error


def seconds(walltime: str) -> int:
    """Seconds of days-hours:minutes:seconds."""
    days, _, rest = walltime.rpartition("-")
    hours, minutes, *more = (int(part) for part in rest.split(":"))
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + sum(more)


def job_cluster(path: Path) -> Any:
    """A cluster whose workers are the jobs that the file describes; it submits them at once."""
    jobs = read_jobs(path)
    whole = seconds(jobs.walltime)
    lifetime = max(whole - 3600, whole // 2)
    away = not is_loopback(jobs.host)
    resources = f"threads={jobs.cores} gpus={jobs.gpus} memory={parse_bytes(jobs.memory)}"
    options = {
        "cores": jobs.cores, "memory": jobs.memory, "walltime": jobs.walltime, "processes": 1,
        "scheduler_options": {"host": jobs.host, "dashboard_address": "127.0.0.1:0",
                              "dashboard": False},  # which would outlive its cluster
        "worker_extra_args": ["--lifetime", f"{lifetime}s", "--lifetime-stagger",
                              f"{min(240, lifetime // 4)}s", "--resources", f'"{resources}"',
                              "--no-dashboard"],
        # Read by the engine in the job, where this process's settings are unknown.
        "job_script_prologue": ["export DASK_DISTRIBUTED__WORKER__DAEMON=False",
                                "export DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE=False",
                                "export DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON='{}'"],
    } | jobs.options
    if away:
        options |= {"security": with_certificates(), "protocol": "tls://"}
    logging.getLogger("dask_jobqueue").setLevel(logging.WARNING)
    cluster = getattr(dask_jobqueue, CLASSES[jobs.queue])(**options)
    cluster.scale(jobs=jobs.jobs)
    return cluster
