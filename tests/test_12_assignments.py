"""Assignments: a stub has nothing, the solution everything, plausible mistakes lose points, and a teacher's two commands do the rest."""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest

from sllm_mini.lab.classroom import main
from sllm_mini.lab.exercise import Exercise

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.stem: path for path in sorted((ROOT / "chapters" / "assignments").glob("a*/a*.ipynb"))}
STUB = 'raise NotImplementedError("yours to write")'
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION\n?", re.DOTALL | re.MULTILINE)


def read(name: str) -> Any:
    return nbformat.read(SOURCES[name], as_version=4)


def kind(cell: Any) -> str:
    told = cell.metadata.get("nbgrader")
    if told is None:
        return "text"
    return "solution" if told["solution"] else "checks" if told["grade"] else "read"


def code_cells(name: str, *kinds: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == "code" and kind(cell) in kinds]


def stub(source: str) -> str:
    return SOLUTION.sub(lambda found: f"{found[1]}{STUB}\n", source)


def run(source: str, scope: dict[str, Any]) -> Any:
    """Runs a cell; the value of its last expression, as a notebook has it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), scope)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), scope)


def in_process(self: Exercise, function: Any, checks: dict[Any, float]) -> float:
    """As `Exercise.grade`, for functions that do no harm: without a child, and a hundred times as fast."""
    given = 0.0
    for check, worth in checks.items():
        with contextlib.suppress(AssertionError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
            check(function)
            given += worth
    return given


def points(name: str, *functions: str, solved: bool = True) -> tuple[float, ...]:
    """What each checking cell gives, with the solution (or the stub) and then `functions` defined."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in code_cells(name, "solution"):
            run(cell.source if solved else stub(cell.source), scope)
        for function in functions:
            exec(function, scope)
        return tuple(run(cell.source, scope) for cell in code_cells(name, "checks"))


def full(name: str) -> tuple[float, ...]:
    return tuple(float(cell.metadata.nbgrader["points"]) for cell in code_cells(name, "checks"))


NAMES = {
    "a01_plan_layout": ("sllm_mini.checkpoint.layout:plan_layout",),
    "a02_next_chunk": ("sllm_mini.loading.pipeline:next_chunk",),
    "a03_choose_victims": ("sllm_mini.eviction:choose_victims",),
    "a04_next_runnable_layer": ("sllm_mini.inference.overlap:next_runnable_layer",),
    "a07_should_hand_over": ("sllm_mini.inference.migration:should_hand_over",),
    "a08_where_to_start": ("sllm_mini.control.estimate:load_seconds", "sllm_mini.control.placement:choose_node"),
    "a09_layer_ttl": ("sllm_mini.control.keepalive:layer_ttl",),
    "a10_binomial_step": ("sllm_mini.control.multicast:binomial_step",),
}
"""The functions that students write, as design and chapters name them."""


def edited(name: str, old: str, new: str, count: int = 1) -> str:
    """The solution with one mistake in it."""
    source = "\n".join(cell.source for cell in code_cells(name, "solution"))
    assert source.count(old) == count, f"{name}: {old!r} is there {source.count(old)} times"
    return source.replace(old, new)


WRONG = {
    "a01_plan_layout": [
        ("align_up(used[current], alignment)", "used[current]"),  # no alignment
        ("offset + storage.nbytes > partition_nbytes", "offset + storage.nbytes >= partition_nbytes"),
        ("offset + storage.nbytes > partition_nbytes", "used[current] + storage.nbytes > partition_nbytes"),  # the gap forgotten
        ("used[current] > 0 and ", ""),  # an empty partition for every giant
        ("open_partition.get(storage.device)", "len(used) - 1 if used else None"),  # one open partition for all devices
        ("tuple(align_up(nbytes, 4096) for nbytes in used)", "tuple(used)"),
        ("if partition_nbytes <= 0:", "if False:"),
    ],
    "a02_next_chunk": [
        ("if free_slots[chunk.device] > 0:", "if True:"),  # reads what has nowhere to go
        ("            return position\n", "            return chunk\n"),
        ("    return None\n", "    return 0\n"),
        ("enumerate(pending)", "reversed(list(enumerate(pending)))"),
        ("enumerate(pending)", "sorted(enumerate(pending), key=lambda pair: (-free_slots[pair[1].device], pair[0]))"),  # the emptiest device
        ("            return position\n", "            free_slots[chunk.device] -= 1\n            return position\n"),
        ("enumerate(pending)", "list(enumerate(pending))"),  # copies all of a long list for each chunk
    ],
    "a03_choose_victims": [
        ("return victims if missing <= 0 else []", "return victims"),  # throws out what helps nobody
        ("(policy.priority(r), r.last_used, r.name)", "(policy.priority(r), r.name)"),
        ("(policy.priority(r), r.last_used, r.name)", "(r.last_used, r.name)"),  # always LRU
        ("keep = max(floor, up(r.nbytes - r.evictable_nbytes))", "keep = max(floor, r.nbytes - r.evictable_nbytes)"),
        ("floors = (0,) if prefix is None else (max(granule_nbytes, up(prefix)), granule_nbytes, 0)", "floors = (0,)"),
        ("            if missing <= 0:\n                break\n", ""),  # all that there is
    ],
    "a04_next_runnable_layer": [
        ("return executed if executed < len(ready) and ready[executed] else None", "return executed if ready[executed] else None"),
        ("return executed if executed < len(ready) and ready[executed] else None", "return next((at for at in range(executed, len(ready)) if ready[at]), None)"),
        ("return executed if executed < len(ready) and ready[executed] else None", "return executed if executed < len(ready) and all(ready) else None"),
        ("return executed if executed < len(ready) and ready[executed] else None", "return executed if executed < len(ready) else None"),
        ("return executed if executed < len(ready) and ready[executed] else None", "return executed < len(ready) and ready[executed] and executed or None"),
    ],
    "a07_should_hand_over": [
        ("gap_tokens <= target_gap_tokens or rounds_left <= 0", "gap_tokens <= target_gap_tokens"),
        ("gap_tokens <= target_gap_tokens or rounds_left <= 0", "gap_tokens < target_gap_tokens or rounds_left <= 0"),
        ("gap_tokens >= previous_gap_tokens", "gap_tokens > previous_gap_tokens"),
        ("previous_gap_tokens is not None and gap_tokens >= previous_gap_tokens", "False"),  # as ServerlessLLM's code
        ("rounds_left <= 0", "rounds_left <= 1"),
        ("if gap_tokens <= target_gap_tokens or rounds_left <= 0:", "if True:"),  # stop and copy
    ],
    "a08_where_to_start": [
        ("queue_seconds + nbytes / bytes_per_second", "nbytes / bytes_per_second"),
        ("queue_seconds + nbytes / bytes_per_second", "max(queue_seconds, nbytes / bytes_per_second)"),
        ("if not (bytes_per_second > 0 and queue_seconds >= 0 and nbytes >= 0):", "if bytes_per_second <= 0 or queue_seconds < 0 or nbytes < 0:"),  # lets a NaN in
        ("round(one.seconds, 3)", "one.seconds"),
        ("one.moved, len(one.plan.give_way)", "len(one.plan.give_way), one.moved"),
        (", one.plan.node\n", "\n"),
        ("min(candidates, key=order, default=None)", "min(candidates, key=order)"),
        ("min(candidates, key=order, default=None)", "min(candidates, key=order) if len(candidates) else None"),
    ],
    "a09_layer_ttl": [
        ("return min(max(alive_seconds, floor_seconds), beta)", "return max(min(alive_seconds, beta), floor_seconds)"),  # the floor always first
        ("if floor_first and alive_seconds < floor_seconds:", "if False:"),
        ("alive_seconds < floor_seconds", "alive_seconds <= floor_seconds"),
        ("return min(max(alive_seconds, floor_seconds), beta)", "return alive_seconds"),
        ("max(alive_seconds, floor_seconds)", "max(alive_seconds, 60.0)"),
        ("if floor_first and alive_seconds < floor_seconds:", "if floor_first:"),
    ],
    "a10_binomial_step": [
        ("max(lacking)", "min(lacking)"),
        ("tick % dimensions", "(tick - 1) % dimensions"),
        ("{min(tick, blocks) - 1}", "held[0]"),  # the source sends whatever is missing
        ("offered - held[target]", "offered"),  # sends what is there already
        ("{min(tick, blocks) - 1}", "{tick - 1}"),
        ("if nodes < 1 or nodes & nodes - 1:", "if nodes < 1:"),
        ("range(nodes if dimensions else 0)", "range(nodes)"),
    ],
}  # fmt: skip
"""For each assignment solutions with one plausible mistake."""


def wrong(name: str) -> list[str]:
    return [edited(name, old, new) for old, new in WRONG[name]]


def test_every_function_that_students_write_has_an_assignment() -> None:
    assert SOURCES.keys() == NAMES.keys() == WRONG.keys() and len(SOURCES) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_has_nothing_and_the_solution_full_marks(name: str) -> None:
    assert points(name, solved=False) == (0.0,) * len(full(name))
    assert points(name) == full(name)


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, cases in WRONG.items() for number in range(len(cases))])
def test_a_plausible_mistake_is_found(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exercise, "grade", in_process)
    assert len(WRONG[name]) >= 3 and points(name) == full(name)
    assert 0 <= sum(points(name, wrong(name)[number])) < sum(full(name))


@pytest.mark.parametrize("name", NAMES)
def test_cheating_by_import_has_nothing(name: str) -> None:
    """The package's own under the student's name, and wrapped; `test_12_exercise` has the other ways."""
    for way in ("from {0} import {1}", "from {0} import {1} as own\ndef {1}(*a, **k):\n    return own(*a, **k)"):
        code = [way.format(*target.split(":")) for target in NAMES[name]]
        assert sum(points(name, *code)) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_function_that_ends_its_process_has_nothing_and_ends_nothing_else(name: str) -> None:
    code = [f"def {target.partition(':')[2]}(*a, **k):\n    import os\n    os._exit(0)" for target in NAMES[name]]
    assert sum(points(name, *code)) == 0.0


@pytest.mark.parametrize("name", ["a03_choose_victims", "a08_where_to_start", "a09_layer_ttl", "a10_binomial_step"])
def test_the_last_cell_draws_what_the_whole_package_does(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those whose clusters are simulated; the others compute with torch, in a kernel of their own (below)."""
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    *_, last = code_cells(name, "read")
    for solved in (True, False):
        scope: dict[str, Any] = {}
        for cell in code_cells(name, "solution"):
            run(cell.source if solved else stub(cell.source), scope)
        run(last.source, scope)
        assert capsys.readouterr().out.count("does not get through") == (0 if solved else len(NAMES[name]))
        assert len(shown) == len(NAMES[name])  # a stub draws nothing more
    assert all("yours" in each.alt_text for each in shown) or name == "a10_binomial_step"


# The notebooks themselves


@pytest.mark.parametrize("name", NAMES)
def test_a_source_is_what_nbgrader_and_a_reader_expect(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    told = [cell.metadata.nbgrader for cell in notebook.cells if cell.cell_type == "code"]
    assert all(each["schema_version"] == 3 and set(each) >= {"grade", "grade_id", "locked", "solution", "task"} for each in told)
    assert len({each["grade_id"] for each in told}) == len(told) and len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert all(each["locked"] != each["solution"] for each in told), "only what students write may they change"
    words = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert words.startswith("# Assignment ") and f"{sum(full(name)):.0f} points" in words and "**An example.**" in words
    assert all(f"`{target}`" in words for target in NAMES[name])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert all(len(line) <= 116 for line in cell.source.splitlines()), cell.id
    kinds = [kind(cell) for cell in notebook.cells if kind(cell) != "text"]
    assert all(before in ("solution", "checks") for before, own in pairwise(kinds) if own == "checks"), "or nbgrader cannot put a deleted one back"
    hidden = [cell for cell in code_cells(name, "checks") if "### BEGIN HIDDEN TESTS" in cell.source]
    assert hidden and all(cell.source.rstrip().endswith("### END HIDDEN TESTS") for cell in hidden)
    assert len(hidden) < len(code_cells(name, "checks"))


@pytest.mark.parametrize("name", NAMES)
def test_hidden_checks_stand_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student's cell may define what it likes, or be emptied: the cells that grade bring what they need."""
    monkeypatch.setattr(Exercise, "grade", in_process)
    (solution,) = {"\n".join(cell.source for cell in code_cells(name, "solution"))}
    for cell in code_cells(name, "checks"):
        scope: dict[str, Any] = {}
        exec(solution, scope)
        assert run(cell.source, scope) == float(cell.metadata.nbgrader["points"])


def test_the_teachers_guide_says_of_each_what_it_says_itself() -> None:
    rows = re.findall(r"^\| (a\d\d) \| (\d\d) \| (.+?): .+? \| (\d+) \| (\d+) \|", (ROOT / "book" / "teaching.md").read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == [name[:3] for name in NAMES]
    for name, (_, chapter, functions, points, minutes) in zip(NAMES, rows, strict=True):
        words = "".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
        assert f"*Goes with chapter {chapter}. {points} points, about {minutes} minutes, any machine without a GPU.*" in words
        assert all(f"`{function}(" in words for function in re.findall(r"`(\w+)`", functions)) and "`" in functions


# The teacher's path: nbgrader, as a teacher calls it

needs_nbgrader = pytest.mark.skipif(not (ROOT / ".venv" / "teaching" / ".done").is_file(), reason="nbgrader is not there: make test and make release install it")


def make(target: str, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    command = ["make", "--silent", target, *(f"{name}={value}" for name, value in variables.items())]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def course(tmp_path: Path) -> Path:
    folder = tmp_path / "course"
    folder.mkdir()
    shutil.copy(ROOT / "nbgrader_config.py", folder)
    shutil.copytree(ROOT / "chapters" / "assignments", folder / "chapters" / "assignments", ignore=shutil.ignore_patterns(".*"))
    return folder


def released(course: Path, name: str) -> Any:
    return nbformat.read(course / "out" / "classroom" / "release" / name / f"{name}.ipynb", as_version=4)


def hand_in(folder: Path, student: str, notebook: Any, name: str) -> None:
    place = folder / student / name
    place.mkdir(parents=True)
    nbformat.write(notebook, place / f"{name}.ipynb")


def answered(course: Path, name: str, *answers: str) -> Any:
    """The student version with the solutions' cells filled in."""
    notebook = released(course, name)
    cells = [cell for cell in notebook.cells if kind(cell) == "solution"]
    for cell, answer in zip(cells, answers, strict=True):
        cell.source = answer
    return notebook


def solutions(name: str) -> list[str]:
    return [cell.source for cell in code_cells(name, "solution")]


def grades(course: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (course / "out" / "classroom" / "grades.csv").open(newline="", encoding="utf-8") as file:
        return {(row["student"], row["assignment"]): row for row in csv.DictReader(file)}


def tampered(course: Path, name: str) -> Any:
    """A mistake in the function, every check edited away, one cell deleted, one worth a hundred points."""
    notebook = answered(course, name, edited(name, "max(lacking)", "min(lacking)"))
    seen, hidden = (cell for cell in notebook.cells if cell.cell_type == "code" and kind(cell) == "checks")
    seen.source, seen.metadata.nbgrader["points"] = "100.0", 100
    notebook.cells.remove(hidden)
    return notebook


@needs_nbgrader
def test_a_teacher_releases_and_grades_with_two_commands(course: Path, tmp_path: Path) -> None:
    name = "a10_binomial_step"
    done = make("release", COURSE=course, ASSIGNMENTS="a10")
    assert done.returncode == 0 and "released:" in done.stdout, done.stderr
    student = "\n".join(cell.source for cell in released(course, name).cells)
    assert "SOLUTION" not in student and "HIDDEN" not in student and "max(lacking)" not in student and "as_short_as_can_be" not in student
    assert "raise NotImplementedError(" in student and "# The checks that are not shown stand here" in student

    (solution,) = solutions(name)
    folder = tmp_path / "handed in"
    hand_in(folder, "ada", answered(course, name, solution), name)
    hand_in(folder, "dan", answered(course, name, "import os\nos._exit(1)"), name)
    hand_in(folder, "eve", tampered(course, name), name)
    done = make("grade", COURSE=course, SUBMISSIONS=folder)
    assert done.returncode == 0, done.stderr
    found = grades(course)
    assert {student: float(row["points"]) for (student, _), row in found.items()} == {"ada": 10.0, "dan": 0.0, "eve": 9.0}
    assert {row["max_points"] for row in found.values()} == {"10.0"}
    assert "kernel died" in found["dan", name]["problem"] and not any(row["problem"] for (student, _), row in found.items() if student != "dan")
    pages = {student: (course / "out" / "classroom" / "feedback" / student / name / f"{name}.html").read_text() for student in ("ada", "dan", "eve")}
    assert "kernel died" in pages["dan"]
    assert "to be mended" in pages["eve"] and "4 goes; yours" in pages["eve"] and "to be mended" not in pages["ada"] and "image/png" in pages["ada"]


@needs_nbgrader
@pytest.mark.slow
def test_every_assignment_goes_the_teachers_way(course: Path, tmp_path: Path) -> None:
    """The solution has full marks and its last cell draws, a stub and the package's own nothing; a cell that never ends or fills memory costs its own."""
    config = course / "nbgrader_config.py"
    config.write_text(config.read_text() + "c.Execute.timeout = 60\n")
    assert make("release", COURSE=course).returncode == 0
    folder = tmp_path / "handed in"
    for name in NAMES:
        hand_in(folder, "ada", answered(course, name, *solutions(name)), name)
        hand_in(folder, "ben", released(course, name), name)
    name = "a04_next_runnable_layer"
    hand_in(folder, "cleo", answered(course, name, "from sllm_mini.inference import next_runnable_layer"), name)
    hand_in(folder, "finn", answered(course, name, "while True:\n    pass"), name)
    hand_in(folder, "gil", answered(course, name, "kept = []\nwhile True:\n    kept.append(bytearray(1 << 26))"), name)
    done = make("grade", COURSE=course, SUBMISSIONS=folder)
    assert done.returncode == 0, done.stderr
    found = grades(course)
    for name in NAMES:
        assert float(found["ada", name]["points"]) == float(found["ada", name]["max_points"]) == sum(full(name))
        assert float(found["ben", name]["points"]) == 0.0
        graded = nbformat.read(course / "out" / "classroom" / "autograded" / "ada" / name / f"{name}.ipynb", as_version=4)
        outputs = [output for cell in graded.cells if cell.cell_type == "code" for output in cell.outputs]
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs), name
        assert any("image/png" in output.get("data", {}) for output in graded.cells[-1].outputs), name
    name = "a04_next_runnable_layer"
    assert {float(found[student, name]["points"]) for student in ("cleo", "finn", "gil")} == {0.0}
    page = (course / "out" / "classroom" / "feedback" / "cleo" / name / f"{name}.html").read_text()
    assert "own next_runnable_layer, which is blank here" in page


@needs_nbgrader
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SUBMISSIONS": "nowhere"}, "nowhere is no folder"),
        ({"SUBMISSIONS": "tests", "ASSIGNMENTS": "a99"}, "no assignment a99"),
        ({"SUBMISSIONS": "tests", "COURSE": "tests"}, "tests has no nbgrader_config.py"),
        ({"SUBMISSIONS": "tests", "ASSIGNMENTS": "a04"}, "nothing to grade in tests"),
    ],
)
def test_what_cannot_be_graded_is_said_in_a_sentence(variables: dict[str, str], said: str, tmp_path: Path, course: Path) -> None:
    done = make("grade", **{"COURSE": course, **variables})
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_without_nbgrader_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "nbgrader", None)
    assert main(["release"]) == 1
    assert "make release" in capsys.readouterr().err
