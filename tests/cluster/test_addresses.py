"""Without TLS only this machine is spoken to; files of jobs say what is wrong in them."""

import re

import pytest
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

from lablog.cluster import addresses
from lablog.cluster.jobs import read_jobs, seconds


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "tcp://localhost:1", "tcp://[::1]:2"])
def test_this_machine_needs_nothing(address):
    assert addresses.security_for(address) is None


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:8786", "tcp://0.0.0.0:1", "tcp://node7:2"])
def test_another_machine_is_refused_without_tls(address, tmp_path):
    with pytest.raises(ValueError, match=r"is not encrypted.*make certificates"):
        addresses.security_for(address)
    with pytest.raises(FileNotFoundError, match=r"authority.pem is missing: `make certificates`"):
        addresses.security_for(address.replace("tcp", "tls"), tmp_path)


@given(st.text(max_size=30))
def test_any_other_address_is_named(address):
    if re.fullmatch(r"(tcp|tls)://.+:\d+", address):
        return
    with pytest.raises(ValueError, match="of no known form"):
        addresses.parsed(address)


def test_a_client_without_the_certificates_is_refused(tmp_path):
    mine, others = (addresses.with_certificates(addresses.make_certificates(tmp_path / name))
                    for name in ("mine", "others"))
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol="tls://",
                      host="127.0.0.1", security=mine, dashboard_address="127.0.0.1:0",
                      worker_dashboard_address="127.0.0.1:0") as cluster:
        with Client(cluster.scheduler_address, security=mine, set_as_default=False) as client:
            assert client.submit(max, 1, 2).result() == 2
        for wrong in (others, None):
            with pytest.raises((OSError, TypeError)):
                Client(cluster.scheduler_address, security=wrong, set_as_default=False,
                       timeout="2s")


def test_certificates_are_for_their_owner_alone_and_not_overwritten(tmp_path):
    folder = addresses.make_certificates(tmp_path / "made")
    assert folder.stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in folder.iterdir()) == ["authority.pem", "node.pem"]
    with pytest.raises(FileExistsError, match="remove it to make new"):
        addresses.make_certificates(folder)


JOBS = "queue: slurm\njobs: 2\ncores: 4\nmemory: 8GB\nwalltime: 1-02:03:04\n"


def test_a_file_of_jobs(tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text(JOBS)
    jobs = read_jobs(path)
    assert (jobs.queue, jobs.jobs, jobs.cores) == ("slurm", 2, 4)
    assert seconds(jobs.walltime) == 86_400 + 2 * 3600 + 3 * 60 + 4


@pytest.mark.parametrize(("text", "named"), [
    (JOBS.replace("slurm", "cron"), "queue"), (JOBS.replace("jobs: 2", "jobs: 0"), "jobs"),
    (JOBS + "cpus: 3\n", "cpus"), (JOBS.replace("1-02:03:04", "soon"), "walltime"),
    (JOBS.replace("memory: 8GB\n", ""), "memory"), ("- a list", "does not describe jobs"),
])
def test_a_wrong_file_of_jobs_is_refused_with_what_is_wrong(text, named, tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)jobs.yaml does not describe jobs.*{named}|{named}"):
        read_jobs(path)
    with pytest.raises(FileNotFoundError, match="is missing: write it"):
        read_jobs(tmp_path / "other.yaml")
