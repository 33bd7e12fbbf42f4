"""Uploading a folder to the Hugging Face hub."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def upload(folder: str, repo: str) -> None:
    """Make the private repository `repo` where there is none, and upload `folder` to it.

    Raises ValueError saying what is wrong and what is already there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the upload to '{repo}' failed: {reason}. The folder is whole in {folder}; log in with `hf auth login`, "
            f"then: hf upload {repo} {folder}"
        ) from error
    logger.info("uploaded %s to %s", folder, repo)
