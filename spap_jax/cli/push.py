"""``spap push``."""

from pathlib import Path


def push(
    folder: Path, to: str, /, *, private: bool = False, with_report: bool = False, overwrite: bool = False
) -> None:
    """Upload a pruned checkpoint to the Hugging Face Hub, with its model card.

    ```
    spap push pruned your-name/Llama-3.2-1B-pruned
    spap push pruned your-name/Llama-3.2-1B-pruned --private --overwrite
    ```

    A repository is created if it does not exist. All files arrive in one commit or not at all. Log in first with hf
    auth login, or set HF_TOKEN. Only the files that spap wrote are uploaded: config, weights, tokenizer, model card and
    JSON reports. Every other file in the folder is left out and named.

    Args:
        folder: Checkpoint as spap prune or spap finetune writes it.
        to: Repository, as owner/name.
        private: Make a new repository private; an existing one that is public is refused.
        with_report: Also upload spap_report.html, the page that spap report wrote into the folder.
        overwrite: Replace the model in a repository, which keeps its history.
    """
    from spap_jax.checkpoint.publish import files_of, left_out, push_to_hub
    from spap_jax.cli.console import err, out
    from spap_jax.errors import UserError
    from spap_jax.quantities import bytes_text
    from spap_jax.storage.files import check_repo_id

    repo = to.removeprefix("hf://").rstrip("/")
    check_repo_id(repo, to)
    files = files_of(folder, with_report)
    if "README.md" not in files or not files.keys() & {"spap_report.json", "spap_finetune.json"}:
        raise UserError(
            f"{folder} has no model card and report of spap's: name a folder that spap prune or spap finetune wrote."
        )
    if rest := left_out(folder, files):
        hint = "; --with-report uploads the page of spap report" if "spap_report.html" in rest else ""
        err.print(f"leaving out {', '.join(rest)}: not files of the checkpoint{hint}")
    size = sum(file.stat().st_size for file in files.values())
    err.print(f"uploading {len(files)} files, {bytes_text(size)}, to {to} ...")
    try:
        out.print(push_to_hub(files, repo, overwrite=overwrite, private=private))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; the same command sends all of it to {to} again.") from error
