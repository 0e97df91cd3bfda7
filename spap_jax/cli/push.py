"""``spap push``."""

from pathlib import Path


def push(
    folder: Path, to: str, /, *, private: bool = False, with_report: bool = False, overwrite: bool = False
) -> None:
    """Upload a pruned checkpoint to the Hugging Face Hub, with its model card, or to an address.

    ```
    spap push pruned your-name/Llama-3.2-1B-pruned
    spap push pruned gs://bucket/pruned
    ```

    A repository of the hub is created if it does not exist. All files arrive in one commit or not at all. Log in first
    with hf auth login, or set HF_TOKEN. At an address config.json is uploaded last: a folder that has one is complete.
    Only the files of the checkpoint are uploaded: its config, weights, tokenizer, model card and JSON reports. Every
    other file in the folder is left out and named.

    Args:
        folder: Checkpoint as spap prune or spap finetune writes it.
        to: Repository, as owner/name, or an address such as gs://bucket/pruned.
        private: Make a new repository private; an existing one that is public is refused.
        with_report: Also upload spap_report.html, the page that spap report wrote into the folder, and its plots.
        overwrite: Replace the model in a repository of the hub, which keeps its history; or what is at an address, if
            all of it was sent by spap.
    """
    from spap_jax.checkpoint.publish import files_of, holds_weights, left_out, publish, push_to_hub
    from spap_jax.cli.console import err, out
    from spap_jax.errors import UserError
    from spap_jax.quantities import bytes_text
    from spap_jax.storage.files import check_repo_id
    from spap_jax.storage.location import check_apart, is_address

    to_hub = to.startswith("hf://") or not is_address(to)
    repo = to.removeprefix("hf://").rstrip("/")
    if to_hub:
        check_repo_id(repo, to)
    elif private:
        raise UserError(f"--private is for the hub, and {to} is an address: leave it out, and see who may read there.")
    else:
        check_apart(to, {"the checkpoint": folder})
    missing = [name for name in ["config.json", *["README.md"] * to_hub] if not (folder / name).is_file()]
    if to_hub and not any((folder / name).is_file() for name in ("spap_report.json", "spap_finetune.json")):
        missing.append("spap_report.json")
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: name a folder that spap prune or spap finetune wrote."
        )
    files = files_of(folder, with_report)
    if not holds_weights(files):
        raise UserError(
            f"{folder} has no weights in files model*.safetensors or in params/, which are what is uploaded: name a "
            f"folder that spap wrote, or make one of it with spap convert {folder} --to huggingface --output DIR."
        )
    if rest := left_out(folder, files):
        hint = "; --with-report uploads the page of spap report" if "spap_report.html" in rest else ""
        err.print(f"leaving out {', '.join(rest)}: not files of the checkpoint{hint}")
    size = sum(file.stat().st_size for file in files.values())
    err.print(f"uploading {len(files)} files, {bytes_text(size)}, to {to} ...")
    try:
        if to_hub:
            out.print(push_to_hub(folder, repo, overwrite, private=private, with_page=with_report))
        else:
            publish(folder, to, overwrite, with_page=with_report)
            out.print(to)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; the same command sends all of it to {to} again.") from error
