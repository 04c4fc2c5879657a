"""Files of a repository of the Hugging Face hub. Code and pickles in a repository are neither fetched nor read."""

from __future__ import annotations

import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from microglia.core.errors import FileError
from microglia.core.optional import needs

PREFIX = "hub:"
NEEDED = ("plan.json", "model.safetensors")
ALLOWED = (*NEEDED, "acceleration.json", "result.json", "README.md")
"""The only files that are fetched."""
UNREAD = {".py", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".so", ".sh"}
"""Endings of files that hold code, or that are read by running code."""
FORM = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def fetched(name: str) -> Path:
    """Returns a local folder with a saved model of the hub, fetched or from the cache.

    Args:
        name: ``hub:OWNER/NAME`` or ``hub:OWNER/NAME@REVISION``; a revision is a branch, a tag or a commit.

    Raises:
        FileError: The name has another form, the hub cannot be reached, or the repository holds no model of this library.
        MissingLibraryError: `huggingface_hub` is not installed.
    """
    found = FORM.fullmatch(name.removeprefix(PREFIX))
    if found is None:
        raise FileError(f"A model of the hub is named as hub:OWNER/NAME or hub:OWNER/NAME@REVISION; got {name!r}.")
    repository, revision = found["repository"], found["revision"]
    with asking(repository):
        from huggingface_hub import snapshot_download

        own: dict[str, Any] = {"revision": revision, "allow_patterns": list(ALLOWED), "endpoint": endpoint()}
        try:
            _check(repository, client().list_repo_files(repository, revision=revision))
        except Exception as error:
            if not _unreachable(error):
                raise
            return Path(snapshot_download(repository, local_files_only=True, **own))
        return Path(snapshot_download(repository, **own))


def client() -> Any:
    """Returns the API of the hub that ``HF_ENDPOINT`` names, or of the public one."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint())


def endpoint() -> str | None:
    """Returns the address in ``HF_ENDPOINT``, read now, or None for the public hub."""
    return os.environ.get("HF_ENDPOINT")


@contextmanager
def asking(repository: str) -> Iterator[None]:
    """Turns errors of the hub about a repository into one sentence."""
    with needs("hub", "huggingface_hub", what="The hub"):
        from huggingface_hub import errors as known
    try:
        yield
    except known.HFValidationError as error:
        raise FileError(f"The hub takes no name such as {repository!r}: {str(error).splitlines()[0]}") from error
    except known.GatedRepoError as error:
        raise FileError(
            f"The repository {repository} needs consent: ask for access on its page, then `hf auth login`."
        ) from error
    except known.RepositoryNotFoundError as error:
        text = f"The hub has no repository {repository} that you may see: check the name, or `hf auth login` if it is private."
        raise FileError(text) from error
    except known.RevisionNotFoundError as error:
        raise FileError(f"The repository {repository} has no such branch, tag or commit: check what stands after @.") from error
    except known.LocalEntryNotFoundError as error:
        raise FileError(f"The hub cannot be reached, and {repository} was not fetched before: check the network.") from error
    except known.HfHubHTTPError as error:
        lines = str(error).strip().splitlines()
        raise FileError(f"The hub refused {repository}: {lines[0][:200] if lines else type(error).__name__}") from error
    except Exception as error:
        if _unreachable(error):
            raise FileError(
                f"The hub cannot be reached for {repository} ({type(error).__name__}): check the network."
            ) from error
        if isinstance(error, OSError):
            raise FileError(f"The files of {repository} cannot be kept here: {error.strerror or error}.") from error
        raise


def _unreachable(error: Exception) -> bool:
    """Tells whether no answer came; the libraries that the hub's client uses for requests have errors of their own."""
    network = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
    network = network or type(error).__module__.startswith(("httpx", "httpcore", "requests"))
    return network and getattr(error, "response", None) is None


def _check(repository: str, names: list[str]) -> None:
    """Raises unless the files of a repository have a model of this library; warns of code and pickles beside it."""
    unread = sorted(name for name in names if PurePosixPath(name).suffix.lower() in UNREAD)
    missing = [name for name in NEEDED if name not in names]
    if missing:
        what = f"; its code and pickles, such as {unread[0]}, are never read" if unread else ""
        raise FileError(f"The repository {repository} holds no model of this library: {' and '.join(missing)} missing{what}.")
    if unread:
        text = f"{repository} also holds code or pickles ({unread[0]}); they are neither fetched nor read."
        warnings.warn(text, stacklevel=4)
