"""``spap push``."""

from pathlib import Path


def push(folder: Path, to: str, /, *, private: bool = False, overwrite: bool = False) -> None:
    """Upload a pruned checkpoint to the Hugging Face Hub, with its model card, or to an address.

    Example: spap push pruned your-name/Llama-3.2-1B-pruned

    The hub's repository is made if there is none. All files arrive in one commit, or none does. Log in first, with hf
    auth login, or set HF_TOKEN. At an address, config.json arrives last: a folder that has one is complete.

    Args:
        folder: Checkpoint, as spap prune or spap finetune writes it.
        to: Repository, as owner/name, or an address such as gs://bucket/pruned.
        private: Show the repository to nobody else, if it is new.
        overwrite: Replace a checkpoint at an address; on the hub what was there stays in the history in any case.
    """
    from spap_jax.checkpoint.publish import check_place, files_of, publish
    from spap_jax.cli.console import bytes_text, err, out
    from spap_jax.errors import UserError
    from spap_jax.remote import hub_id, is_address

    address = to if is_address(to) else f"hf://{to}"
    if private and not hub_id(address):
        raise UserError(f"--private is for the hub, and {to} is an address: leave it out, and see who may read there.")
    needed = ["config.json", "README.md"] if hub_id(address) else ["config.json"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if hub_id(address) and not any((folder / name).is_file() for name in ("spap_report.json", "spap_finetune.json")):
        missing.append("spap_report.json")
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: name a folder that spap prune or spap finetune wrote."
        )
    if not hub_id(address):
        check_place(address, overwrite)
    files = files_of(folder)
    size = sum(file.stat().st_size for file in files.values())
    err.print(f"uploading {len(files)} files, {bytes_text(size)}, to {to} ...")
    out.print(publish(folder, address, private=private))
