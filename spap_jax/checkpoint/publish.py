"""Uploads a finished checkpoint to the Hugging Face Hub in one commit."""

from collections.abc import Mapping
from pathlib import Path

from spap_jax.checkpoint.folders import LocalFolder
from spap_jax.checkpoint.output import MANIFEST, parse_manifest
from spap_jax.checkpoint.side_files import ACCOUNTS, PARAMS, SIDE_FILES, SOURCE, matching
from spap_jax.errors import UserError, first_line, option
from spap_jax.storage.files import hub_problem

_PAGE = "spap_report.html"
"""The file that spap report adds."""

_OF_A_MODEL = (
    *("config.json", SOURCE, *SIDE_FILES, *ACCOUNTS),
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_config.json"),
)
"""Files that are removed with another model that was in the repository: loaders would mix them with the new ones.

So are all in the folder of an Orbax checkpoint's weights.
"""

_NEW = ".gitattributes"
"""The file that the hub itself adds to a new repository."""

_NAMED = 3
"""Number of existing files that an error names."""


def files_of(folder: Path, with_page: bool = False) -> dict[str, Path]:
    """The files of a checkpoint that are uploaded, by name: those that its manifest names, perhaps the report's page.

    Raises:
        UserError: One of them is not there.
    """
    there = LocalFolder(folder).sizes().keys()
    written = parse_manifest(LocalFolder(folder).read(MANIFEST))
    if lost := sorted(written.keys() - there):
        raise UserError(f"{folder} has lost {lost[0]}, which spap wrote into it: write the checkpoint again.")
    page = {_PAGE} & there if with_page else set()
    return {name: folder / name for name in sorted({*written, *page})}


def left_out(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """The top-level files and folders of a checkpoint of which nothing is uploaded; folders end in a slash."""
    sent = {name.partition("/")[0] for name in files} | {MANIFEST}
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name not in sent)


def push_to_hub(files: Mapping[str, Path], repo: str, *, overwrite: bool, private: bool) -> str:
    """Uploads a checkpoint to a repository of the hub, created if needed, and returns the repository's address.

    Args:
        files: Files of the checkpoint by name, a README.md among them.
        overwrite: Whether the model in a repository that is not empty may be replaced.
        private: Whether a new repository is private; an existing one has to be.

    Raises:
        UserError: Nobody is logged in, the hub fails or refuses, or the repository is public or not replaceable.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

    token = get_token()
    if token is None:
        raise UserError("uploading needs a hub token, and there is none: run hf auth login, or set HF_TOKEN.")
    if reason := hub_problem():
        raise UserError(f"the hub {constants.ENDPOINT} cannot be reached ({reason}): nothing was uploaded, try again.")
    card = files["README.md"].read_bytes().replace(b'("PATH")', f'("{repo}")'.encode())
    hub = HfApi(constants.ENDPOINT, token)
    try:
        address = hub.create_repo(repo, private=private or None, exist_ok=True)
        found = hub.model_info(repo)
        present = {file.rfilename for file in found.siblings or ()}
        _check_replaceable(repo, sorted(present - {_NEW}), overwrite, must_hide=private and not found.private)
        gone = present - files.keys()
        removed = [*matching(gone, _OF_A_MODEL), *(name for name in gone if name.startswith(f"{PARAMS}/"))]
        sent: dict[str, Path | bytes] = {**files, "README.md": card}
        changes = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in sent.items()]
        hub.create_commit(repo, [*changes, *map(CommitOperationDelete, removed)], commit_message="Pruned with SPAP-JAX")
    except UserError:
        raise
    except Exception as error:  # whatever the client raises: a bad name, no write access, a lost network
        said = first_line(error)
        raise UserError(
            f"{repo} could not be uploaded ({said}): no file there was changed; if it is the login, run hf auth login."
        ) from None
    return str(address)


def _check_replaceable(repo: str, present: list[str], overwrite: bool, must_hide: bool) -> None:
    """Refuses a repository that holds files, or that is public, if that was not asked for."""
    if present and not overwrite:
        some = ", ".join(present[:_NAMED]) + (", ..." if len(present) > _NAMED else "")
        way = f"pass {option('overwrite', True)} to replace the model in it"
        raise UserError(f"hf://{repo} exists, with {some}: name another repository, or {way}.")
    if must_hide:
        raise UserError(
            f"hf://{repo} is public, and what is uploaded to it would be: make it private in its settings on the hub, "
            f"or leave out {option('private', True)}."
        )
