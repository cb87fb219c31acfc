"""Models from the Hugging Face Hub, verified, with one clear error for each way it can fail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lablog.files import sha256

MODEL_FILES = re.compile(r"^[^/]+\.(safetensors|safetensors\.index\.json|json|model|jinja)$")
"""What a model needs: weights without pickle, configuration, tokenizer, chat template; no code, no
subfolders."""


class HubError(RuntimeError):
    """A model that the Hub did not give; the message names it and the remedy."""


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{what} is gated: accept its licence on its page, then run `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{what}: there is no such revision; leave it out for `main`") from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{what} is not in the local cache and the Hub cannot be reached: check the network, "
            "or give the path of a local copy as `model`"
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{what}: the repository has no such file; check its name") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: there is no such repository, or it is private: check the name, or run "
            "`hf auth login`"
        ) from error
    except httpx2.ConnectError as error:
        raise HubError(
            f"{what}: the Hub cannot be reached: check the network, or give the path of a local "
            "copy as `model`"
        ) from error
    except (OfflineModeIsEnabled, httpx2.TransportError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise HubError(
                f"{what} cannot be written into the cache ({error}): free some space, or set "
                "HF_HOME to a folder that can be written"
            ) from error
        if "onsistency check" in str(error) or isinstance(error, httpx2.RemoteProtocolError):
            raise HubError(f"{what} arrived truncated; run again to resume it") from error
        raise HubError(
            f"{what}: the Hub did not answer as expected ({str(error).splitlines()[0]}): check "
            "the network, or give the path of a local copy as `model`"
        ) from error
    except ValueError as error:  # names that the Hub cannot have
        raise HubError(f"{what}: {error} Expected hub:OWNER/NAME[@REVISION][:FILE]") from error


def download(repository: str, file: str, revision: str | None = None) -> Path:
    """One file of a repository, from the cache or the Hub; its path in the cache.

    The SHA-256 that the Hub states for large files is compared with what arrived; a file that
    differs is removed from the cache. Raises HubError.
    """
    what = f"{repository}/{file}" + (f" at revision {revision}" if revision else "")
    with _explained(what):
        path = Path(hf_hub_download(repository, file, revision=revision))
    stated = path.resolve().name  # the cache names a large file by the hash that the Hub states
    if re.fullmatch(r"[0-9a-f]{64}", stated):
        actual = sha256(path)
        if actual != stated:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise HubError(f"{what}: SHA-256 {actual} arrived, the Hub states {stated}; the file "
                           "was removed, run again to fetch it anew")
    return path


def download_model(repository: str, revision: str | None = None) -> Path:
    """Folder with a model's weights (safetensors), configuration and tokenizer.

    Raises HubError; also when the repository holds no safetensors.
    """
    what = repository + (f" at revision {revision}" if revision else "")
    with _explained(what):
        files = HfApi().list_repo_files(repository, revision=revision)
    wanted = [name for name in files if MODEL_FILES.match(name)]
    if not any(name.endswith(".safetensors") for name in wanted):
        raise HubError(f"{what} holds no safetensors; pickled weights are not read")
    return [download(repository, name, revision) for name in wanted][-1].parent
