"""An export on the model hub."""

from pathlib import Path

from fewstep.errors import UserError, first_line


def check_repo_name(repo: str) -> None:
    """Raise UserError for a name that the hub cannot have."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {first_line(error)}") from None


def push_export(folder: Path, repo: str) -> str:
    """Upload an export to the model hub; returns its address.

    Raises:
        UserError: the hub refused; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {folder.name} with fewstep")
    except Exception as error:  # the hub's client raises many kinds; all mean the same to a user
        raise UserError(
            f"{folder} was written, but {repo} did not take it ({first_line(error)}); log in with "
            f"`hf auth login`, then upload it with `hf upload {repo} {folder}`"
        ) from error
    return f"https://huggingface.co/{repo}"
