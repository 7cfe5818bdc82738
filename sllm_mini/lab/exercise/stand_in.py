"""Puts a function in the place of one of the package's own, wherever it is held, and takes it back.

A function is found by where it was written, not by the name it goes by: every live function whose code comes from the module's
file under that name, a copy that `importlib.reload` made included. It stays the same object and gets other code. So it does
not matter who holds it: a module that said `from … import f`, a class, a default argument, a closure, a partial, a table. A
module attribute that somebody set to a function of their own is not the package's and stays what it is.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NoReturn

from sllm_mini.errors import SllmError


class ExerciseError(SllmError):
    """An exercise that cannot be checked as it is written, or what a student's function did where it is shown."""


class BlankError(ExerciseError):
    """The package's own function was called while a student's is checked."""


class Original:
    """One function of the package, "module:name", and every live copy of it; of a package, also one that a module in it defines.
    `file` is where it is written. Raises ExerciseError where there is none, or more than one of that name."""

    def __init__(self, target: str) -> None:
        module, _, self.name = target.partition(":")
        self.target = target
        try:
            place = inspect.getfile(importlib.import_module(module))
        except (ImportError, TypeError, ValueError) as error:
            raise ExerciseError(f"{target}: no module {module!r} to be written a function for; name one as package.module:function") from error
        self.functions = _written_in(place.removesuffix("__init__.py"), self.name)
        files = {function.__code__.co_filename for function in self.functions}
        if len(files) != 1:
            raise ExerciseError(f"{target} is no function of {module}, or several, or something stands in its place now; name a plain function, once at a time")
        self.file = files.pop()

    def blank(self) -> None:
        """From now on, for good, every copy raises BlankError."""
        for function in self.functions:
            _set(function, _call_stand_in.__code__, None, {"_stand_in": partial(_refuse, self.name)})

    @contextmanager
    def replaced(self, by: Callable[..., Any]) -> Iterator[None]:
        """While the context lasts every copy calls `by`; then each is what it was, whatever happened. A `by` that calls the
        function it replaces gets BlankError. Calls may come from several threads; enter and leave from one."""
        kept = [(function, function.__code__, function.__defaults__, function.__kwdefaults__) for function in self.functions]
        stand_in = _OnceInside(self.name, by)
        try:
            for function in self.functions:
                _set(function, _call_stand_in.__code__, None, {"_stand_in": stand_in})
            yield
        finally:
            for each in kept:
                _set(*each)


def _set(function: FunctionType, code: CodeType, defaults: tuple[Any, ...] | None, keyword_defaults: dict[str, Any] | None) -> None:
    function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, keyword_defaults


def _call_stand_in(*args: Any, _stand_in: Callable[..., Any], **kwargs: Any) -> Any:
    # The code that a replaced function has meanwhile. Its globals are another module's: it may name nothing but its arguments.
    return _stand_in(*args, **kwargs)


def _refuse(name: str, *_args: object, **_kwargs: object) -> NoReturn:
    raise BlankError(f"it calls the package's own {name}, which is blank here; write what it does")


class _OnceInside:
    """The student's function, unless it is called by itself through the package's name."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function, self._here = name, function, threading.local()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._here, "inside", False):
            _refuse(self._name)
        self._here.inside = True
        try:
            return self._function(*args, **kwargs)
        finally:
            self._here.inside = False


def _written_in(place: str, name: str) -> Sequence[FunctionType]:
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()  # what is frozen is not among the objects that gc names
    try:
        functions = [each for each in gc.get_objects() if type(each) is FunctionType and each.__code__.co_qualname == name]
        return [each for each in functions if each.__code__.co_filename == place or (place.endswith(os.sep) and each.__code__.co_filename.startswith(place))]
    finally:
        if frozen:
            gc.freeze()
