"""``python -m lablog.cluster scheduler|worker|certificates``: a cluster by hand.

A scheduler listens on this machine alone unless it is told otherwise, and then it demands TLS. A
worker serves one scheduler until either ends; its tasks run in processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

import dask
from distributed import Nanny, Scheduler

from lablog.cluster import addresses, fingerprint
from lablog.cluster.settings import SETTINGS, offered
from lablog.provenance import usable_threads


async def _scheduler(host: str, port: int, dashboard: int) -> None:
    away = not addresses.is_loopback(host)
    address = f"{'tls' if away else 'tcp'}://{host}:{port}"
    security = addresses.security_for(address)
    async with Scheduler(host=host, port=port, protocol="tls" if away else "tcp",
                         security=security, dashboard_address=f"127.0.0.1:{dashboard}") as server:
        print(f"scheduler at {server.address}; workers join with\n"
              f"  make worker SCHEDULER={server.address}\nand a run uses them with\n"
              f"  make reproduce CLUSTER={server.address}", flush=True)
        await server.finished()


async def _worker(address: str, threads: int) -> None:
    security = addresses.security_for(address)
    _, host, _ = addresses.parsed(address)
    near = addresses.is_loopback(host)
    async with Nanny(address, nthreads=threads, resources=offered(threads), security=security,
                     memory_limit=0, host="127.0.0.1" if near else None,
                     dashboard_address="127.0.0.1:0", config=dict(SETTINGS)) as nanny:
        print(f"worker with {threads} threads at {nanny.worker_address}", flush=True)
        await nanny.finished()


def main(arguments: list[str] | None = None) -> None:
    """See the module; exits with one line where something is missing."""
    parser = argparse.ArgumentParser(prog="lablog.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    scheduler = commands.add_parser("scheduler", help="start a scheduler")
    scheduler.add_argument("--host", default="127.0.0.1")
    scheduler.add_argument("--port", type=int, default=8786)
    scheduler.add_argument("--dashboard", type=int, default=0, help="port on this machine alone")
    worker = commands.add_parser("worker", help="start a worker")
    worker.add_argument("address", help="tcp://127.0.0.1:8786 or tls://HOST:8786")
    worker.add_argument("--threads", type=int, default=usable_threads())
    commands.add_parser("certificates", help="write certificates for TLS")
    asked = parser.parse_args(arguments)
    dask.config.set(SETTINGS)
    logging.getLogger("distributed").setLevel(logging.ERROR)
    try:
        if asked.command == "certificates":
            print(f"certificates are in {addresses.make_certificates()}")
        elif asked.command == "scheduler":
            asyncio.run(_scheduler(asked.host, asked.port, asked.dashboard))
        else:
            fingerprint.fingerprint()  # of what is there now, and is imported now
            asyncio.run(_worker(asked.address, asked.threads))
    except KeyboardInterrupt:
        pass
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except RuntimeError as error:  # the engine's, around what it met
        sys.exit(f"no {asked.command} could start: {error.__cause__ or error}. Is the address that "
                 "of a scheduler which runs, and are the certificates the same on both machines?")


if __name__ == "__main__":
    main()
