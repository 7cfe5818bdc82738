"""Every error sllm_mini raises on purpose, in one tree under `SllmError`.

Each message is one sentence that names the file, the place and what to do next. Errors about bytes at rest carry
`path` and, where it is known, `offset`, so that a caller can act on them without parsing text. Taught in chapter 01.
"""

from __future__ import annotations

import os


class SllmError(Exception):
    """Root of all errors raised by sllm_mini; the command line prints it as one sentence and exits with 1."""


class UnsupportedError(SllmError):
    """What was asked for is valid, but this machine or this version cannot do it."""


class ResourceError(SllmError):
    """The package's own data (the tiny model, the survey, the kernels) is not where it should be."""


class _FileError(SllmError):
    """An error about one file: `path`, and the byte `offset` in it where one is known."""

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None, offset: int | None = None) -> None:
        self.path = None if path is None else os.fspath(path)
        self.offset = offset
        place = "" if self.path is None else f"{self.path}: " if offset is None else f"{self.path} at byte {offset:,}: "
        super().__init__(place + message)


class CheckpointError(_FileError):
    """Something is wrong with a checkpoint, ours or one to convert."""


class FormatError(CheckpointError):
    """An index, header or configuration that does not say what its format demands."""


class IntegrityError(CheckpointError):
    """Bytes that are not the bytes that were written: truncated, flipped, missing or extra."""


class CheckpointExistsError(CheckpointError):
    """The target of a write exists already and overwriting was not asked for."""


class WriteError(CheckpointError):
    """A checkpoint could not be written (full disk, no permission); nothing of it was left visible."""


class LoadError(_FileError):
    """A load failed: a read error, a short file, a bad hash. Nothing of it is left behind."""


class LoadCancelled(LoadError):
    """The load was cancelled by its owner."""


class RemoteError(_FileError):
    """Something remote cannot be read, or changed while it was; `path` is its address without any credentials."""


class StoreError(SllmError):
    """The store cannot do what was asked: a name it does not know, no room, a lease in the way, a store that is gone."""


class NoRoomError(StoreError):
    """A place of the store has no room for a model, whatever is evicted from it."""


class InUseError(SllmError):
    """It cannot go, or become another, while something else is made of it; the message names what."""


class DeviceError(SllmError):
    """A device call failed, or the device asked for is not there."""


class OutOfMemoryError(DeviceError):
    """The device or host has less free memory than was asked for; the message names both figures."""


class WireError(SllmError):
    """A message that breaks the framing or the schema of its channel."""


class ModelError(SllmError):
    """A model that cannot be built, filled or run as asked."""


class StageError(ModelError):
    """A stage of a model that runs in several places is gone; `stage` is its number."""

    def __init__(self, message: str, *, stage: int) -> None:
        self.stage = stage
        super().__init__(message)
