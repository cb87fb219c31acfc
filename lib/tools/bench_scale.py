"""What handing work to a cluster costs, and how much of two and of 64 workers is used."""

from __future__ import annotations

import operator
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
from distributed import Client, Future, LocalCluster

from lablog.cluster.client import Cluster, handed_over
from lablog.cluster.parcels import Parcel
from lablog.commitment import coherence, probes, sweep
from lablog.commitment.arms import Experiment
from lablog.commitment.conversations import ConversationSettings
from lablog.commitment.llama_cpp_speaker import Engine, EngineSettings
from lablog.commitment.qlora import Plan
from lablog.models import locate
from lablog.run import Run
from lablog.text.dialogues import load_settings
from tools.timing import seconds

TASKS = 10_000
PAIRS = 3
CONFIGURATIONS = 48
CELLS, BLOCK, CELL, WORKERS = 100_000, 20, 0.1, 64  # simulated: cells, a task's, seconds, workers


def record(run: Run) -> None:
    """Record all measures."""
    run.artifacts.mkdir(parents=True, exist_ok=True)
    _overhead(run)
    gguf = locate.gguf_file("offline:laptop", run.artifacts)
    _sweep(run, gguf)
    _trainings(run, locate.hugging_face_folder("offline:smoke", run.artifacts))
    _simulated(run)


def _overhead(run: Run) -> None:
    began = time.perf_counter()
    with Cluster("", run.artifacts) as cluster:
        cluster.map("first", operator.pow, [(1,)], common=(2,))
        run.metric("scale.startup_s", time.perf_counter() - began, "s")
        tasks = [(i,) for i in range(TASKS)]
        took = seconds(lambda: cluster.map("empty", operator.pow, tasks, common=(2,)))
    run.metric("scale.tasks_per_s", TASKS / took, "tasks/s", n=TASKS)
    run.metric("scale.overhead_per_task_ms", 1000 * took / TASKS, "ms", n=TASKS)


def _sweep(run: Run, gguf: Path) -> None:
    settings = load_settings()
    items = probes.make_items(settings, 0, 12)
    material = coherence.make_material(settings, 0, 8, 4, 24)
    with Engine(EngineSettings(gguf, 65, 384)) as engine:
        conditions = sweep.Conditions(
            k=64, items=items, material=material,
            residual_norms=engine.residual_norms(material.texts),
            baseline=coherence.baseline(engine, material))
        tasks = [sweep.Task("commitment", 0.1 * (i + 1), "all", i) for i in range(CONFIGURATIONS)]

        def by(slots: int) -> float:
            with tempfile.TemporaryDirectory() as room, Cluster("", Path(room), slots) as cluster:
                cluster.map("first", operator.pow, [(1,)], common=(2,))  # imports once
                return seconds(lambda: sweep.sweep(cluster, engine, tasks, conditions, Path(room)))

        pairs = [(by(1), by(2)) for _ in range(PAIRS)]
    run.metric("scale.efficiency.two_workers",
               statistics.median(one / (2 * two) for one, two in pairs), "ratio", n=PAIRS)


def loaded() -> None:
    """Returns once all that trainings import is there, and the other process has begun too."""
    time.sleep(1)


def _trainings(run: Run, base: Path) -> None:
    """Three seeds by a pool of two processes that live on, over the same by tasks; both with the
    libraries loaded."""
    plan = Plan.model_validate({
        "k": 12, "strength": 20.0, "quantisation": "nf4",
        "lora": {"r": 8, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear"},
        "schedule": {"beta": 0.1, "warmup": 4, "annealing": 8, "free_bits": 0.0, "cells": 0.5},
        "training": {
            "steps": 200, "batch_size": 12, "learning_rate": 3e-3, "warmup_steps": 1,
            "schedule": "cosine", "betas": (0.9, 0.98), "weight_decay": 0.0, "threads": 1,
            "precision": "f32", "checkpoint_every": 200, "log_every": 200}})
    calls = [(1, seed, "commitment") for seed in (1, 2, 3)]

    def experiment(room: str) -> Experiment:
        return Experiment({1: base}, plan, "dialogues", ConversationSettings(load_settings()),
                          Path(room))

    def by_pool() -> float:
        with tempfile.TemporaryDirectory() as room, ProcessPoolExecutor(
                2, get_context("spawn")) as pool:
            for begun in [pool.submit(loaded) for _ in range(2)]:
                begun.result()
            began = time.perf_counter()
            for each in [pool.submit(experiment(room).train, *call) for call in calls]:
                each.result()
            return time.perf_counter() - began

    def by_tasks() -> float:
        with tempfile.TemporaryDirectory() as room, Cluster("", Path(room), 2) as cluster:
            cluster.map("first", operator.pow, [(1,)], common=(2,))
            return seconds(lambda: cluster.map("training", Experiment.train, calls,
                                               common=(experiment(room),)))

    pairs = [(by_pool(), by_tasks()) for _ in range(PAIRS)]
    run.metric("scale.trainings.tasks_over_pool",
               statistics.median(pool / tasks for pool, tasks in pairs), "ratio", n=PAIRS)


def slept(numbers: tuple[float, ...]) -> Parcel:
    """A simulated block of cells: as long as they took."""
    time.sleep(sum(numbers))
    return Parcel(b"", sum(numbers), "simulated")


def _simulated(run: Run) -> None:
    """A sweep of cells whose times vary as recorded ones do, by a factor of two either way."""
    lengths = CELL * np.random.default_rng(0).lognormal(0.0, 0.35, CELLS)
    blocks = [tuple(lengths[i : i + BLOCK].tolist()) for i in range(0, CELLS, BLOCK)]
    process = psutil.Process()
    before = process.memory_info().rss
    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, processes=False, memory_limit=0,
                      dashboard_address="127.0.0.1:0", worker_dashboard_address="127.0.0.1:0",
                      ) as engine, Client(engine, set_as_default=False) as client:
        def submit(index: int) -> Future:
            return client.submit(slept, blocks[index], key=f"cell-{index}", pure=False)

        took = seconds(lambda: list(handed_over(client, submit, len(blocks), WORKERS)))
        used = process.memory_info().rss - before
    run.metric("scale.efficiency.simulated", float(lengths.sum()) / (WORKERS * took), "ratio",
               n=CELLS)
    run.metric("scale.simulated.memory", used, "bytes")
