"""Pushing what a training run has saved to the Hugging Face Hub."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub import get_token as stored_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from diffusers_ext.hub.saved_folder import SavedFolder


# What a training run leaves beside what it saves and nobody needs for loading it.
NOT_UPLOADED = ("checkpoint-*/*", "ema_snapshots/*", "profile/*", "logs/*", ".*")


def prepare_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Makes sure that a model repository exists and can be written to, and returns its full id, `namespace/name`.

    Call it before a long run whose result is to be pushed: what would go wrong at the end goes wrong here.

    Args:
        repo_id: `name`, in the namespace of the token's owner, or `namespace/name`.
        token: An access token with the right to write; the one stored on this machine unless given.
        private: Whether nobody else may see it. `None` takes the Hub's default for a new one.

    Raises:
        ValueError: if `repo_id` is none, or the repository exists and is not as private as asked.
        PermissionError: if there is no token, or it does not give the right to write there.
    """
    check_repo_id(repo_id)
    api = _api(token)
    with _clear_refusals(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_private = bool(api.model_info(repo_id).private)
    if private is not None and private != is_private:
        states = ("public", "private")
        raise ValueError(
            f"{repo_id!r} exists and is {states[is_private]}, but private={private} was asked for. Change its"
            f" visibility on the Hub, choose another name, or leave `private` out to keep it {states[is_private]}."
        )
    return repo_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    ignore_patterns: Sequence[str] = NOT_UPLOADED,
) -> str:
    """Uploads the pipeline or model saved in `folder` to the model repository `repo_id` in one commit: all of it or nothing.

    The repository is made if it does not exist. Files in it that belong to a component of an earlier upload and are
    not in `folder` any more are deleted in the same commit, so that no stale shard is loaded.

    Args:
        repo_id, token, private: As for `prepare_repo`.
        ignore_patterns: What not to upload, as patterns on the path relative to `folder`, where `*` matches `/` too.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the folder holds no whole pipeline or model; and as for `prepare_repo`.
        PermissionError: as for `prepare_repo`.
    """
    folder = Path(folder)
    saved = SavedFolder.read(folder)
    repo_id = prepare_repo(repo_id, token=token, private=private)

    api = _api(token)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    uploaded = list(filter_repo_objects(files, ignore_patterns=list(ignore_patterns)))
    with _clear_refusals(repo_id):
        remote = api.model_info(repo_id)
        stale = [
            sibling.rfilename
            for sibling in remote.siblings
            if sibling.rfilename not in uploaded and sibling.rfilename.split("/")[0] in saved.folders
        ]
        # Not `upload_folder`: it splits a large folder into several commits.
        commit = api.create_commit(
            repo_id,
            [
                *[CommitOperationAdd(name, folder / name) for name in uploaded],
                *[CommitOperationDelete(name) for name in stale],
            ],
            commit_message=commit_message or f"Upload the {'model' if saved.is_model else 'pipeline'}",
            parent_commit=remote.sha,
        )
    return commit.commit_url


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"a repo id must be 'name' or 'namespace/name', got {repo_id!r}: {error}") from error


def _api(token: str | None) -> HfApi:
    token = token or stored_token()
    if not token:
        raise PermissionError(
            "pushing to the Hub needs an access token with the right to write, and there is none: pass `token`, set"
            " the environment variable HF_TOKEN, or log in once with `hf auth login`"
        )
    return HfApi(token=token, library_name="diffusers_ext")


@contextmanager
def _clear_refusals(repo_id: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        match error.response.status_code:
            case 401:
                raise PermissionError(
                    f"the Hub does not accept the access token for {repo_id!r}: it is mistyped, expired or revoked."
                    " Make a new one in the settings of your account."
                ) from error
            case 403:
                raise PermissionError(
                    f"the access token gives no right to write to {repo_id!r}. Use one of an account or organisation"
                    " that owns this namespace, with the right to write."
                ) from error
        raise
