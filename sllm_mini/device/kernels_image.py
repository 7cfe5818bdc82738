"""Compiled kernels in three states: built ahead of time, cached on disk, or compiled just in time.

`find_image` looks where FlashInfer (arXiv 2501.01005) looks, in its order: a prebuilt file, the cache, then a file lock,
the cache again (another process may have built it while this one waited), and only then the compiler. Files are
replaced as a whole and carry a hash of their bytes, so a crash under the lock or a damaged file costs one more build and
nothing else. A prebuilt file is found without asking which compiler is there, and so works where there is none. Safe
from several threads and processes. Taught in chapter 06.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from sllm_mini.errors import DeviceError, ResourceError
from sllm_mini.resources import resource

State = Literal["ahead of time", "cached", "just in time"]
STATES: tuple[State, ...] = ("ahead of time", "cached", "just in time")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
"""What kernels are built for ahead of time where no GPU says what it is."""
_MAGIC = b"sllm-mini kernel 1\n"
_SUFFIX = ".kernel"


class Compiler(Protocol):
    """What makes machine code of a source."""

    @property
    def version(self) -> str:
        """Its name and version; asking may load it."""
        ...

    def compile(self, source: Path, options: Sequence[str], architecture: str) -> bytes:
        """The image of a source for one architecture. Raises DeviceError with the compiler's own words."""
        ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is made of: a source, options and an architecture such as "sm_90". `digest` names exactly this."""

    source: Path
    options: tuple[str, ...]
    architecture: str
    digest: str

    @classmethod
    def of(cls, source: Path, options: Sequence[str], architecture: str) -> Recipe:
        """Reads the source once, so that a changed one is a new recipe."""
        text = source.read_bytes()
        return cls(source, tuple(options), architecture, _digest(hashlib.sha256(text).hexdigest(), *options, architecture))

    @property
    def name(self) -> str:
        return f"{self.source.stem}-{self.architecture}-{self.digest[:16]}"


@dataclass(frozen=True, slots=True)
class KernelFolders:
    """Where images lie: `ahead` are read only, `cache` (None: no cache) is read and written."""

    ahead: tuple[Path, ...] = ()
    cache: Path | None = None

    @classmethod
    def of_user(cls) -> KernelFolders:
        """`csrc/built` of the installation or the checkout, and `kernels` in the user's cache folder; the variable
        SLLM_MINI_KERNELS names another cache."""
        try:
            ahead: tuple[Path, ...] = (resource("csrc") / "built",)
        except ResourceError:
            ahead = ()
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(ahead, Path(os.environ.get("SLLM_MINI_KERNELS") or Path(home) / "sllm_mini" / "kernels"))


@dataclass(frozen=True, slots=True)
class KernelImage:
    """Machine code, how it was come by, and where the time went: `seconds` of "prebuilt", "compiler" (asking it for its
    version), "cache", "lock", "compile" and "write", those that happened. `notes` says what was wrong on the way."""

    data: bytes
    state: State
    seconds: dict[str, float]
    path: Path | None
    notes: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(slots=True)
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def find_image(recipe: Recipe, folders: KernelFolders, compiler: Compiler, *, allowed: Sequence[State] = STATES) -> KernelImage:
    """The image of a recipe by the first allowed state that has it. Raises DeviceError if none has it or the compiler
    refuses the source; a folder that cannot be used is a note."""
    clock, notes = _Clock(), list[str]()
    if "ahead of time" in allowed:
        with clock.span("prebuilt"):
            for folder in folders.ahead:
                for candidate in _compatible(recipe):
                    path = folder / f"{candidate.name}{_SUFFIX}"
                    data = _read(path, candidate.digest, None, notes)
                    if data is not None:
                        return KernelImage(data, "ahead of time", clock.seconds, path, tuple(notes))
    if "just in time" not in allowed and "cached" not in allowed:
        raise DeviceError(f"{recipe.source.name} was not built ahead of time for {recipe.architecture}; build it with: sllm-mini kernels")
    with clock.span("compiler"):
        version = compiler.version
    if folders.cache is None:
        return _compiled(recipe, compiler, allowed, clock, notes)
    path = folders.cache / f"{recipe.name}-{_digest(version)[:8]}{_SUFFIX}"
    if "cached" in allowed:
        with clock.span("cache"):
            data = _read(path, recipe.digest, version, notes)
        if data is not None:
            return KernelImage(data, "cached", clock.seconds, path, tuple(notes))
    with _locked(path, clock, notes) as locked:
        if locked and "cached" in allowed:
            with clock.span("cache"):
                data = _read(path, recipe.digest, version, notes)
            if data is not None:
                return KernelImage(data, "cached", clock.seconds, path, tuple(notes))
        built = _compiled(recipe, compiler, allowed, clock, notes)
        if not locked:
            return built
        try:
            with clock.span("write"):
                write_image(path, recipe, version, built.data)
        except OSError as error:
            return KernelImage(built.data, built.state, clock.seconds, None, (*notes, f"the kernel was not cached: {error}"))
        return KernelImage(built.data, built.state, clock.seconds, path, tuple(notes))


def build_ahead(recipes: Sequence[Recipe], folder: Path, compiler: Compiler) -> Iterator[tuple[Recipe, Path, float]]:
    """Compiles each recipe into `folder`, one after the other: recipe, file and seconds. Raises what compiling and
    writing raise; files that were written stay good."""
    for recipe in recipes:
        started = time.perf_counter()
        path = folder / f"{recipe.name}{_SUFFIX}"
        write_image(path, recipe, compiler.version, compiler.compile(recipe.source, recipe.options, recipe.architecture))
        yield recipe, path, time.perf_counter() - started


def write_image(path: Path, recipe: Recipe, version: str, data: bytes) -> None:
    """Writes an image as a whole or not at all; makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"digest": recipe.digest, "compiler": version, "options": recipe.options, "nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    number, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(number, "wb") as file:
            os.fchmod(number, 0o644)  # what is shipped is read by others
            file.write(_MAGIC + json.dumps(header).encode() + b"\n" + data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _compatible(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe itself, then for lower minor numbers of the same major: a GPU runs those images too."""
    kind, _, number = recipe.architecture.partition("_")
    major, minor = divmod(int(number), 10)
    for lower in range(minor, -1, -1):
        yield Recipe.of(recipe.source, recipe.options, f"{kind}_{major * 10 + lower}")


def _compiled(recipe: Recipe, compiler: Compiler, allowed: Sequence[State], clock: _Clock, notes: list[str]) -> KernelImage:
    if "just in time" not in allowed:
        raise DeviceError(f"{recipe.source.name} is not in the cache for {recipe.architecture} and may not be compiled now; compile it once first")
    with clock.span("compile"):
        data = compiler.compile(recipe.source, recipe.options, recipe.architecture)
    return KernelImage(data, "just in time", clock.seconds, None, tuple(notes))


def _read(path: Path, digest: str, version: str | None, notes: list[str]) -> bytes | None:
    """The image in a file; None, and a note unless the file is merely absent, where it is not whole or not of this recipe
    (or compiler, where one is asked for)."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{path} was not used: it cannot be read ({error})")
        return None
    try:
        line, _, data = found.removeprefix(_MAGIC).partition(b"\n")
        header = json.loads(line)
        whole = found.startswith(_MAGIC) and len(data) == header["nbytes"] and hashlib.sha256(data).hexdigest() == header["sha256"]
        ours = header["digest"] == digest and version in (None, header["compiler"])
    except (ValueError, KeyError, TypeError):
        whole = ours = False
    if whole and ours:
        return data
    notes.append(f"{path} was not used: it is {'of another source or compiler' if whole else 'damaged'}")
    return None


@contextmanager
def _locked(path: Path, clock: _Clock, notes: list[str]) -> Iterator[bool]:
    """Holds the lock beside `path`, waiting for whoever holds it; the kernel of the system gives it back when a process
    dies. False, and a note, where the folder cannot be written or its file system has no locks."""
    locked = False
    with ExitStack() as until:
        try:
            with clock.span("lock"):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = until.enter_context(open(path.with_suffix(".lock"), "wb"))
                fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
        except OSError as error:
            notes.append(f"the kernel was not cached: {error}")
        yield locked


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
