"""nbgrader's settings: sources in chapters/assignments, all that is made of them in out/classroom. Read from this folder."""

c = get_config()  # type: ignore[name-defined]  # noqa: F821 - given by traitlets

c.CourseDirectory.course_id = "sllm_mini"
c.CourseDirectory.source_directory = "chapters/assignments"
c.CourseDirectory.release_directory = "out/classroom/release"
c.CourseDirectory.submitted_directory = "out/classroom/submitted"
c.CourseDirectory.autograded_directory = "out/classroom/autograded"
c.CourseDirectory.feedback_directory = "out/classroom/feedback"
c.CourseDirectory.db_url = "sqlite:///out/classroom/gradebook.db"

c.ClearSolutions.code_stub = {"python": 'raise NotImplementedError("yours to write: the specification stands above")'}

# A cell that a student deleted is put back, one that does not end is interrupted: both cost the points of that cell.
c.OverwriteCells.add_missing_cells = True
c.Execute.timeout = 120
c.Execute.iopub_timeout = 30
