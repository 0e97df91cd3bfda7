"""The Hugging Face Hub: the local cache first, then a quick check whether the hub answers, and only then a download.

The hub's own clients retry for half a minute without a network; `require_hub` reports it within seconds.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from spap_jax.errors import UserError, option, without_password

Kind = Literal["dataset", "model"]
"""Type of a repository of the hub."""

_NEW = ".gitattributes"
"""The file that the hub itself puts into a new repository."""

_NAMED = 3
"""Number of existing files that an error names."""

_SECONDS = 4.0
"""Timeout of an attempt to connect; with name resolution, it may take twice that."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use inside a sentence: no final period, no hub token, no password."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
    return without_password(_without_token(line))


def require_hub(what: str, remedy: str) -> None:
    """Returns if the hub answers, else raises within about eight seconds.

    Args:
        what: What is wanted from the hub, as the subject of the error's sentence.
        remedy: What the user can do instead, in the imperative.

    Raises:
        UserError: The hub does not answer, or `HF_HUB_OFFLINE=1` forbids asking it.
    """
    from huggingface_hub import constants

    reason = hub_problem()
    if reason is not None:
        raise UserError(
            f"{what} is not on this machine and the hub {constants.ENDPOINT} cannot be reached ({reason}): {remedy}"
        )


def check_repo_id(repo: str, typed: str, *, owned: bool = True) -> None:
    """Checks a repository id before any request to the hub.

    Args:
        repo: Id of the repository, owner/name.
        typed: The id as the user gave it.
        owned: Whether it must have an owner; that of an old model, such as gpt2, has none.

    Raises:
        UserError: It is not a valid id.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = "/" in repo or not owned
    except HFValidationError:
        valid = False
    if not valid:
        form = f"{typed.removesuffix(repo)}owner/name"
        raise UserError(
            f"{typed} names no repository of the hub: give {form}, of letters and digits with single -, _ or dots "
            "between them."
        )


def check_upload(repo: str, overwrite: bool, private: bool) -> None:
    """Checks long before an upload that it can succeed; changes nothing on the hub.

    Args:
        repo: Id of the repository, owner/name.
        overwrite: Whether an existing model may be replaced.
        private: Whether nobody else may see the upload.

    Raises:
        UserError: The id is not valid, nobody is logged in, the hub does not answer or does not know the token, this
            login may not write there, or the repository holds files that may not be replaced, or is public although
            it may not be.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    check_repo_id(repo, f"hf://{repo}")
    token = _upload_token()
    hub = HfApi(constants.ENDPOINT, token)
    try:
        check_may_write(repo, hub.whoami())
        found = hub.model_info(repo)
    except RepositoryNotFoundError:
        return
    except UserError:
        raise
    except Exception as error:  # whatever the client raises: an expired token, a lost network
        said = first_line(error)
        raise UserError(f"the hub {constants.ENDPOINT} refuses ({said}): run hf auth login, or set HF_TOKEN.") from None
    there = sorted({file.rfilename for file in found.siblings or ()} - {_NEW})
    if there and not overwrite:
        some = ", ".join(there[:_NAMED]) + (", ..." if len(there) > _NAMED else "")
        way = f"pass {option('overwrite', True)} to replace the model in it"
        raise UserError(f"hf://{repo} exists, with {some}: name another repository, or {way}.")
    if private and not found.private:
        raise UserError(
            f"hf://{repo} is public, and what is uploaded to it would be: make it private in its settings on the hub, "
            f"or leave out {option('private', True)}."
        )


def check_may_write(repo: str, login: dict[str, Any]) -> None:
    """Checks a login by the role of its token; what a fine-grained one may do, the hub does not say."""
    role = login.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"hf://{repo} is to be written, and the hub's token may only read: log in with one that may write."
        )
    names = [login["name"], *(each["name"] for each in login.get("orgs") or ())]
    if role == "write" and repo.partition("/")[0].lower() not in map(str.lower, names):
        raise UserError(
            f"hf://{repo} belongs to none of {', '.join(names)}, to which this login may write: name one of these."
        )


def upload(
    repo: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    private: bool,
    replaced: Callable[[Iterable[str]], Iterable[str]],
) -> str:
    """Uploads files to a hub model repository in one commit; the repository is created if it does not exist.

    Args:
        repo: Id of the repository, owner/name.
        files: Files or their contents, by their names in the repository.
        message: Commit message.
        private: Whether a new repository is private.
        replaced: Returns those of the existing files that the same commit removes.

    Returns:
        The address of the repository.

    Raises:
        UserError: Nobody is logged in, the hub does not answer, or it refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    token = _upload_token()
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    hub = HfApi(constants.ENDPOINT, token)
    try:
        address = hub.create_repo(repo, private=private or None, exist_ok=True)
        stale = replaced(set(hub.list_repo_files(repo)) - files.keys())
        hub.create_commit(repo, [*added, *map(CommitOperationDelete, stale)], commit_message=message)
    except Exception as error:  # whatever the client raises: a bad name, no write access, a lost network
        said = first_line(error)
        raise UserError(f"{repo} could not be uploaded ({said}): no file there was changed.") from None
    return str(address)


def _upload_token() -> str:
    """Returns the token for uploads, after a check that the hub answers."""
    from huggingface_hub import constants, get_token

    token = get_token()
    if token is None:
        raise UserError("uploading needs a hub token, and there is none: run hf auth login, or set HF_TOKEN.")
    if (reason := hub_problem()) is not None:
        raise UserError(f"the hub {constants.ENDPOINT} cannot be reached ({reason}): nothing was uploaded, try again.")
    return token


def _without_token(line: str) -> str:
    """Masks the token: a server may echo it, also in a header that the hub's client puts into its first line."""
    if "huggingface_hub" not in sys.modules:  # then nothing was sent
        return line
    from huggingface_hub import get_token

    token = get_token()
    return line.replace(token, "the token") if token else line


def hub_file(repo: str, file: str, revision: str, *, remedy: str, kind: Kind = "dataset") -> Path:
    """The local copy of one file of a hub data set or model, downloaded if it is not cached.

    Raises:
        UserError: It is not cached and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    what = f"the file {file} of the hub {'data set' if kind == 'dataset' else 'model'} {repo}"
    cached = cached_file(repo, file, revision, kind)
    if cached is not None:
        return cached
    require_hub(what, remedy)
    try:
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=revision))
    except Exception as error:  # whatever the client raises: no network, no disk space, no access
        raise UserError(f"{what} cannot be downloaded ({first_line(error)}): {remedy}") from error


def cached_file(repo: str, file: str, revision: str, kind: Kind = "dataset") -> Path | None:
    """The cached copy of one file of a hub data set or model, or None; does not use the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def hub_splits(repo: str, config: str | None, *, remedy: str) -> Mapping[str, Iterable[Any]]:
    """The splits of a hub data set as iterables of rows, from the cached data set or else streamed.

    Raises:
        UserError: It is not cached and cannot be read from the hub.
    """
    splits = cached_splits(repo, config)
    if splits is not None:
        return splits
    require_hub(f"the hub data set {repo}", remedy)
    from datasets import load_dataset

    try:
        return cast(Mapping[str, Iterable[Any]], load_dataset(repo, config, streaming=True))
    except Exception as error:  # whatever the client raises: unknown, gated, a script
        if configs := re.match(r"Config name is missing.*\[(.+?)\]", str(error), re.DOTALL):
            several = configs[1].replace("'", "")
            raise UserError(f"the hub data set {repo} has the parts {several}: name one, as in {repo}:PART.") from error
        raise UserError(f"the hub data set {repo} cannot be read ({first_line(error)}): {remedy}") from error


def cached_splits(repo: str, config: str | None) -> Mapping[str, Iterable[Any]] | None:
    """The splits of a data set in the cache of the `datasets` library, or None; does not use the network.

    Without a name of a part, they are those of the part called "default": others that the cache has may not be meant.

    Raises:
        UserError: No part is named, the cache has another one, and the hub cannot be asked which is meant.
    """
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = Cache(dataset_name=repo.split("/")[-1], repo_id=repo, config_name=config, version="auto", hash="auto")
        if config or (part := builder.config.name) == "default":
            return cast(Mapping[str, Iterable[Any]], builder.as_streaming_dataset())
    except (ValueError, OSError, KeyError):  # nothing cached, or several configs and none named
        return None
    if hub_problem() is not None:
        raise UserError(f"of the hub data set {repo} the part {part} is on this machine: name it, as in {repo}:{part}.")
    return None


def is_uncached(error: Exception) -> bool:
    """Whether a client that is `offline` says by an error that something is not in the cache, or that much else is."""
    said = ("Couldn't find cache for ", "There are multiple ")  # of a data set of which the cache has other parts
    return isinstance(error, ConnectionError) or str(error).startswith(said)


@contextmanager
def offline() -> Iterator[None]:
    """Restricts the hub's clients to the cache; for anything else they raise errors that `is_uncached` knows."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def hub_problem() -> str | None:
    """The reason why the hub does not answer, or None if it does."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    reasons: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
            reasons.append(None)
        except Exception as error:  # every failure to get an answer means the same here
            reasons.append("HF_HUB_OFFLINE is set" if constants.is_offline_mode() else first_line(error))

    thread = threading.Thread(target=ask, daemon=True)  # name resolution ignores timeouts
    thread.start()
    thread.join(2 * _SECONDS)
    return reasons[0] if reasons else f"no answer within {2 * _SECONDS:g} seconds"
