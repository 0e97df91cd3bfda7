"""``spap push``."""

from pathlib import Path


def push(folder: Path, repo: str, /, *, private: bool = False) -> None:
    """Upload a pruned checkpoint to the Hugging Face Hub, with its model card.

    The repository is made if there is none. All files arrive in one commit, or none does. Log in first, with hf auth
    login, or set HF_TOKEN.

    Args:
        folder: Checkpoint, as spap prune or spap finetune writes it.
        repo: Repository, as owner/name.
        private: Show it to nobody else, if the repository is new.
    """
    from spap_jax.cli.console import bytes_text, err, out
    from spap_jax.errors import UserError
    from spap_jax.hub import upload

    missing = [name for name in ("config.json", "README.md") if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("spap_report.json", "spap_finetune.json")):
        missing.append("spap_report.json")
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: name a folder that spap prune or spap finetune wrote."
        )
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")}
    card = (
        files["README.md"].read_text(encoding="utf-8").replace('from_pretrained("PATH")', f'from_pretrained("{repo}")')
    )
    size = sum(file.stat().st_size for file in files.values())
    err.print(f"uploading {len(files)} files, {bytes_text(size)}, to {repo} ...")
    out.print(upload(repo, files | {"README.md": card.encode()}, "Pruned with SPAP-JAX", private=private))
