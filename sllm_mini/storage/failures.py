"""Errors on the store's socket: what a client raises is what the store raised, in class, text and attributes (chapter 05)."""

from __future__ import annotations

from sllm_mini import errors
from sllm_mini.errors import SllmError, StoreError
from sllm_mini.storage.messages import Failed

_MAX_CHARACTERS = 8000


def failure(error: BaseException) -> Failed:
    """An error as a message. Of a class that `errors` does not have its nearest ancestor there is named; of no SllmError,
    StoreError."""
    kind = next((known.__name__ for known in type(error).__mro__ if _known(known.__name__) is known), StoreError.__name__)
    path, offset = getattr(error, "path", None), getattr(error, "offset", None)
    return Failed(kind, words(error), path if isinstance(error, SllmError) else None, offset if isinstance(error, SllmError) else None)


def words(error: BaseException) -> str:
    """What an error says, not longer than a message takes."""
    return str(error)[:_MAX_CHARACTERS]


def restored(failed: Failed) -> SllmError:
    """The error that a message tells of; StoreError if this version of `errors` has no such class."""
    error = (_known(failed.kind) or StoreError)(failed.message)
    if hasattr(error, "path"):  # its text names the place already
        vars(error).update(path=failed.path, offset=failed.offset)
    return error


def _known(name: str) -> type[SllmError] | None:
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, SllmError) and not name.startswith("_") else None
