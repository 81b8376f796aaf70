"""Data sets of the Hugging Face hub, or of a mirror of it: their commits and their files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from gpt_dist.data.preparation.downloads import RemoteFile, check_name, network_reason
from gpt_dist.errors import GptDistError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OWN_ENDPOINT = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
"""The user's hub; huggingface_hub, too, reads it from the environment at import."""

T = TypeVar("T")


def token_for(endpoint: str | None) -> Literal[False] | None:
    """The ``token`` argument for a server: the user's own (None) only for the user's own hub."""
    if endpoint is None:
        return None
    server, own = urlsplit(endpoint), urlsplit(OWN_ENDPOINT)
    return None if (server.scheme, server.netloc) == (own.scheme, own.netloc) else False


def resolve_commit(repository: str, revision: str | None, endpoint: str | None = None) -> str:
    """The commit that a branch or tag of a data set points to now.

    Args:
        repository: such as ``HuggingFaceFW/fineweb-edu``.
        revision: branch, tag or commit; None = the main branch.
        endpoint: address of a mirror; None = the user's hub.

    Raises:
        GptDistError: no such data set or revision, or no connection.
    """
    commit = _ask(
        repository,
        f"@{revision}" if revision else "",
        endpoint,
        lambda api: api.dataset_info(repository, revision=revision).sha,
    )
    if not commit:
        raise GptDistError(f"{repository}: the server does not name its commit")
    return commit


def hub_files(
    repository: str,
    folder: str,
    commit: str,
    endpoint: str | None = None,
    suffix: str = ".parquet",
) -> list[RemoteFile]:
    """The files of a folder of a data set at one commit.

    Args:
        repository: such as ``HuggingFaceFW/fineweb-edu``.
        folder: inside the repository; "" = its root.
        commit: of ``resolve_commit``.
        endpoint: address of a mirror; None = the user's hub.

    Raises:
        GptDistError: no such data set or folder, no connection, or a file name that is not safe.
    """
    from huggingface_hub import RepoFile, get_token, hf_hub_url

    def listing(api: HfApi) -> list[Any]:
        api.dataset_info(repository, revision=commit, timeout=15)  # fails at once without network
        return list(
            api.list_repo_tree(
                repository, folder or None, recursive=True, revision=commit, repo_type="dataset"
            )
        )

    entries = _ask(repository, f"/{folder}" if folder else "", endpoint, listing)
    found = [e for e in entries if isinstance(e, RepoFile) and e.path.endswith(suffix)]
    for entry in found:
        check_name(entry.path, f"{endpoint or OWN_ENDPOINT}/datasets/{repository}")
    token = get_token() if token_for(endpoint) is None else None
    headers = (("Authorization", f"Bearer {token}"),) if token else ()
    files = [
        RemoteFile(
            hf_hub_url(
                repository, entry.path, repo_type="dataset", revision=commit, endpoint=endpoint
            ),
            f"{repository.rpartition('/')[2]}/{entry.path}",
            entry.size,
            entry.lfs.sha256 if entry.lfs else None,
            headers,
        )
        for entry in found
    ]
    if not files:
        where = f"{repository}/{folder}" if folder else repository
        raise GptDistError(f"{where}: no {suffix} files there at commit {commit}")
    return sorted(files, key=lambda file: file.name)


def _ask(repository: str, rest: str, endpoint: str | None, ask: Callable[[HfApi], T]) -> T:
    """Ask the hub about a data set; failures become one line."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=endpoint, token=token_for(endpoint))
    where = f"{api.endpoint}/datasets/{repository}{rest}"
    try:
        return ask(api)
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise GptDistError(f"{where}: HTTP {status}; is there such a data set?") from None
    except Exception as error:  # of the HTTP client, which differs between the library's versions
        raise GptDistError(
            f"{where}: no connection ({network_reason(error)}); on a machine without internet give "
            "the files with --source DIR"
        ) from None
