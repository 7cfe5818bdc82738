"""Compiled kernels in three states: which is found, what is trusted, and who compiles when several want to."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import Run

from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.device.fake_toolkit import FAKE_IMAGE, FakeCompiler
from sllm_mini.device.kernels import Kernels, load_kernels
from sllm_mini.device.kernels_image import KernelFolders, Recipe, build_ahead, find_image, write_image
from sllm_mini.errors import DeviceError
from sllm_mini.resources import resource

SOURCE = resource("csrc") / "sum64.cu"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "kernel.cu"
    path.write_text('extern "C" __global__ void sum64(')
    return path


@pytest.fixture
def folders(tmp_path: Path) -> KernelFolders:
    return KernelFolders((tmp_path / "ahead",), tmp_path / "cache")


def recipe_of(source: Path, *options: str, architecture: str = "sm_90") -> Recipe:
    return Recipe.of(source, options, architecture)


def cached_file(folders: KernelFolders) -> Path:
    assert folders.cache is not None
    (path,) = folders.cache.glob("*.kernel")
    return path


def test_compiled_once_then_cached_then_ahead_of_time(source: Path, folders: KernelFolders) -> None:
    compiler, recipe = FakeCompiler(), recipe_of(source)
    first, second = (find_image(recipe, folders, compiler) for _ in range(2))
    assert [first.state, second.state] == ["just in time", "cached"] and first.data == second.data
    assert {"lock", "compile", "write"} <= first.seconds.keys() and not {"lock", "compile"} & second.seconds.keys()
    (built,) = build_ahead([recipe], folders.ahead[0], compiler)
    third = find_image(recipe, folders, compiler)
    assert third.state == "ahead of time" and third.path == built[1] and third.seconds.keys() == {"prebuilt"}
    assert len(compiler.compiled) == 2 and third.notes == first.notes == ()


def test_ahead_of_time_never_asks_for_the_compiler(source: Path, folders: KernelFolders) -> None:
    class Absent(FakeCompiler):
        @property
        def version(self) -> str:
            raise DeviceError("there is no compiler")

        @version.setter
        def version(self, value: str) -> None:
            pass

    list(build_ahead([recipe_of(source)], folders.ahead[0], FakeCompiler()))
    assert find_image(recipe_of(source), folders, Absent()).state == "ahead of time"
    with pytest.raises(DeviceError, match="there is no compiler"):
        find_image(recipe_of(source, "-DOTHER"), folders, Absent())


@pytest.mark.parametrize("what", ["source", "options", "architecture", "compiler"])
def test_what_a_kernel_is_made_of_makes_it_another(source: Path, folders: KernelFolders, what: str) -> None:
    compiler = FakeCompiler()
    find_image(recipe_of(source), folders, compiler)
    if what == "source":
        source.write_text(source.read_text() + " ")
    other = FakeCompiler("fake 2.0") if what == "compiler" else compiler
    recipe = recipe_of(source, *(["-DX=1"] if what == "options" else []), architecture="sm_80" if what == "architecture" else "sm_90")
    assert find_image(recipe, folders, other).state == "just in time"
    assert find_image(recipe, folders, other).state == "cached"
    if what != "source":  # both versions live side by side
        assert find_image(recipe_of(source), folders, compiler).state == "cached"


def test_an_older_minor_architecture_serves_and_nothing_newer(source: Path, folders: KernelFolders) -> None:
    list(build_ahead([recipe_of(source, architecture="sm_86")], folders.ahead[0], FakeCompiler()))
    states = {number: find_image(recipe_of(source, architecture=f"sm_{number}"), folders, FakeCompiler()).state for number in (75, 80, 86, 89, 90)}
    assert states == {75: "just in time", 80: "just in time", 86: "ahead of time", 89: "ahead of time", 90: "just in time"}


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "longer", "header", "other"])
def test_a_damaged_file_is_replaced_and_named(source: Path, folders: KernelFolders, damage: str) -> None:
    compiler, recipe = FakeCompiler(), recipe_of(source)
    find_image(recipe, folders, compiler)
    path = cached_file(folders)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 4
    elif damage == "other":  # whole, but of another recipe: someone renamed it
        write_image(path, recipe_of(source, "-DY"), compiler.version, b"image")
        data = bytearray(path.read_bytes())
    else:
        data = bytearray({"short": data[:-1], "empty": b"", "longer": data + b"x", "header": b"{" + data}[damage])
    path.write_bytes(data)
    found = find_image(recipe, folders, compiler)
    assert found.state == "just in time" and str(path) in found.notes[0] and ("another" if damage == "other" else "damaged") in found.notes[0]
    assert find_image(recipe, folders, compiler).state == "cached"


def test_a_cache_that_cannot_be_written_is_a_note(source: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # a folder cannot be made below a file, whoever asks
    found = find_image(recipe_of(source), KernelFolders((), blocked / "cache"), FakeCompiler())
    assert found.state == "just in time" and found.path is None and "was not cached" in found.notes[-1]


def test_a_full_disk_is_a_note_and_leaves_nothing(source: Path, folders: KernelFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = find_image(recipe_of(source), folders, FakeCompiler())
    assert found.state == "just in time" and "No space left" in found.notes[0]
    assert folders.cache is not None and [path.suffix for path in folders.cache.iterdir()] == [".lock"]


def test_states_that_are_not_allowed_are_not_used(source: Path, folders: KernelFolders) -> None:
    for allowed, words in (("ahead of time", "was not built ahead of time"), ("cached", "is not in the cache")):
        with pytest.raises(DeviceError, match=words):
            find_image(recipe_of(source), folders, FakeCompiler(), allowed=[allowed])  # type: ignore[list-item]
    find_image(recipe_of(source), folders, FakeCompiler())
    assert find_image(recipe_of(source), folders, FakeCompiler(), allowed=["just in time"]).state == "just in time"


class SlowCompiler(FakeCompiler):
    """Says when it has begun and compiles until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def compile(self, source: Path, options: Sequence[str], architecture: str) -> bytes:
        self.begun.set()
        assert self.go.wait(30)
        return super().compile(source, options, architecture)


def test_one_compiles_and_the_other_waits_and_finds_it(source: Path, folders: KernelFolders) -> None:
    compiler, second, states = SlowCompiler(), FakeCompiler(), []
    threads = [threading.Thread(target=lambda which=which: states.append(find_image(recipe_of(source), folders, which).state)) for which in (compiler, second)]
    threads[0].start()
    assert compiler.begun.wait(30)
    threads[1].start()
    time.sleep(0.05)
    assert not states, "the second did not wait for the first"
    compiler.go.set()
    for thread in threads:
        thread.join(30)
    assert sorted(states) == ["cached", "just in time"] and second.compiled == []


HOLDER = """
import sys, time
from pathlib import Path
from sllm_mini.device.fake_toolkit import FakeCompiler
from sllm_mini.device.kernels_image import KernelFolders, Recipe, find_image
class Compiler(FakeCompiler):
    def compile(self, *args):
        print("begun", flush=True)
        time.sleep(600)
find_image(Recipe.of(Path(sys.argv[1]), (), "sm_90"), KernelFolders((), Path(sys.argv[2])), Compiler())
"""


def test_a_crash_under_the_lock_holds_nobody_up(source: Path, folders: KernelFolders) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(source), str(folders.cache)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "begun\n"
    states: list[str] = []
    waiting = threading.Thread(target=lambda: states.append(find_image(recipe_of(source), folders, FakeCompiler()).state))
    waiting.start()
    time.sleep(0.05)
    assert not states, "the lock of the other process was not minded"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    waiting.join(30)
    assert states == ["just in time"] and find_image(recipe_of(source), folders, FakeCompiler()).state == "cached"


def test_kernels_say_how_they_were_come_by(folders: KernelFolders) -> None:
    device = RecordingRuntime().device()
    for state in ("just in time", "cached"):
        kernels = Kernels(device, SOURCE, folders=folders)
        assert kernels.start is None
        assert kernels["sum64"] is kernels["sum64"]
        assert kernels.start is not None and kernels.start.state == state and "load" in kernels.start.seconds and kernels.start.total_seconds > 0
    assert device.toolkit.compiler.compiled == [("sum64.cu", (), "sm_90")]  # type: ignore[attr-defined]


def test_options_make_kernels_of_their_own() -> None:
    device = RecordingRuntime().device()
    plain, other = load_kernels(device, "sum64.cu"), load_kernels(device, "sum64.cu", ("-DX=1",))
    assert plain is load_kernels(device, "sum64.cu") and other is load_kernels(device, "sum64.cu", ("-DX=1",)) and plain is not other


def test_an_image_that_the_driver_refuses_is_passed_over(folders: KernelFolders) -> None:
    """Built ahead, or cached, by a toolkit that is newer than the driver."""
    device = RecordingRuntime().device()
    recipe = Recipe.of(SOURCE, (), "sm_90")
    assert folders.cache is not None
    write_image(folders.ahead[0] / f"{recipe.name}.kernel", recipe, "CUDA 99", b"not for this driver")
    kernels = Kernels(device, SOURCE, folders=folders)
    kernels["sum64"]
    assert kernels.start is not None and kernels.start.state == "just in time" and "cannot run this" in kernels.start.notes[0]
    with pytest.raises(DeviceError, match="cannot run this compiled kernel"):
        Kernels(device, SOURCE, folders=folders, allowed=["ahead of time"])["sum64"]
    assert cached_file(folders).read_bytes().endswith(FAKE_IMAGE + b"\n" + SOURCE.read_bytes())


def test_a_source_that_does_not_compile_leaves_the_lock_free(source: Path, folders: KernelFolders) -> None:
    compiler = FakeCompiler()
    compiler.refusal = "kernel.cu(1): error: no"
    with pytest.raises(DeviceError, match="error: no"):
        find_image(recipe_of(source), folders, compiler)
    assert folders.cache is not None
    (lock,) = folders.cache.glob("*.lock")
    with lock.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_cache_whose_file_system_has_no_locks_is_a_note(source: Path, folders: KernelFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    found = find_image(recipe_of(source), folders, FakeCompiler())
    assert found.state == "just in time" and any("No locks available" in note for note in found.notes)
    assert folders.cache is not None and not list(folders.cache.glob("*.kernel"))


def test_the_folders_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SLLM_MINI_KERNELS", raising=False)
    assert KernelFolders.of_user() == KernelFolders((resource("csrc") / "built",), tmp_path / "sllm_mini" / "kernels")
    monkeypatch.setenv("SLLM_MINI_KERNELS", str(tmp_path / "here"))
    assert KernelFolders.of_user().cache == tmp_path / "here"


def test_nvrtc_goes_through_all_three_states(folders: KernelFolders) -> None:
    """The real compiler, which needs no GPU to compile for one."""
    pytest.importorskip("cupy", reason="cupy is not installed; it brings the binding to NVRTC")
    from sllm_mini.device.cuda import NvrtcCompiler

    compiler = NvrtcCompiler()
    try:
        assert compiler.version.startswith("NVRTC ")
    except DeviceError as error:
        pytest.skip(str(error))
    recipe = Recipe.of(resource("csrc") / "decode_attention.cu", ("-DHEAD_DIM=64", "-DELEMENT=1", "-DQUERIES=2", "-DCHUNK=128"), "sm_90")
    first, second = (find_image(recipe, folders, compiler) for _ in range(2))
    list(build_ahead([recipe], folders.ahead[0], compiler))
    third = find_image(recipe, folders, compiler)
    assert [one.state for one in (first, second, third)] == ["just in time", "cached", "ahead of time"]
    assert first.data[:4] == b"\x7fELF" and b"decode_attention_merge" in first.data and first.data == second.data == third.data
    assert second.total_seconds < first.total_seconds / 3 > third.total_seconds


def test_an_architecture_that_is_none_is_the_options_fault(run: Run, tmp_path: Path) -> None:
    for odd in ("foo", "90", "sm_9", "compute_90", "sm_90 "):
        ended = run("kernels", "--arch", odd, "--out", tmp_path)
        assert ended.code == 2 and f"--arch {odd}" in ended.err and "such as sm_90" in ended.err and ".cu" not in ended.err
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs cupy, which knows what NVRTC can compile for")
    ended = run("kernels", "--arch", "sm_12", "--out", tmp_path, "--json")
    assert ended.code == 1 and "--arch sm_12: NVRTC" in ended.error["message"] and "sm_90" in ended.error["message"] and not list(tmp_path.iterdir())
    assert "csrc/built" in run("kernels", "--help").out
