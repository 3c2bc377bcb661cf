"""Pushing what a training run has saved to the Hugging Face Hub."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub import get_token as stored_token
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from diffusers_ext.hub.modular_index import MODULAR_FILES
from diffusers_ext.hub.remote_code import CODE_FILES, ForeignParts, files_with_code
from diffusers_ext.hub.saved_folder import SavedFolder, of_repository


logger = logging.get_logger(__name__)

CARD = "README.md"

# What a training run leaves beside what it saves and nobody needs for loading it.
MILESTONES = "milestones"
NOT_UPLOADED = (
    f"{MILESTONES}/*",
    "checkpoint-*/*",
    "ema_snapshots/*",
    "profile/*",
    "logs/*",
    "index.html",  # the page of a run, whose pictures and numbers go along anyway
    ".*",
    "__pycache__/*",
    "*/__pycache__/*",
)

_HTTP_ERROR = HfHubHTTPError.__mro__[1]  # of whichever library huggingface_hub speaks HTTP with

WAITS = (5.0, 15.0, 60.0, 180.0)  # seconds between the tries of an upload
_PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)  # 409 and 412: somebody else's commit came between


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
    branch: str | None = None,
    ignore_patterns: Sequence[str] = NOT_UPLOADED,
) -> str:
    """Uploads the pipeline or model saved in `folder` to the model repository `repo_id` in one commit: all of it or nothing.

    The repository is made if it does not exist. Files in it that belong to a component of an earlier upload and are
    not in `folder` any more are deleted in the same commit, so that no stale shard is loaded. The code that loads it
    without this package goes along, whether or not `folder` has it.

    Args:
        repo_id, token, private: As for `prepare_repo`.
        branch: Where to, in place of `main`; made of `main` if it does not exist.
        ignore_patterns: What not to upload, as patterns on the path relative to `folder`, where `*` matches `/` too.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the folder holds no whole pipeline or model, or links to files out of it; and as for `prepare_repo`.
        PermissionError: as for `prepare_repo`.
    """
    folder = Path(folder)
    saved = SavedFolder.read(folder)
    there = _files_to_upload(folder, ignore_patterns)
    repo_id = prepare_repo(repo_id, token=token, private=private)
    files = there | _code_to_upload(folder, repo_id, branch)
    if CARD in files:
        files[CARD] = of_repository((folder / CARD).read_text(encoding="utf-8"), repo_id, branch).encode()

    api = _api(token)
    with _clear_refusals(repo_id), _branch(api, repo_id, branch):
        remote = api.model_info(repo_id, revision=branch)
        before = [sibling.rfilename for sibling in remote.siblings]
        stale = [
            name
            for name in before
            if name not in files and (name.split("/")[0] in saved.folders or name in CODE_FILES + MODULAR_FILES)
        ]
        # Not `upload_folder`: it splits a large folder into several commits.
        commit = api.create_commit(
            repo_id,
            [
                *[CommitOperationAdd(name, content) for name, content in files.items()],
                *[CommitOperationDelete(name) for name in stale],
            ],
            commit_message=commit_message or f"Upload the {'model' if saved.is_model else 'pipeline'}",
            revision=branch,
            parent_commit=remote.sha,
        )
    return commit.commit_url


def _files_to_upload(folder: Path, ignore_patterns: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by their paths in it."""
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: folder / name for name in filter_repo_objects(there, ignore_patterns=list(ignore_patterns))}
    for path in files.values():
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{str(path)!r} is a link to {str(path.resolve())!r}, which would be uploaded: put a copy of what is to be "
                "published there, or remove the link"
            )
    return files


def _code_to_upload(folder: Path, repo_id: str, branch: str | None) -> dict[str, bytes]:
    """The files that load it without this package, which need not be in the folder, and the configs that name them."""
    try:
        return {name: text.encode() for name, text in files_with_code(folder, repo_id, branch).items()}
    except ForeignParts as parts:
        logger.warning(str(parts))
        return {}


@contextmanager
def _branch(api: HfApi, repo_id: str, branch: str | None) -> Iterator[None]:
    """The branch exists; if it is made for a push that fails, it goes again."""
    if branch is None or branch in {ref.name for ref in api.list_repo_refs(repo_id).branches}:
        yield
        return
    try:
        api.create_branch(repo_id, branch=branch)
        yield
    except BaseException:
        with suppress(Exception):
            api.delete_branch(repo_id, branch=branch)
        raise


def push_patiently(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    waits: Sequence[float] = WAITS,
    sleep: Callable[[float], Any] = time.sleep,
    **options,
) -> tuple[str | None, str]:
    """`push_folder` for a run, which a failing upload must not stop: never raises, and tries again after each wait.

    Args:
        waits: Seconds before the second try and those that follow it. What no second try can mend is tried once.
        sleep: Waits so many seconds, or for less.
        options: Of `push_folder`.

    Returns: the address of the commit and "", or `None` and a line that says what failed and how to push later.
    """
    for wait in (*waits, None):
        try:
            return push_folder(folder, repo_id, **options), ""
        except Exception as error:
            if wait is None or not _may_pass(error):
                branch = f" --branch {options['branch']}" if options.get("branch") else ""
                private = " --private" if options.get("private") else ""
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                return None, (
                    f"not pushed to {repo_id} ({reason}); to push it later: python -m diffusers_ext.hub push {folder} {repo_id}"
                    f"{branch}{private}"
                )
            sleep(wait)


def _may_pass(error: Exception) -> bool:
    """Whether the same may well succeed later: a connection that failed, a Hub that is busy or down."""
    if isinstance(error, HfHubHTTPError):
        return error.response is None or error.response.status_code in _PASSING
    return not isinstance(error, ValueError | PermissionError | FileNotFoundError)


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
    except _HTTP_ERROR as error:
        raise ConnectionError(f"the Hub at {ENDPOINT} cannot be reached: {error}") from error
    except RuntimeError as error:  # of a thread that uploads a file
        if not isinstance(error.__cause__, _HTTP_ERROR):
            raise
        raise ConnectionError(f"{error} {error.__cause__}") from error
