"""Tasks on this machine and on workers that were started by hand: results, refusals, faults."""

import gc
import math
import multiprocessing.connection
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import calls
import dask
import psutil
import pytest
from distributed import Scheduler

from lablog.cluster import client as clients
from lablog.cluster import settings
from lablog.cluster.__main__ import main as by_hand
from lablog.cluster.child import TaskCrashed, run_alone
from lablog.cluster.client import Cluster, ClusterLost
from lablog.cluster.fingerprint import OtherSoftware
from lablog.cluster.parcels import pack
from lablog.files import repository
from lablog.text.dialogues import generate, load_settings, render
from lablog.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    with Cluster("", tmp_path_factory.mktemp("artifacts"), 2) as cluster:
        yield cluster


@pytest.fixture
def connected(two, tmp_path):
    with Cluster(two.address, tmp_path) as cluster:
        yield cluster


@pytest.fixture(params=["local", "two"])
def anywhere(request):
    return request.getfixturevalue({"local": "local", "two": "connected"}[request.param])


SLEEPER = """
import operator, sys, time
from pathlib import Path
from lablog.cluster.client import Cluster
with Cluster("", Path(sys.argv[1]), 2) as cluster:
    print(cluster.map("power", operator.pow, [(3,)], common=(2,)), flush=True)
    input()
    time.sleep(2)
    print(cluster.map("power", operator.pow, [(4,)], common=(2,)), flush=True)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="locks have no files here")
def test_a_task_leaves_no_lock_behind(local):
    """As a kernel that stays open for days would have to keep them all."""
    names = local.map("bars", calls.lock_of_a_bar, [(total,) for total in range(1, 7)])
    assert all(name.startswith("/mp-") for name in names)
    assert not [name for name in names if Path(f"/dev/shm/sem.{name[1:]}").exists()]


def test_a_task_starts_in_a_namespace_that_ipython_has_reset(local, monkeypatch):
    """`%reset` takes the main module's names away, of which multiprocessing asks for one."""
    monkeypatch.delattr(sys.modules["__main__"], "__spec__")
    assert local.map("sums", operator.add, [(1, 2)]) == [3]


def schedulers() -> int:
    gc.collect()
    return sum(isinstance(one, Scheduler) for one in gc.get_objects())


def test_a_closed_cluster_is_forgotten(tmp_path):
    """A kernel that stays open makes one a chapter; each would keep all that it ever knew."""
    before = schedulers()
    for power in range(3):
        with Cluster("", tmp_path, 1) as cluster:
            assert cluster.map("power", operator.pow, [(power,)], common=(2,)) == [2**power]
    del cluster
    assert schedulers() <= before


def test_a_collection_of_garbage_that_was_interrupted_is_no_fault_of_later_ones(local):
    told = [one for one in gc.callbacks if "distributed" in repr(one)]
    assert told, "else this is no longer needed"
    for one in told:
        one("start", {"generation": 2})
        one("start", {"generation": 2, "collected": 0, "uncollectable": 0})


def test_a_machine_that_slept_has_its_worker_still(tmp_path):
    """A scheduler forgets a worker that it has not heard of for so long, here a second (of itself
    five minutes, and never sooner than ten heartbeats)."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
        env=os.environ | {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1s"})
    assert process.stdout.readline() == "[8]\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    process.send_signal(signal.SIGCONT)
    assert process.communicate("\n", 60)[0] == "[16]\n"


def test_results_come_in_order_and_each_is_told(anywhere):
    told, before = {}, len(anywhere.ran)
    found = anywhere.map("power", operator.pow, [(i,) for i in range(20)], common=(2,),
                         done=told.__setitem__)
    assert found == [2**i for i in range(20)] == [told[i] for i in range(20)]
    places = anywhere.ran[before:]
    assert {place.name for place in places} == {f"power {i}" for i in range(20)}
    assert all(place.seconds > 0 and place.worker for place in places)


def test_equal_calls_are_made_once(anywhere):
    first, second, third = anywhere.map("process", calls.process, [(), (), ()])
    assert first == second == third


def test_a_large_call_brings_no_advice_of_the_engine(anywhere):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert anywhere.map("length", len, [(bytes(11 << 20),)]) == [11 << 20]


def test_every_task_has_a_process_of_its_own_and_exactly_its_threads(anywhere):
    found = anywhere.map("threads", calls.threads, [()], threads=1)
    assert found == [1]
    assert os.getpid() not in anywhere.map("process", calls.process, [()])


def test_a_task_finds_the_libraries_loaded_and_does_not_run_the_program(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text("""
print("the program runs")
if __name__ == "__main__":
    import sys
    from pathlib import Path
    import calls
    from lablog.cluster.client import Cluster
    from lablog.text.docstrings import documents
    documents(["filelock"], processes=1)
    with Cluster("", Path(sys.argv[1]), 1) as cluster:
        print(cluster.map("task", calls.loaded, [("lablog.cluster.warm",), ("script",)]))
""")
    path = os.pathsep.join([str(repository() / "lib"), str(Path(calls.__file__).parent)])
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True,
                          check=True, env={**os.environ, "PYTHONPATH": path})
    reader, program = 1, 1  # a process that reads documentation is one as Python starts them
    assert done.stdout.splitlines() == (reader + program) * ["the program runs"] + ["[True, False]"]


def test_results_of_another_folder_are_another_task_where_files_are_shared(
    two, tmp_path, monkeypatch
):
    """Else a task that writes would do so for whoever asked first."""
    def asked(shared: bool) -> set[str]:
        names: set[str] = set()
        for name in ("laptop", "laptop+1a2b3c4d"):
            with Cluster(two.address, tmp_path / name) as cluster:
                cluster.shared, submit = shared, cluster.client.submit

                def noted(*arguments, key, submit=submit, **options):
                    names.add(key)
                    return submit(*arguments, key=key, **options)

                monkeypatch.setattr(cluster.client, "submit", noted)
                assert cluster.map("root", math.sqrt, [(9.0,)]) == [3.0]
        return {name for name in names if name.startswith("root")}

    assert len(asked(shared=True)) == 2
    assert len(asked(shared=False)) == 1, "what it returns is brought to either"


def test_a_task_that_ends_in_the_middle_of_its_answer_is_named(monkeypatch):
    def broken(self):
        raise OSError("got end of file during message")

    monkeypatch.setattr(multiprocessing.connection.Connection, "recv", broken)
    (head, _), (call, _) = pack((operator.add, ()), {}), pack((1, 2), {})
    with pytest.raises(TaskCrashed, match="a sum ended without a result"):
        run_alone(head, call, {}, 1, "a sum", ("lablog.cluster.warm",))


def test_more_threads_than_a_worker_has(local, connected):
    assert local.map("threads", calls.threads, [()], threads=2) == [2]
    with pytest.raises(ValueError, match="needs 2 threads, and no worker has more than 1 threads"):
        connected.map("threads", calls.threads, [()], threads=2)


def test_more_memory_than_there_is(anywhere):
    with pytest.raises(ValueError, match=r"needs 1 threads, 1e\+18 memory, and no worker has more"):
        anywhere.map("root", math.sqrt, [(9.0,)], memory=10**18)


def test_an_error_is_raised_here_and_names_the_task(anywhere):
    with pytest.raises(ValueError, match="math domain error") as caught:
        anywhere.map("root", math.sqrt, [(4.0,), (-1.0,)])
    assert "in the task root -1.0" in caught.value.__notes__[0]
    assert anywhere.map("root", math.sqrt, [(9.0,)]) == [3.0]  # the worker lives


@pytest.mark.parametrize(("function", "arguments", "reason"), [
    (os._exit, (3,), "exit code 3"), (os.abort, (), "SIGABRT"),
])
def test_a_crash_is_an_error_of_its_task(anywhere, function, arguments, reason):
    with pytest.raises(TaskCrashed, match=rf"crash.* ended without a result.*{reason}"):
        anywhere.map("crash", function, [arguments])
    assert anywhere.map("root", math.sqrt, [(9.0,)]) == [3.0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A tokenizer, and what is trained with it by one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    lines = sorted({line for i in range(300)
                    for line in render(generate(load_settings(), 0, i).turns).splitlines()})
    tokenizer = train_tokenizer(lines, 700, folder / "tokenizer" / "tokenizer.model").path
    return tokenizer, calls.train(folder / "began", folder / "model", tokenizer)


def test_a_training_on_a_machine_without_the_client_s_files_has_the_same_bits(
    connected, alone, tmp_path
):
    """The base comes to the worker, the trained folder to the client, whole."""
    connected.shared = False
    tokenizer = tmp_path / "read" / "tokenizer.model"
    shutil.copytree(alone[0].parent, tokenizer.parent)
    name = f"model-{os.getpid()}"
    (found,) = connected.map("training", calls.train, [
        (tmp_path / "began", tmp_path / name, tokenizer)], reads=[tokenizer.parent])
    assert found == tmp_path / name
    assert not (tmp_path / "began").exists()  # that is the worker's own
    one, other = ({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
                  for folder in (found, alone[1]))
    assert one.keys() == other.keys()
    assert one["model.safetensors"] == other["model.safetensors"]
    lent = repository() / "build" / "worker" / "artifacts"
    for left in ("read", "began", name):
        shutil.rmtree(lent / left)


def test_files_go_where_they_are_lacking_and_come_back(connected, tmp_path):
    """As between machines without a shared folder; these have one, and are told otherwise."""
    assert connected.shared
    connected.shared = False
    lent = repository() / "build" / "worker" / "artifacts"
    source, target = tmp_path / "read" / "text", tmp_path / f"made-{os.getpid()}"
    source.parent.mkdir()
    source.write_text("twice ")
    (found,) = connected.map("copy", calls.copied, [(source, target)], reads=[source.parent])
    assert found == target
    assert (target / "inner" / "text").read_text() == "twice twice "
    assert (lent / "read" / "text").read_text() == "twice "  # the worker's own
    source.write_text("other")
    with pytest.raises(OSError, match="there with other contents"):
        connected.map("copy", calls.copied, [(source, target)], reads=[source.parent])
    for left in (lent / "read" / "text", lent / target.name / "inner" / "text"):
        left.unlink()


def test_a_worker_with_other_software_refuses_with_the_difference(connected, monkeypatch):
    mine = {**clients.fingerprint(), "torch": "1.0", "library": "another"}
    monkeypatch.setattr(clients, "fingerprint", lambda: mine)
    with pytest.raises(OtherSoftware, match=r"library is .* and another here; torch is .* and 1.0"):
        connected.map("root", math.sqrt, [(9.0,)])


def test_a_task_that_nobody_waits_for_ends(anywhere, tmp_path):
    """The error of one call lets go of the others; else they would hold the workers."""
    folder = tmp_path / "began"
    with pytest.raises(ValueError, match="math domain error"):
        anywhere.map("mixed", mixed, [(folder, 0), (folder, 1)])
    wait_until(lambda: not any(alive(int(path.stem)) for path in folder.glob("*.pid")), 30)


def mixed(folder: Path, number: int) -> None:
    if number:
        end = time.monotonic() + 60
        while not list(folder.glob("*.pid")) and time.monotonic() < end:
            time.sleep(0.05)
        math.sqrt(-1.0)
    calls.slow(folder, 600)


def test_no_scheduler_and_no_worker_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "PATIENCE", "1s")
    with pytest.raises(ClusterLost, match="no scheduler answers at tcp://127"):
        Cluster("tcp://127.0.0.1:9", tmp_path)


def test_a_worker_without_a_scheduler_says_so_in_one_line(monkeypatch):
    monkeypatch.setitem(settings.SETTINGS, "distributed.comm.timeouts.connect", "1s")
    with dask.config.set({}), pytest.raises(
            SystemExit, match=r"^no worker could start: .*Is the address that of a scheduler"):
        by_hand(["worker", "tcp://127.0.0.1:9"])


def test_a_killed_worker_s_task_is_made_by_another(fragile, tmp_path):
    folder = tmp_path / "began"

    def kill() -> None:
        wait_until(lambda: list(folder.glob("*.pid")), 60)
        (first,) = folder.glob("*.pid")
        worker, began = calls.worker_of(int(first.stem)), int(first.stem)
        worker.send_signal(signal.SIGKILL)
        wait_until(lambda: not alive(began), 20)  # children die with their worker

    with Cluster(fragile.address, tmp_path) as cluster:
        thread = in_background(kill)
        assert cluster.map("twice", calls.once_slow, [(folder,)]) == [2]
        thread.join()


def test_a_training_whose_worker_was_killed_ends_in_the_same_bits(fragile, alone, tmp_path):
    """Its checkpoints lie where the other worker finds them."""
    tokenizer, expected = alone
    began, output = tmp_path / "began", tmp_path / "there" / "model"
    kept = output.parent / ".model.work"

    def kill() -> None:
        wait_until(lambda: list(kept.glob("checkpoint-*/complete")), 120)
        (first,) = began.glob("*.pid")
        calls.worker_of(int(first.stem)).send_signal(signal.SIGKILL)

    with Cluster(fragile.address, tmp_path) as cluster:
        thread = in_background(kill)
        assert cluster.map("training", calls.train, [(began, output, tokenizer)]) == [output]
        thread.join()
    assert len(list(began.glob("*.pid"))) == 2
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (output, expected))
    assert one == other


def test_a_task_that_kills_every_worker_ends_in_one_error(fragile, tmp_path):
    with Cluster(fragile.address, tmp_path) as cluster, \
            pytest.raises(TaskCrashed, match="deadly λ = 3: 3 workers died one after the other"):
        cluster.map("deadly", calls.kill_the_worker, [("λ = 3",)])


def test_without_its_scheduler_a_run_stops_and_keeps_what_is_finished(fragile, tmp_path):
    finished = []

    def kill() -> None:
        wait_until(lambda: len(finished) > 2, 60)
        fragile.scheduler.send_signal(signal.SIGKILL)

    with Cluster(fragile.address, tmp_path) as cluster:
        thread = in_background(kill)
        with pytest.raises(ClusterLost, match="has gone: what was finished is kept"):
            cluster.map("slow", calls.slow, [(tmp_path / str(i), 0.2) for i in range(300)],
                        done=lambda index, result: finished.append(index))
        thread.join()
    assert 2 < len(finished) < 300


def test_tasks_end_with_a_chapter_that_was_killed(tmp_path):
    """Else they go on training for nobody, beside the run that resumes."""
    folder = tmp_path / "began"
    script = tmp_path / "chapter.py"
    script.write_text(
        "from pathlib import Path\nimport calls\nfrom lablog.cluster.client import Cluster\n"
        "if __name__ == '__main__':\n"
        f"    cluster = Cluster('', Path({str(tmp_path)!r}), 1)\n"
        f"    cluster.map('slow', calls.slow, [(Path({str(folder)!r}), 600.0)])\n")
    path = os.pathsep.join([str(repository() / "lib"), str(Path(__file__).parent)])
    chapter = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": path})
    try:
        wait_until(lambda: list(folder.glob("*.pid")), 120)
        (began,) = folder.glob("*.pid")
    finally:
        chapter.kill()
        chapter.wait()
    wait_until(lambda: not alive(int(began.stem)), 20)


LOADING = """
import os, signal, sys
from multiprocessing import forkserver
from lablog.cluster.child import start_server

start_server(["slow_to_load"])
while not os.path.exists("loading"):
    pass
os.kill(forkserver._forkserver._forkserver_pid, signal.SIGINT)
assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
open("go", "w").close()
while not os.path.exists("loaded"):
    pass
"""


def test_ctrl_c_does_not_reach_libraries_that_are_being_loaded(tmp_path):
    """Each process would end in a traceback, above the one message that the user needs."""
    (tmp_path / "slow_to_load.py").write_text(
        "import os\nopen('loading', 'w').close()\nwhile not os.path.exists('go'):\n    pass\n"
        "open('loaded', 'w').close()\n")
    path = os.pathsep.join([str(repository() / "lib"), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", LOADING], cwd=tmp_path, timeout=60, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")


def test_the_workers_are_free_again_when_a_client_was_killed(two, tmp_path):
    folder, path = tmp_path / "began", os.pathsep.join(
        [str(repository() / "lib"), str(Path(__file__).parent)])
    script = tmp_path / "chapter.py"
    script.write_text(
        "from pathlib import Path\nimport calls\nfrom lablog.cluster.client import Cluster\n"
        f"cluster = Cluster({two.address!r}, Path({str(tmp_path)!r}))\n"
        f"cluster.map('slow', calls.slow, [(Path({str(folder)!r}) / str(i), 600.0)\n"
        "                                 for i in range(2)])\n")
    chapter = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": path})
    try:
        wait_until(lambda: len(list(folder.glob("*/*.pid"))) == 2, 120)
    finally:
        chapter.kill()
        chapter.wait()
    with Cluster(two.address, tmp_path) as cluster:
        assert cluster.map("power", operator.pow, [(2, 5), (2, 6)]) == [32, 64]
    wait_until(lambda: not any(alive(int(p.stem)) for p in folder.glob("*/*.pid")), 30)


def test_jobs_of_a_queue_are_workers(tmp_path, monkeypatch):
    """A stand-in for Slurm starts the job's script here, as ``sbatch`` would on a node."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "sbatch": f'cp "$1" {tmp_path}/job.sh; setsid bash {tmp_path}/job.sh > {tmp_path}/job.log '
                  '2>&1 & echo "Submitted batch job $!"',
        "scancel": 'for job in "$@"; do kill -TERM -- "-$job" 2>/dev/null; done; true',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.yaml").write_text(
        "queue: slurm\njobs: 1\ncores: 1\nmemory: 2GB\nwalltime: 00:10:00\n")
    with Cluster(str(tmp_path / "jobs.yaml"), tmp_path) as cluster:
        assert cluster.map("power", operator.pow, [(2, 5), (2, 6)]) == [32, 64]


def in_background(function):
    import threading

    thread = threading.Thread(target=function)
    thread.start()
    return thread


def wait_until(true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
