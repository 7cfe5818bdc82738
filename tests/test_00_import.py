"""Importing is cheap and needs nothing optional; the wheel carries everything, and installs with no compiler."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "sllm_mini"
HEAVY = ("torch", "transformers", "cupy", "matplotlib", "numpy", "safetensors", "tokenizers", "IPython", "ipywidgets")


def fresh(code: str, *, path: Path = REPOSITORY, python: str = sys.executable, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter that finds the package at `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([python, *flags, "-c", code], capture_output=True, text=True, check=False, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sllm_mini", HEAVY),
        ("sllm_mini.errors", HEAVY),
        ("sllm_mini.wire", HEAVY),
        ("sllm_mini.device", HEAVY),
        ("sllm_mini.checkpoint", ("torch", "transformers", "cupy", "matplotlib")),
        ("sllm_mini.loading", ("torch", "transformers", "cupy", "matplotlib")),
        ("sllm_mini.inference", ("torch", "transformers", "cupy", "matplotlib")),
        ("sllm_mini.cli.main", ("torch", "transformers", "cupy", "matplotlib", "IPython")),
    ],
)
def test_importing_brings_in_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    loaded = json.loads(fresh(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))").stdout)
    assert module in loaded
    assert [name for name in absent if name in loaded] == []


BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_works_with_cupy_and_transformers_absent(tmp_path: Path) -> None:
    """Tensors are saved and loaded where neither is installed; only what needs them asks for them."""
    code = BLOCKED.format(names={"cupy", "cupy_backends", "transformers", "tokenizers", "matplotlib"}) + (
        f"""
import sllm_mini, sllm_mini.cli.main, sllm_mini.device, sllm_mini.inference, torch
saved = {{"w": torch.arange(12.0).reshape(3, 4)}}
sllm_mini.save_checkpoint(saved, {str(tmp_path / "c")!r})
loaded = sllm_mini.load_tensors({str(tmp_path / "c")!r})
if not torch.equal(loaded["w"], saved["w"]):
    raise SystemExit("other bytes came back")
if "transformers" in sys.modules or "cupy" in sys.modules:
    raise SystemExit("the block did not hold")
"""
    )
    fresh(code)


def test_every_public_name_is_where_the_root_says() -> None:
    code = "import sllm_mini; print([n for n in sllm_mini.__all__ if getattr(sllm_mini, n) is None or n not in dir(sllm_mini)])"
    assert fresh(code).stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        import sllm_mini

        _ = sllm_mini.load_modle


@pytest.mark.parametrize("package", ["sllm_mini", "sllm_mini.storage", "sllm_mini.inference", "sllm_mini.cluster"])
def test_a_lazy_package_finds_each_of_its_names_once(package: str) -> None:
    code = f"import {package} as p; print([n for n in p.__all__ if getattr(p, n) is None or n not in vars(p)])"
    assert fresh(code).stdout.strip() == "[]"


def test_importing_takes_a_few_times_as_long_as_starting_python() -> None:
    """Best of several, interleaved, in units of an empty interpreter, with room for a noisy machine (importing torch: over 50)."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        fresh(code)
        return time.perf_counter() - start

    bare, root, command = (float("inf"),) * 3
    for _ in range(5):
        bare = min(bare, seconds("pass"))
        root = min(root, seconds("import sllm_mini"))
        command = min(command, seconds("import sllm_mini.cli.main"))
    print(f"import sllm_mini: {root / bare:.2f} x an empty interpreter; sllm_mini.cli.main: {command / bare:.2f} x")
    assert root / bare < 8
    assert command / bare < 30


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    # Without a compiler on PATH: building must not need one.
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": str(Path(sys.executable).parent)})
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def files_below(folder: str) -> set[str]:
    paths = [path for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    return {path.relative_to(REPOSITORY).as_posix() for path in paths if "__pycache__" not in path.parts and path.name != ".keep"}


def test_the_wheel_carries_the_package_its_kernels_and_its_data_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    code = {name for name in files_below("sllm_mini") if name.endswith((".py", "py.typed"))}
    assert code <= names and "sllm_mini/py.typed" in names
    for folder, inside in (("csrc", "_csrc"), ("data/models", "_data/models"), ("data/survey", "_data/survey")):
        expected = {f"sllm_mini/{inside}{name.removeprefix(folder)}" for name in files_below(folder)}
        assert expected and expected <= names, folder
    assert any(name.endswith(".cu") for name in names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sllm_mini"}
    assert [name for name in names if "/test" in name or name.endswith((".pyc", ".so", ".ipynb"))] == []
    assert "License-File: LICENSE" in metadata
    assert "sllm-mini = sllm_mini.cli.main:main" in entry_points
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required and not any("cupy" in line or "nvidia" in line for line in required)


def test_an_installed_wheel_finds_its_data(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = """
import json, sllm_mini
from sllm_mini.resources import resource
print(json.dumps([sllm_mini.__file__, *(str(resource(name)) for name in ("csrc", "data/models", "data/survey"))]))
"""
    places = json.loads(fresh(code, path=target).stdout)
    assert all(Path(place).is_relative_to(target) for place in places), places
    assert list(Path(places[1]).glob("*.cu"))
    script = (target / "bin" / "sllm-mini").read_text()
    assert "sllm_mini.cli.main" in script
    help_text = fresh("import sys; sys.argv = ['sllm-mini', '--help']; from sllm_mini.cli.main import main; sys.exit(main())", path=target).stdout
    assert "generate" in help_text


# The other Python


def other_python() -> str | None:
    found = shutil.which("python3.12")
    if found and subprocess.run([found, "-c", "pass"], capture_output=True, check=False).returncode == 0:
        return found
    return None


def test_python_3_12_reads_the_package() -> None:
    python = other_python()
    if python is None:
        pytest.skip("no python3.12 on this machine")
    code = """
import ast, pathlib, sys, warnings
warnings.simplefilter("error")
for path in map(pathlib.Path, sys.argv[1:]):
    compile(path.read_text(encoding="utf-8"), str(path), "exec")
"""
    sources = sorted(map(str, PACKAGE.rglob("*.py")))
    done = subprocess.run([python, "-c", code, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fresh("import sllm_mini, sllm_mini.errors, sllm_mini.types, sllm_mini.resources; sllm_mini.resources.resource('csrc')", python=python, flags=("-S",))


def test_the_package_keeps_to_the_syntax_of_python_3_11() -> None:
    for path in PACKAGE.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 11))
