"""A teacher's two commands over nbgrader: student versions of the assignments, and a folder of submissions graded.

    python -m sllm_mini.lab.classroom release
    python -m sllm_mini.lab.classroom grade SUBMISSIONS     # SUBMISSIONS/<student>/<assignment>/<assignment>.ipynb

nbgrader does the work, by `nbgrader_config.py` of the folder it is called in; this calls it assignment by assignment and student by
student, so that one submission that cannot be graded costs nobody else anything, and says so in one line each. A submission
whose kernel died has 0 points and a page of feedback with the reason. `make release` and `make grade` call it.
"""

from __future__ import annotations

import argparse
import csv
import html
import os
import re
import resource
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_mini.errors import SllmError

MEMORY_NBYTES = 8 << 30
"""What one kernel may have of its own, so that a cell that fills memory ends itself and not the machine."""


class ClassroomError(SllmError):
    """A course folder or a folder of submissions that cannot be worked with, or nbgrader where it is not installed."""


@dataclass(frozen=True, slots=True)
class Graded:
    """One submission. `problem` says why it could not be run to its end; it has 0 points then."""

    student: str
    assignment: str
    points: float
    max_points: float
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.student:20} {self.assignment:24} {self.points:g} of {self.max_points:g}{f'   {self.problem}' if self.problem else ''}"


class Classroom:
    """The course in `folder`, which has an `nbgrader_config.py`. `submissions` replaces the folder that it names. One thread.

    Raises ClassroomError where nbgrader is not installed or the folder is no course.
    """

    def __init__(self, folder: Path, *, submissions: Path | None = None) -> None:
        self._folder = folder.resolve()
        if not (self._folder / "nbgrader_config.py").is_file():
            raise ClassroomError(f"{folder} has no nbgrader_config.py; run this in a checkout of sllm_mini, or in the folder of your course")
        try:
            import nbgrader
            from nbgrader.apps import NbGrader
            from nbgrader.apps.api import NbGraderAPI
        except ImportError as error:
            raise ClassroomError(f"nbgrader is not here ({error}); use make release and make grade, or pip install 'sllm_mini[teaching]'") from error
        # nbgrader starts alembic by its name when it makes the gradebook.
        beside = (Path(sys.executable).parent, Path(nbgrader.__file__).parents[1] / "bin")
        os.environ["PATH"] = os.pathsep.join([*map(str, beside), os.environ.get("PATH", os.defpath)])
        app = NbGrader()
        app.config_file_paths.append(str(self._folder))
        app.load_config_file()
        course = app.config.CourseDirectory
        course.root = str(self._folder)
        if submissions is not None:
            course.submitted_directory = str(submissions.resolve())
        database = self._folder / course.db_url.removeprefix("sqlite:///")
        database.parent.mkdir(parents=True, exist_ok=True)
        course.db_url = f"sqlite:///{database}"
        self._api = NbGraderAPI(config=app.config)

    def _path(self, name: str) -> Path:
        return self._folder / str(getattr(self._api.coursedir, f"{name}_directory"))

    @property
    def out(self) -> Path:
        """Where the gradebook is, and the grades."""
        return Path(self._api.coursedir.db_url.removeprefix("sqlite:///")).parent

    @property
    def feedback(self) -> Path:
        return self._path("feedback")

    def assignments(self, chosen: Sequence[str] = ()) -> list[str]:
        """The names of all that have a source, or those of them that were chosen, by their names' beginnings."""
        every = sorted(self._api.get_source_assignments())
        unknown = [name for name in chosen if not any(each.startswith(name) for each in every)]
        if unknown or not every:
            raise ClassroomError(f"there is no assignment {unknown[0] if unknown else ''} in {self._path('source')}; there are {', '.join(every) or 'none'}")
        return [name for name in every if not chosen or name.startswith(tuple(chosen))]

    def release(self, assignment: str) -> Path:
        """Writes the student version, without solutions and hidden checks, and notes in the gradebook what is to be graded."""
        done = self._api.generate_assignment(assignment, force=True)
        if not done["success"]:
            raise ClassroomError(f"{assignment} cannot be released: {_reason(done)}")
        return self._path("release") / assignment

    def released(self, assignment: str) -> bool:
        """Whether the gradebook knows what is to be graded."""
        return assignment in self._api.get_released_assignments()

    def submissions(self, assignment: str) -> list[str]:
        """The students who handed this in."""
        return sorted(self._api.get_submitted_students(assignment))

    def grade(self, assignment: str, student: str) -> Graded:
        """Runs one submission, writes its feedback, and notes its points. The assignment must have been released."""
        done = self._api.autograde(assignment, student, force=True)
        problem = "" if done["success"] else _reason(done)
        if problem:
            folder = self._path("feedback") / student / assignment
            folder.mkdir(parents=True, exist_ok=True)
            title, said = html.escape(assignment), html.escape(problem)
            page = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title><h1>{title}: 0 points</h1><p>{said}</p></html>\n'
            (folder / f"{assignment}.html").write_text(page, encoding="utf-8")
        else:
            told = self._api.generate_feedback(assignment, student, force=True)
            if not told["success"]:
                raise ClassroomError(f"no feedback can be written for {student}, {assignment}: {_reason(told)}")
        with self._api.gradebook as book:
            found = book.find_submission(assignment, student)
            return Graded(student, assignment, 0.0 if problem else float(found.score), float(found.max_score), problem)


def write_grades(path: Path, grades: Sequence[Graded]) -> None:
    """A CSV file with a row for each submission."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("student", "assignment", "points", "max_points", "problem"))
        rows.writerows((each.student, each.assignment, each.points, each.max_points, each.problem) for each in grades)


def _reason(done: dict[str, Any]) -> str:
    text = f"{done.get('log', '')}\n{done.get('error', '')}"
    for sign, words in (
        ("DeadKernelError", "its kernel died: a cell ended the process, or took more memory than there is"),
        ("UnresponsiveKernelError", "its kernel hung and could not be interrupted"),
        ("in add_missing_grade_cells", "cells of the assignment were deleted that it cannot be graded without"),
        ("NotJSONError", "it is not a notebook that can be read"),
    ):
        if sign in text:
            return words
    raised = [found[0] for found in re.finditer(r"\b\w+(?:Error|Exception): .+", text) if "NbGraderException" not in found[0]]
    return raised[-1][:300] if raised else "nbgrader does not say why; look into its log"


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 where all went well, 1 where something could not be done, 2 for bad usage. A submission that died is no failure."""
    parser = argparse.ArgumentParser(prog="python -m sllm_mini.lab.classroom", description="Release assignments and grade submissions with nbgrader.")
    parser.add_argument("--course", type=Path, default=Path(), metavar="FOLDER", help="where nbgrader_config.py is (default: here)")
    commands = parser.add_subparsers(dest="command", required=True)
    release = commands.add_parser("release", help="write the student versions")
    grade = commands.add_parser("grade", help="grade a folder of submissions, write feedback and grades.csv")
    grade.add_argument("submissions", type=Path, metavar="SUBMISSIONS", help="SUBMISSIONS/<student>/<assignment>/<assignment>.ipynb")
    for command in (release, grade):
        command.add_argument("assignments", nargs="*", metavar="ASSIGNMENT", help="names or their beginnings, such as a02 (default: all)")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module=r"nbgrader\.")  # what SQLAlchemy thinks of its queries
    try:
        if options.command == "release":
            _release(Classroom(options.course), options.assignments)
        else:
            _grade(options.course, options.submissions, options.assignments)
    except ClassroomError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _release(classroom: Classroom, chosen: Sequence[str]) -> None:
    for assignment in classroom.assignments(chosen):
        print(f"released: {classroom.release(assignment)}", flush=True)


def _grade(course: Path, submissions: Path, chosen: Sequence[str]) -> None:
    if not submissions.is_dir():
        raise ClassroomError(f"{submissions} is no folder; give one with <student>/<assignment>/<assignment>.ipynb in it")
    classroom = Classroom(course, submissions=submissions)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_NBYTES if hard == resource.RLIM_INFINITY else min(MEMORY_NBYTES, hard), hard))
    grades = []
    for assignment in classroom.assignments(chosen):
        students = classroom.submissions(assignment)
        if students and not classroom.released(assignment):
            classroom.release(assignment)
        for student in students:
            grades.append(classroom.grade(assignment, student))
            print(grades[-1], flush=True)
    if not grades:
        raise ClassroomError(f"there is nothing to grade in {submissions}; give a folder with <student>/<assignment>/<assignment>.ipynb in it")
    write_grades(classroom.out / "grades.csv", grades)
    print(f"grades: {classroom.out / 'grades.csv'}; feedback: {classroom.feedback}/<student>/<assignment>")


if __name__ == "__main__":
    sys.exit(main())
