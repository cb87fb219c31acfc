"""Where a cluster is, and who may be spoken to without encryption: this machine alone."""

from __future__ import annotations

import ipaddress
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from distributed.security import Security

from lablog import layout
from lablog.files import atomic_folder

AUTHORITY, NODE = "authority.pem", "node.pem"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, seen from itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parsed(address: str) -> tuple[str, str, int]:
    """(scheme, host, port) of tcp://host:port or tls://host:port; ValueError for another form."""
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("tcp", "tls") or not parts.hostname or port is None:
        raise ValueError(f"the address {address!r} of a cluster is of no known form: give "
                         "tcp://127.0.0.1:8786, tls://HOST:8786, or a .yaml file for jobs")
    return parts.scheme, parts.hostname, port


def security_for(address: str, certificates: Path | None = None) -> Security | None:
    """What a connection to `address` needs: nothing on loopback, else certificates.

    Raises ValueError for tcp:// to another machine and FileNotFoundError where the certificates
    are missing; both say how to make them.
    """
    scheme, host, port = parsed(address)
    if scheme == "tcp":
        if not is_loopback(host):
            raise ValueError(
                f"{address} is another machine, and tcp:// is not encrypted: whoever reaches the "
                f"port can run programs. Use tls://{host}:{port} with certificates: {REMEDY}")
        return None
    return with_certificates(certificates)


def with_certificates(folder: Path | None = None) -> Security:
    """TLS on both sides with the certificates of `folder`; FileNotFoundError if they are missing"""
    folder = folder or layout.certificates()
    authority, node = folder / AUTHORITY, folder / NODE
    for path in (authority, node):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {REMEDY}")
    both = {f"tls_{role}_cert": str(node) for role in ("client", "scheduler", "worker")}
    return Security(require_encryption=True, tls_ca_file=str(authority), **both)


REMEDY = ("`make certificates` writes them into build/certificates; copy that folder, and it "
          "alone, to every machine of the cluster, by a way that nobody reads")


def make_certificates(folder: Path | None = None) -> Path:
    """A certificate authority and one certificate of it for all nodes, by openssl, for a year.

    Whoever has the folder may run programs on the cluster. Raises FileExistsError if it is there.
    """
    folder = folder or layout.certificates()
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: remove it to make new certificates")
    with atomic_folder(folder) as room:
        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=room, check=True, capture_output=True)

        openssl("req", "-x509", "-newkey", "rsa:3072", "-nodes", "-days", "365", "-keyout",
                "authority.key", "-out", AUTHORITY, "-subj", "/CN=lablog authority")
        openssl("req", "-newkey", "rsa:3072", "-nodes", "-keyout", "node.key", "-out", "node.csr",
                "-subj", "/CN=lablog node")
        openssl("x509", "-req", "-in", "node.csr", "-CA", AUTHORITY, "-CAkey", "authority.key",
                "-CAcreateserial", "-days", "365", "-out", "node.crt")
        (room / NODE).write_text((room / "node.key").read_text() + (room / "node.crt").read_text())
        (room / NODE).chmod(0o600)
        for name in ("authority.key", "authority.srl", "node.key", "node.csr", "node.crt"):
            (room / name).unlink(missing_ok=True)
    folder.chmod(0o700)
    return folder
