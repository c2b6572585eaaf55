"""An exported folder as a repository of a hub."""

from pathlib import Path

import fsspec
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from trainer.errors import UserError


def check_name(repository: str) -> None:
    """Raise UserError for what is no OWNER/NAME."""
    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repository}: no name of a repository such as OWNER/NAME ({error})") from error


def push(folder: Path, repository: str, public: bool) -> str:
    """Make the model repository where it is not there (private unless `public`), and commit the folder's files to it.

    Returns its address. The token is that of `hf auth login` or HF_TOKEN; another hub is that of HF_ENDPOINT, or of
    fsspec's configuration, which reading hf:// goes by. Raises UserError when the hub does not take it.
    """
    api = HfApi(endpoint=fsspec.config.conf.get("hf", {}).get("endpoint"))
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Dictionary written by alignsae")
    except (OSError, ValueError) as error:  # HTTP errors and the client's own among them
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder} is written, but the hub did not take it ({type(error).__name__}: {reason:.200}); after mending "
            f"that, `hf upload {repository} {folder}` goes on"
        ) from error
    return str(made)
