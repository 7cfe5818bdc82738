"""Assignments: a stub has nothing, the solution everything, plausible mistakes lose points, and a teacher's two commands do the rest."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from sllm_mini.lab.exercise import Exercise

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.stem: path for path in sorted((ROOT / "chapters" / "assignments").glob("a*/a*.ipynb"))}
STUB = 'raise NotImplementedError("yours to write")'
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION\n?", re.DOTALL | re.MULTILINE)


def read(name: str) -> Any:
    return nbformat.read(SOURCES[name], as_version=4)


def kind(cell: Any) -> str:
    told = cell.metadata.nbgrader
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
    told = [cell.metadata.nbgrader for cell in notebook.cells]
    assert all(each["schema_version"] == 3 and set(each) >= {"grade", "grade_id", "locked", "solution", "task"} for each in told)
    assert len({each["grade_id"] for each in told}) == len(told) == len({cell.id for cell in notebook.cells})
    assert all(each["locked"] != each["solution"] for each in told), "only what students write may they change"
    words = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert words.startswith("# Assignment ") and f"{sum(full(name)):.0f} points" in words and "**An example.**" in words
    assert all(f"`{target}`" in words for target in NAMES[name])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert all(len(line) <= 116 for line in cell.source.splitlines()), cell.id
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
