"""Uploads to a hub. The token comes from the environment variable HF_TOKEN, the address from HF_ENDPOINT."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from lcm.core.errors import UserError


class Repository:
    """A repository on the hub that this user may write to. The first upload creates it.

    name: "owner/name". Raises UserError unless HF_TOKEN holds a valid token of the owner, or of a member of the owner's
    organisation.
    """

    def __init__(self, name: str) -> None:
        try:
            validate_repo_id(name)
        except HFValidationError:
            name = ""
        owner, slash, _ = name.partition("/")
        if not slash:
            raise UserError("push names no repository of the hub: give push=owner/name, with letters, digits, '-', '_' and '.'")
        token = os.environ.get("HF_TOKEN")
        if not token:
            raise UserError(f"push={name} needs a token with the right to write: set the environment variable HF_TOKEN")
        self.name, self.api = name, HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
        with self.requests():
            user = self.api.whoami()
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
        if owner not in owners:
            raise UserError(f"push={name}: the token in HF_TOKEN writes for {', '.join(owners)}: give one of these owners")

    def upload(self, path: Path) -> str:
        """Upload a file or the files of a folder, and return the repository's address. Raises UserError."""
        with self.requests():
            address = self.api.create_repo(self.name, exist_ok=True)
            if path.is_dir():
                self.api.upload_folder(repo_id=self.name, folder_path=path)
            else:
                self.api.upload_file(repo_id=self.name, path_or_fileobj=path, path_in_repo=path.name)
        return str(address)

    @contextmanager
    def requests(self) -> Iterator[None]:
        """Turn an error of a request into a UserError."""
        try:
            yield
        except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                reason = f"the hub refuses the token in HF_TOKEN (status {status}): give one with the right to write"
            else:
                reason = f"the hub is not reached ({type(error).__name__}): check the connection, HF_ENDPOINT, HF_HUB_OFFLINE"
            raise UserError(f"push={self.name}: {reason}") from error
