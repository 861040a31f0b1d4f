"""Puts checkpoints on the Hugging Face hub, as diffusers' folders with a model card.

huggingface_hub reads its environment variables when it is imported, and is therefore imported where it is used.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import unclip_jax
from unclip_jax.checkpoints import foreign
from unclip_jax.checkpoints.checkpoint import Checkpoint
from unclip_jax.checkpoints.hub import LOG_IN
from unclip_jax.checkpoints.places import HUB_ID
from unclip_jax.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

CARD = "README.md"


def push(
    checkpoint: Checkpoint,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: np.dtype | None = None,
    sources: Sequence[str] | None = None,
    method: str | None = None,
    progress: bool = True,
) -> str:
    """Writes a checkpoint as a diffusers folder in a temporary place, and uploads it in one commit.

    A model card is written where the repository has none; one that is there stays as it is.

    Args:
        checkpoint: The open checkpoint.
        repo_id: "owner/name". The repository is made if it is not there.
        private: Whether a new repository is private; None is the owner's default.
        commit_message: Of the commit; None names this library.
        revision: The branch, which is made if it is not there; None is the main branch.
        token: One that may write; None is the one of the login, or of HF_TOKEN.
        dtype: See `convert.export.diffusers.save_diffusers`.
        sources: See `convert.export.card.model_card`.
        method: Likewise.
        progress: Show a progress bar.

    Returns:
        The commit's address.

    Raises:
        ValueError: An argument, or a checkpoint that diffusers has no folder for.
        PermissionError: There is no token, or it is refused.
        ConnectionError: There is no network.
        OSError: Another failure.
    """
    from huggingface_hub import HfApi, errors, get_token

    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id is {repo_id!r:.200}; want the form 'owner/name'")
    if commit_message is not None and not commit_message.strip():
        raise ValueError(f"commit_message is {commit_message!r}; want a text, or None")
    token = get_token() if token is None else token
    if token is None:
        raise PermissionError(f"{repo_id}: there is no token to write with; {LOG_IN}")
    if not (token.isascii() and token.isprintable()) or " " in token or not token:
        # Not shown, as it is a secret. The HTTP client would refuse it, too, and show it.
        raise ValueError("token has no token's form; want one line of letters and digits, as hf_...")
    card = foreign.model_card(checkpoint, repo_id, sources, method)
    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="unclip-jax-") as temporary:
        try:
            # First, so that a token that may not write is known before gigabytes are.
            hub.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                hub.create_branch(repo_id, branch=revision, exist_ok=True)
            folder = Path(temporary) / "checkpoint"
            with Progress("writing", checkpoint.nbytes, unit="B", enabled=progress, bytes_=True) as bar:
                foreign.save_diffusers(checkpoint, folder, dtype=dtype, progress=bar.update)
            if not hub.file_exists(repo_id, CARD, revision=revision):
                (folder / CARD).write_text(card, "utf-8")
            message = f"Upload by unclip_jax {unclip_jax.__version__}" if commit_message is None else commit_message
            commit = hub.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        except (errors.HTTPError, OSError, RuntimeError) as error:
            raise _failure(error, repo_id) from error
    return str(commit.commit_url)


def _failure(error: BaseException, repo_id: str) -> OSError:
    """Our one-line error for what went wrong, found among the causes."""
    from huggingface_hub import constants, errors

    link: BaseException | None = error
    while link is not None:
        if isinstance(link, errors.HfHubHTTPError):
            return _refusal(link, repo_id)
        if isinstance(link, errors.OfflineModeIsEnabled):
            return ConnectionError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to upload")
        if isinstance(link, errors.HTTPError):
            what = f"the hub at {constants.ENDPOINT} cannot be reached ({_line(link)})"
            return ConnectionError(f"{repo_id}: {what}; check the network and run again")
        link = link.__cause__
    if isinstance(error, OSError) and error.filename:
        text = f"the temporary folder {tempfile.gettempdir()} cannot be written ({error.strerror})"
        return OSError(f"{repo_id}: {text}; set TMPDIR to one on a disk with space")
    return OSError(f"{repo_id}: {_line(error)}; run again")


def _refusal(error: "HfHubHTTPError", repo_id: str) -> OSError:
    answer = error.response
    reason = " ".join((error.server_message or answer.reason_phrase).split())[:300]
    match answer.status_code:
        case 401:
            return PermissionError(f"{repo_id}: the hub refuses the token (401: {reason}); {LOG_IN} with a valid one")
        case 403:
            owner = repo_id.partition("/")[0]
            advice = f"use one with write access to {owner}'s repositories"
            return PermissionError(f"{repo_id}: the token may not write here (403: {reason}); {advice}")
        case status:
            return OSError(f"{repo_id}: the hub answers {status} ({reason}); nothing was committed")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
