"""Resolves the name of a model to a local folder: an existing folder, or a download from the hub or a store."""

import os
from contextlib import suppress
from pathlib import Path

from spap_jax.checkpoint.ranged import note_of
from spap_jax.checkpoint.side_files import ACCOUNTS, SIDE_FILES, SOURCE, is_orbax, matching
from spap_jax.checkpoint.tensors import weight_files
from spap_jax.errors import UserError, first_line
from spap_jax.storage.files import Folder, check_repo_id, fetch_file, hub_file, hub_problem, require_hub
from spap_jax.storage.location import hub_id, is_address

_SAFETENSORS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "model.safetensors-*-of-*.safetensors",
)
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model*", "vocab*", "spiece.model", "tekken.json", "*.tiktoken")
_REMEDY = "connect to the network, or give the path of a local folder that holds the checkpoint."


def locate(name: str | Path) -> Path:
    """Returns the local folder of a checkpoint, which is downloaded if needed.

    Args:
        name: A folder; a hub id `owner/name` or `hf://owner/name`; or an address of a folder, of which safetensors are
            not downloaded: a note says where they are, for `AtAddress` to read them.

    Raises:
        UserError: The folder holds no checkpoint, or the hub or the store cannot provide the model.
    """
    if (repo := hub_id(name)) is not None:
        check_repo_id(repo, str(name), owned=False)
        return _from_hub(repo)
    return _at_address(str(name)) if is_address(name) else _local(name)


def locate_config(name: str | Path) -> Path:
    """Returns the path of a model's config.json, for callers that need no weights; no other file is downloaded.

    Raises:
        UserError: There is none, or the hub or the store cannot provide it.
    """
    if (repo := hub_id(name)) is not None:
        check_repo_id(repo, str(name), owned=False)
        return hub_file(repo, "config.json", "main", remedy=_REMEDY, kind="model")
    return fetch_file(f"{str(name).rstrip('/')}/config.json") if is_address(name) else _local(name) / "config.json"


def fetch_side_files(name: str | Path) -> None:
    """Downloads files such as the licence that are missing beside the weights of a cached model of the hub, if it
    answers.
    """
    from huggingface_hub import snapshot_download

    repo = hub_id(name)
    cached = _cached(repo) if repo else None
    if not repo or not cached or is_orbax(cached) or [*cached.glob("LICENSE*")] or hub_problem() is not None:
        return
    with suppress(Exception):  # whatever the client raises: the weights are there, and more was not promised
        snapshot_download(repo, revision=cached.name, allow_patterns=[*SIDE_FILES, *ACCOUNTS])


def _local(name: str | Path) -> Path:
    folder = Path(os.path.expanduser(name))
    if not folder.exists():
        raise UserError(
            f"there is no folder {folder}: check the path, or give a hub id of the form owner/name, where there "
            "is no folder of the owner's name."
        )
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name the folder that holds config.json and the weights.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no checkpoint: it has no config.json; name the folder that has one.")
    return folder.resolve()


def _from_hub(repo: str) -> Path:
    cached = _cached(repo)
    if cached is None:
        require_hub(f"the model {repo}", _REMEDY)
    elif (_has_tokenizer(cached) and not is_orbax(cached)) or hub_problem() is not None:
        return cached
    return _download(repo)


def _cached(repo: str) -> Path | None:
    """The cached snapshot if its config and all of its weights exist; no network is used."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if is_orbax(folder):
        return folder
    try:
        complete = all(file.is_file() for file in weight_files(folder))
    except UserError:
        return None
    return folder if complete else None


def _has_tokenizer(folder: Path) -> bool:
    return bool(matching([file.name for file in folder.iterdir()], _VOCABULARIES))


def _download(repo: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=_wanted(HfApi().list_repo_files(repo))))
    except GatedRepoError as error:
        raise UserError(
            f"the model {repo} is gated: accept its terms on its hub page and log in with `hf auth login`, "
            "or give a local folder."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {repo} that this login may see: check the spelling, or log in with `hf auth login`."
        ) from error
    except Exception as error:  # whatever the client raises: network lost, disk full
        raise UserError(f"the model {repo} cannot be downloaded ({first_line(error)}): {_REMEDY}") from error


def _at_address(address: str) -> Path:
    place = Folder(address)
    present = place.files()
    names = list(present)
    if "config.json" not in names:
        raise UserError(f"{place.address} is no checkpoint: it has no config.json; name the folder that has one.")
    wanted = _wanted(names)
    left = {name: present[name] for name in matching(wanted, ("model*.safetensors",)) if present[name]["size"]}
    note = note_of(address, left) if left else ""
    return place.fetch({name: present[name] for name in sorted({*wanted} - left.keys())}, note)


def _wanted(names: list[str]) -> list[str]:
    """The files to download: weights in one format only, safetensors if there are any; all of an Orbax folder."""
    if SOURCE in names:
        return names
    weights = matching(names, _SAFETENSORS) or matching(names, _TORCH)
    return ["config.json", *weights, *matching(names, SIDE_FILES + ACCOUNTS)]
