"""The steps of `bench tiers`: each brings one model from one tier to another, uses every byte, and says what it took.

One store lives through the run, embedded here and on a socket; clients are processes of their own. A step makes the
conditions that it needs itself (nothing in DRAM, files cold or warm, memory that the host has backed), so steps may come in
any order. Not safe from several threads. Shown in chapter 03.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.device.base import ALIGNMENT, Device
from sllm_mini.errors import StoreError, UnsupportedError
from sllm_mini.lab.bench import ours
from sllm_mini.lab.bench.checksum import sum_tensors
from sllm_mini.lab.bench.conditions import back_memory, make_cold, make_warm
from sllm_mini.lab.bench.process import WorkerError
from sllm_mini.lab.bench.words import DISK, LINK, MAPPED_FILE
from sllm_mini.lab.bench.workload import Model
from sllm_mini.lab.tiers import client
from sllm_mini.lab.tiers.document import LOOPBACK, USE, Row
from sllm_mini.lab.tiers.origin import Origin
from sllm_mini.lab.tiers.pages import PAGES, Pages, granted
from sllm_mini.lab.tiers.process import Process
from sllm_mini.storage.holdings import DRAM, Lease
from sllm_mini.storage.server import StoreServer
from sllm_mini.storage.store import Store

ATTACH_SECONDS = 0.02
"""The target of design.md for a model that is in memory already, whatever its size."""
_BACKED_SHARE = 1.1
_SETTLE_SECONDS = 60.0
_LOOK_SECONDS = 0.002
_SPARE_NBYTES = 1 << 29
"""For the last chunk of each model, which is partly used."""

Sample = dict[str, float]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is measured: its files, its checkpoint, and the sum over its bytes that everybody must give."""

    model: Model
    checkpoint: Checkpoint
    total: int

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def partitions(self) -> list[Path]:
        return [self.checkpoint.path / partition.file for partition in self.checkpoint.index.partitions]

    def check(self, found: dict[str, Any]) -> Sample:
        """The parts of a sample whose sum is right. Raises WorkerError for one that is not."""
        if (found["sum"], found["nbytes"]) != (self.total, self.model.nbytes):
            raise WorkerError(f"it gave {found['nbytes']:,} bytes of tensors, or wrong ones; {self.name} holds {self.model.nbytes:,}")
        return {name: value for name, value in found.items() if name not in ("sum", "nbytes")}


@dataclass(frozen=True, slots=True)
class Step:
    """What is measured together: a row and its samples from one run, the rows in the same order as `run` gives them."""

    rows: tuple[Row, ...]
    run: Callable[[], Sequence[Sample]]


class Steps:
    """`subjects` are attached, and the last one is loaded, too. `gpu` is measured if given. As a context manager it gives
    back all memory, processes and files. Raises what `Store` raises."""

    def __init__(self, subjects: Sequence[Subject], folder: Path, *, gpu: Device | None, huge_pages: bool, limit_seconds: float) -> None:
        self.subjects, self.main = list(subjects), subjects[-1]
        self.gpu, self._huge_pages, self._limit_seconds = gpu, huge_pages, limit_seconds
        self._copied: set[str] = set()
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiers-", dir=folder)))
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="sllm-"))  # a socket's address is short
            self._address, self._other_address = f"{sockets}/store", f"{sockets}/other"
            nbytes = sum(subject.checkpoint.nbytes for subject in self.subjects)
            disk_nbytes = int(1.05 * self.main.checkpoint.nbytes) + _SPARE_NBYTES
            budgets: dict[str | Device, int] = {} if gpu is None else {gpu: nbytes + _SPARE_NBYTES}
            self.store = stack.enter_context(Store(self._folder / "store", dram_nbytes=nbytes + _SPARE_NBYTES, disk_nbytes=disk_nbytes, device_nbytes=budgets))
            stack.enter_context(StoreServer(self.store, self._address))
            self.origin = stack.enter_context(Origin(self.main.checkpoint.path))
            for subject in self.subjects:
                self.store.register(subject.name, subject.checkpoint.path)
            self._client = self._process(stack, "")
            self._tensors = self._process(stack, "sllm_mini.lab.bench.ours:tensors", verify=True)
            self._mapped = self._process(stack, "sllm_mini.lab.bench.ours:mapped")
            self._remote = self._process(stack, f"{client.__name__}:remote", url=self.origin.url, folder=str(self._folder / "remote"))
            self._open = stack.pop_all()

    def _process(self, stack: ExitStack, opener: str, **arguments: Any) -> Process:
        files = [str(path.resolve()) for path in self.main.model.files]
        made = Process(opener, {"path": str(self.main.checkpoint.path), "files": files, "device": "cpu", "arguments": arguments}, self._limit_seconds)
        stack.callback(made.close)
        made.start()
        return made

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # What there is to measure

    def loads(self) -> Iterator[Step]:
        """From a slower tier into memory."""
        main, row = self.main, partial(Row, model=self.main.name, nbytes=self.main.model.nbytes)
        mapped = row(ours.MAPPED, "warm", kind="limit")
        yield _step(row("remote → own memory", "remote", (LOOPBACK,), compared="load"), lambda: self._load(self._remote, make_warm, main.partitions))
        yield _step(row("remote → disk cache and DRAM, one pass", "remote", (LOOPBACK,), compared="load"), self._from_remote)
        yield _step(row("disk → DRAM of the store", "cold", (DISK,), compared="load", setting="fresh memory"), partial(self._from_disk, kept=False))
        yield _step(row("disk → DRAM of the store, memory kept", "cold", (DISK,), compared="load", setting="chunks of an earlier load"), partial(self._from_disk, kept=True))
        yield _step(row("disk → own memory", "cold", (DISK,), compared="load"), lambda: self._load(self._tensors, make_cold, main.partitions))
        yield _step(row("page cache → own memory", "warm", (MAPPED_FILE,), compared="rest"), lambda: self._load(self._tensors, make_warm, main.partitions))
        yield _step(mapped, lambda: self._load(self._mapped, make_warm, main.model.files))
        if self.gpu is not None:
            yield _step(row("DRAM → GPU", "dram", (LINK,), compared="load"), partial(self._to_gpu, self.gpu, DRAM))
            yield _step(row("disk → GPU", "cold", (DISK, LINK), compared="load"), partial(self._to_gpu, self.gpu, "disk"))

    def attachments(self) -> Iterator[Step]:
        """Into another process, of what is in memory already."""
        for subject in self.subjects:
            row = partial(Row, model=subject.name, nbytes=subject.model.nbytes, kind="attach", target_seconds=ATTACH_SECONDS)
            yield _step(row(f"DRAM → another process, {subject.name}", "dram"), partial(self._attach, subject, "cpu"))
            if self.gpu is not None:
                yield _step(row(f"GPU → another process, {subject.name}", "device"), partial(self._attach, subject, self.gpu.name))
        row = partial(Row, state="dram", model=self.main.name, nbytes=self.main.model.nbytes)
        for pages in PAGES:
            yield Step((row(f"first touch, {pages}", kind="pages"), row(f"populate_read, {pages}", kind="pages")), partial(self._touch, pages))
        if self.main.model.is_whole:
            yield Step((row("module build", kind="part"), row("DRAM → summed model in another process", limits=(USE,), compared="seconds")), self._build)

    def use_seconds(self) -> float:
        """The sum alone over the main model's bytes, in memory that is there: the limit of whatever uses them. Raises
        WorkerError."""
        files = [str(path.resolve()) for path in self.main.model.files]
        asked = {"do": "use", "path": str(self.main.checkpoint.path), "files": files, "device": "cpu"}
        found = self._client.ask("use", lambda: back_memory(int(_BACKED_SHARE * self.main.model.nbytes)), **asked)
        return self.main.check(found)["seconds"]

    # How

    def _load(self, process: Process, make: Callable[[Sequence[Path]], None], files: Sequence[Path]) -> Sample:
        def prepare() -> None:
            make(files)
            back_memory(int(_BACKED_SHARE * self.main.model.nbytes))

        self._empty()
        found = process.ask("load", prepare, do="load")
        self.main.check({"sum": found["sum"], "nbytes": found["nbytes"]})
        return {"seconds": found["seconds"], "load": found["load_seconds"], "use": found["seconds"] - found["load_seconds"]}

    def _from_disk(self, *, kept: bool) -> Sample:
        self._empty()
        if kept:
            self.store.prefetch(self.main.name)
            self._empty(keep=True)
        else:
            back_memory(int(_BACKED_SHARE * self.main.checkpoint.nbytes))
        make_cold(self.main.partitions)
        return self._bring(self.main.name)

    def _from_remote(self) -> Sample:
        self._empty()
        make_warm(self.main.partitions)
        name = f"{self.main.name}-remote"
        self.store.register(name, self.origin.url)
        try:
            back_memory(int(_BACKED_SHARE * self.main.checkpoint.nbytes))
            return self._bring(name, self.store.folder / "models")
        finally:
            _settled(partial(self.store.forget, name))

    def _bring(self, name: str, cache: Path | None = None) -> Sample:
        """To DRAM, and its use in another process. `published`: until the disk cache shows it, where it fills one."""
        start = time.perf_counter()
        self.store.prefetch(name, DRAM)
        loaded = time.perf_counter() - start
        published = {}
        if cache is not None:
            while not any(not path.name.startswith(".") for path in cache.iterdir()):
                if time.perf_counter() - start > loaded + _SETTLE_SECONDS:
                    raise StoreError(f"the disk cache did not get what was read from the remote; see whether {cache} is full")
                time.sleep(_LOOK_SECONDS)
            published["published"] = time.perf_counter() - start
        found = self._in_client("attach", self._address, self.main, name)
        return {**found, **published, "load": loaded, "seconds": loaded + found["ready"] + found["use"]}

    def _to_gpu(self, gpu: Device, origin: str) -> Sample:
        if origin not in self._copied:  # the first one makes streams and pins memory
            self._copied.add(origin)
            self._to_gpu(gpu, origin)
        self._empty()
        if origin == DRAM:
            self.store.prefetch(self.main.name, DRAM)
        else:
            make_cold(self.main.partitions)
        start = time.perf_counter()
        self.store.prefetch(self.main.name, gpu.name)
        loaded = time.perf_counter()
        with self.store.attach(self.main.name, gpu) as attachment:
            total, nbytes = sum_tensors(attachment.wait().values())
        end = time.perf_counter()
        self.main.check({"sum": total, "nbytes": nbytes})
        return {"seconds": end - start, "load": loaded - start, "use": end - loaded}

    def _attach(self, subject: Subject, device: str) -> Sample:
        self.store.prefetch(subject.name, DRAM if device == "cpu" else device)
        found = self._in_client("attach", self._address, subject, subject.name, device)
        return {**found, "seconds": found["attach"]}

    def _touch(self, pages: Pages) -> list[Sample]:
        with self._other_store(pages):
            touched = self._in_client("touch", self._other_address, self.main, self.main.name)
            populated = self._in_client("populate", self._other_address, self.main, self.main.name)
        return [{**touched, "seconds": touched["touch"]}, {**populated, "seconds": populated["populate"]}]

    @contextmanager
    def _other_store(self, pages: Pages) -> Iterator[None]:
        """A store that holds the main model in pages of that size. Raises UnsupportedError where it got others."""
        self._empty()
        room_nbytes = self.main.checkpoint.nbytes + _SPARE_NBYTES // 2
        with ExitStack() as stack:
            asked = stack.enter_context(granted(pages, room_nbytes, allow=self._huge_pages))
            store = stack.enter_context(Store(self._folder / "other", dram_nbytes=room_nbytes, huge_pages=asked))
            store.register(self.main.name, self.main.checkpoint.path)
            store.prefetch(self.main.name)
            lease = store.lend(self.main.name, DRAM)
            got = 0
            if isinstance(lease, Lease):
                with lease:
                    got = lease.image.chunks[0].page_nbytes()
            if (got >= ALIGNMENT) != (asked != "never"):
                raise UnsupportedError(f"the store asked for {pages} and got pages of {got:,} bytes")
            stack.enter_context(StoreServer(store, self._other_address))
            yield

    def _build(self) -> list[Sample]:
        self.store.prefetch(self.main.name, DRAM)
        found = self._in_client("build", self._address, self.main, self.main.name)
        parts = {name: found[name] for name in ("skeleton", "fill")}
        return [{**parts, "seconds": sum(parts.values())}, {**found, "seconds": found["ready"] + sum(parts.values()) + found["use"]}]

    def _in_client(self, function: str, address: str, subject: Subject, *arguments: object) -> Sample:
        """The parts of what a client says, its sum checked."""
        asked = {"do": "call", "function": f"{client.__name__}:{function}", "arguments": [address, *arguments]}
        return subject.check(self._client.ask(f"{function} {arguments[1:]}", lambda: None, **asked)["value"])

    def _empty(self, *, keep: bool = False) -> None:
        """Nothing in DRAM nor on the GPU; with `keep` the pool keeps the chunks, memory and all, where nobody was lent them."""
        gc.collect()
        for model in self.store.models():
            for place in model.places:
                if place.place == "disk":
                    continue
                if place.place == DRAM and not keep:
                    self.store.attach(model.name).close()  # what was lent is never used again
                _settled(partial(self.store.evict, model.name, place.place))


def _step(row: Row, run: Callable[[], Sample]) -> Step:
    return Step((row,), lambda: [run()])


def _settled(work: Callable[[], object]) -> None:
    """Does what a store refuses while something is in use: a lease ends a moment after its last tensor."""
    end = time.monotonic() + _SETTLE_SECONDS
    while True:
        try:
            work()
            return
        except StoreError:
            if time.monotonic() > end:
                raise
        time.sleep(_LOOK_SECONDS)
