"""The floors of the house: what each room may import, and the habits that every module keeps.

The table below is the one place where the floors are declared. Every `import` counts: inside functions, under
TYPE_CHECKING, and in `importlib.import_module("sllm_mini…")`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "sllm_mini"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

FLOORS = {
    0: ("errors", "types", "resources", "lazy", "wire", "device"),
    1: ("checkpoint", "eviction"),
    2: ("loading",),
    3: ("storage", "inference", "control"),
    4: ("cluster",),
    5: ("serving",),
    6: ("cli", "lab"),
}
"""A room imports only itself and the floors below it."""

BESIDE = {
    "resources": {"errors"},
    "wire": {"errors", "types"},
    "device": {"errors", "types", "resources"},
    "cli": {"lab"},
}
"""What a room may import from its own floor as well."""

ONLY = {"control": {"errors", "types", "eviction"}, "eviction": {"errors", "types"}}
"""Pure rooms: all that they may import from the house, however low their floor lets them reach."""

IMPURE = {"asyncio", "multiprocessing", "os", "pathlib", "random", "secrets", "socket", "subprocess", "tempfile", "threading", "time", "torch"}
"""What no pure room imports: clocks, files, threads, chance and torch come in as arguments."""

FIRST_PARTY_ONLY = {"cupy": "device/cuda.py", "cupy_backends": "device/cuda.py", "ray": "cluster/ray.py"}
"""Libraries that one file alone imports."""

MAX_LINES = 350


@dataclass(frozen=True)
class Import:
    target: str
    line: int


@dataclass(frozen=True)
class Module:
    name: str
    file: str
    tree: ast.Module
    nlines: int

    @property
    def room(self) -> str:
        """The first name below the package; empty for the package's own `__init__`."""
        return self.name.split(".")[1] if "." in self.name else ""


def read_house(root: Path) -> dict[str, Module]:
    house = {}
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        name = ".".join((PACKAGE, *Path(file).with_suffix("").parts)).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        house[name] = Module(name, file, ast.parse(text, filename=str(path)), len(text.splitlines()))
    return house


def calls(node: ast.AST, *names: str) -> list[ast.expr]:
    """The arguments of a call of one of these, by its last name: `import_module` finds `importlib.import_module(…)`."""
    return node.args if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in names else []


def imports(module: Module, house: dict[str, Module]) -> Iterator[Import]:
    """Every module that `module` names, in full; of `from x import y` it is `x.y` where that is a module of the house."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.name.split(".") + ([""] if module.file.endswith("__init__.py") else [])
                base = ".".join(filter(None, [*package[: -node.level], node.module or ""]))
            for alias in node.names:
                if (base, alias.name) == (PACKAGE, "__version__"):
                    continue  # the one thing that the root itself defines
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in house else base, node.lineno)
        else:
            for arg in calls(node, "import_module", "__import__")[:1]:
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str):
                    yield Import(arg.value, arg.lineno)


def floor_of(room: str) -> int | None:
    return next((floor for floor, rooms in FLOORS.items() if room in rooms), None)


def broken_floors(house: dict[str, Module]) -> list[str]:
    problems = []
    for module in house.values():
        floor = floor_of(module.room)
        if module.room and floor is None:
            problems.append(f"{module.file}: the room {module.room!r} is on no floor; declare it in FLOORS")
            continue
        for found in imports(module, house):
            place = f"{module.file}:{found.line}"
            top, _, rest = found.target.partition(".")
            if module.room in ONLY and top in IMPURE:
                problems.append(f"{place} imports {top}, and {module.room} is pure")
            if top in FIRST_PARTY_ONLY and module.file != FIRST_PARTY_ONLY[top]:
                problems.append(f"{place} imports {top}, which only {FIRST_PARTY_ONLY[top]} may")
            if top != PACKAGE or not module.room:
                continue
            room = rest.split(".")[0]
            if not room:
                problems.append(f"{place} imports from the package root; name the module that defines it")
                continue
            target = floor_of(room)
            beside = room == module.room or room in BESIDE.get(module.room, ())
            if module.room in ONLY and room not in ONLY[module.room] | {module.room}:
                problems.append(f"{place} imports {found.target}, and {module.room} may import only {', '.join(sorted(ONLY[module.room]))}")
            elif target is None:
                problems.append(f"{place} imports {found.target}, which is on no floor")
            elif floor is not None and (target > floor or (target == floor and not beside)):
                problems.append(f"{place} is on floor {floor} and imports {found.target} on floor {target}")
    return problems


def cycles(house: dict[str, Module]) -> list[str]:
    """Import cycles, each once, as `a -> b -> a`."""
    edges = {name: sorted({i.target for i in imports(module, house) if i.target in house} - {name}) for name, module in house.items()}
    done: set[str] = set()
    found = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in edges[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def broken_habits(house: dict[str, Module]) -> list[str]:
    problems = []
    for module in house.values():
        if not ast.get_docstring(module.tree) and module.nlines:
            problems.append(f"{module.file} has no docstring")
        if module.nlines > MAX_LINES:
            problems.append(f"{module.file} has {module.nlines} lines, more than {MAX_LINES}; it holds more than one noun")
        for node in ast.walk(module.tree):
            place = f"{module.file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Assert):
                problems.append(f"{place} asserts; python -O drops it, so raise a typed error")
            if isinstance(node, ast.ExceptHandler):
                caught = {""} if node.type is None else {ast.unparse(name) for name in (node.type.elts if isinstance(node.type, ast.Tuple) else [node.type])}
                silent = all(isinstance(s, (ast.Pass, ast.Continue)) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in node.body)
                if "" in caught:
                    problems.append(f"{place} has a bare except; name what it expects")
                elif silent and caught & {"Exception", "BaseException", "SllmError"}:
                    problems.append(f"{place} swallows {', '.join(sorted(caught))}")
            if {ast.unparse(arg) for arg in calls(node, "suppress")} & {"Exception", "BaseException", "SllmError"}:
                problems.append(f"{place} swallows everything")
    return problems


@pytest.fixture(scope="module")
def house() -> dict[str, Module]:
    return read_house(ROOT)


def test_each_room_imports_only_what_lies_below_it(house: dict[str, Module]) -> None:
    assert broken_floors(house) == []


def test_no_import_goes_in_a_circle(house: dict[str, Module]) -> None:
    assert cycles(house) == []


def test_each_module_keeps_the_habits(house: dict[str, Module]) -> None:
    assert broken_habits(house) == []


def test_the_map_that_chapters_draw_shows_these_floors() -> None:
    from sllm_mini.lab.house import FLOORS as DRAWN

    drawn = {number: {room.name for room in floor.rooms} for number, floor in enumerate(DRAWN)}
    assert drawn == {floor: set(rooms) - {"resources", "lazy"} for floor, rooms in FLOORS.items()}  # helpers of a few lines have no room


def test_the_rooms_of_the_first_part_are_read(house: dict[str, Module]) -> None:
    """The tests above would pass on an empty folder."""
    assert {"errors", "types", "resources", "lazy", "wire", "device", "checkpoint", "loading", "inference", "cli", "lab"} <= {m.room for m in house.values()}
    assert sum(1 for module in house.values() for _ in imports(module, house)) > 200


# The checks see what they should


GOOD = '"""A docstring."""\n'


@pytest.mark.parametrize(
    ("file", "code", "problem"),
    [
        ("loading/a.py", "from sllm_mini.storage import x", "floor 2 and imports sllm_mini.storage on floor 3"),
        ("loading/a.py", "def f():\n    import sllm_mini.cli.main", "a.py:3 is on floor 2"),
        ("loading/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sllm_mini.lab import x", "floor 6"),
        ("loading/a.py", "import importlib\nimportlib.import_module('sllm_mini.serving')", "floor 5"),
        ("loading/a.py", "from ..storage import x", "sllm_mini.storage"),
        ("loading/__init__.py", "from ..storage import x", "sllm_mini.storage"),
        ("storage/a.py", "from sllm_mini.inference import x", "floor 3 and imports sllm_mini.inference on floor 3"),
        ("checkpoint/a.py", "from sllm_mini.eviction import x", "on floor 1"),
        ("wire/a.py", "import sllm_mini.device.cpu", "on floor 0"),
        ("errors.py", "from sllm_mini.types import x", "on floor 0"),
        ("lab/a.py", "from sllm_mini.cli.main import main", "floor 6"),
        ("loading/a.py", "from sllm_mini import load_model", "package root"),
        ("loading/a.py", "import sllm_mini", "package root"),
        ("loading/a.py", "from .. import load_model", "package root"),
        ("attic/a.py", "", "'attic' is on no floor"),
        ("loading/a.py", "import sllm_mini.attic", "on no floor"),
        ("control/a.py", "from sllm_mini.loading import x", "control may import only"),
        ("control/a.py", "from sllm_mini.device.base import x", "control may import only"),
        ("control/a.py", "from time import monotonic", "imports time, and control is pure"),
        ("eviction.py", "import torch.nn", "imports torch, and eviction is pure"),
        ("loading/a.py", "def f():\n    import cupy.cuda", "which only device/cuda.py may"),
        ("device/cpu.py", "from cupy_backends.cuda import x", "which only device/cuda.py may"),
    ],
)
def test_a_broken_floor_is_seen(tmp_path: Path, file: str, code: str, problem: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(GOOD + code)
    (found,) = broken_floors(read_house(tmp_path))
    assert problem in found


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    for file, code in {
        "__init__.py": "def f():\n    import sllm_mini.lab",
        "errors.py": "",
        "eviction.py": "from sllm_mini.types import Tier",
        "device/cuda.py": "import cupy\nfrom sllm_mini.errors import DeviceError\nfrom sllm_mini.device import base\nfrom . import base",
        "device/base.py": "",
        "control/__init__.py": "from sllm_mini.eviction import choose_victims\nfrom sllm_mini.control.placement import choose_node",
        "control/placement.py": "import heapq",
        "cli/main.py": "import time, sllm_mini.lab.tour",
        "lab/tour.py": "from sllm_mini.loading import start_load",
        "loading/__init__.py": "from sllm_mini.checkpoint import open_checkpoint",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(GOOD + code)
    house = read_house(tmp_path)
    assert broken_floors(house) == cycles(house) == broken_habits(house) == []


def test_a_cycle_is_seen_even_inside_functions(tmp_path: Path) -> None:
    (tmp_path / "loading").mkdir()
    (tmp_path / "loading/__init__.py").write_text("from sllm_mini.loading.a import x")
    (tmp_path / "loading/a.py").write_text("from sllm_mini.loading import b")
    (tmp_path / "loading/b.py").write_text("def f():\n    from .c import x")
    (tmp_path / "loading/c.py").write_text("import sllm_mini.loading.a")
    assert cycles(read_house(tmp_path)) == ["sllm_mini.loading.a -> sllm_mini.loading.b -> sllm_mini.loading.c -> sllm_mini.loading.a"]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os", "no docstring"),
        (GOOD + "\n" * MAX_LINES, "more than 350"),
        (GOOD + "def f(n):\n    assert n > 0", "asserts"),
        (GOOD + "try:\n    f()\nexcept:\n    g()", "bare except"),
        (GOOD + "try:\n    f()\nexcept Exception:\n    pass", "swallows Exception"),
        (GOOD + "try:\n    f()\nexcept (OSError, BaseException):\n    'why not'", "swallows BaseException, OSError"),
        (GOOD + "import contextlib\nwith contextlib.suppress(Exception):\n    f()", "swallows everything"),
    ],
)
def test_a_broken_habit_is_seen(tmp_path: Path, code: str, problem: str) -> None:
    (tmp_path / "types.py").write_text(code)
    (found,) = broken_habits(read_house(tmp_path))
    assert problem in found
