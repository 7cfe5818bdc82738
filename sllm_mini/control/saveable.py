"""What a policy or an estimator has learned, as bytes and back, so that a controller goes on after a restart as it was.

    @dataclass(slots=True)
    class Mine(Saveable):
        seconds: float                                            # an option: given again by whoever makes it anew
        _uses: dict[str, int] = field(default_factory=dict, init=False)  # learned: saved

A dataclass that inherits this saves each field that is not given to it (`init=False`), by its type: numbers, texts, enums,
tuples, dicts, deques and dataclasses of them. Pure; one thread at a time. Costs some microseconds for each thing that was
learned. Taught in chapter 08.
"""

from __future__ import annotations

from collections import deque
from dataclasses import fields
from typing import Any, ClassVar, cast, get_args, get_type_hints

from msgspec import MsgspecError, Raw, convert, msgpack

from sllm_mini.errors import SllmError


class Saveable:
    """`save` and `restore`, which `Controller.to_bytes` and `restore` call."""

    __slots__ = ()
    saved_parts: ClassVar[tuple[str, ...]] = ()
    """Options that may have learned something themselves, saved with it where they offer `save` and `restore`."""

    def save(self) -> bytes:
        """What it has learned. Its options are not in it."""
        parts = {name: part.save() for name in self.saved_parts if hasattr(part := getattr(self, name), "save")}
        return msgpack.encode([{name: getattr(self, name) for name in _learned(self)}, parts], enc_hook=_plain)

    def restore(self, data: bytes) -> None:
        """Becomes what `save` was called on, if that was made with the same options. Raises SllmError for bytes that are not
        from there, with nothing of its own changed."""
        names = _learned(self)
        hints = get_type_hints(type(self))
        try:
            rows, parts = msgpack.decode(data, type=tuple[dict[str, Raw], dict[str, bytes]])
            if rows.keys() != set(names) or not parts.keys() <= set(self.saved_parts):
                raise SllmError(f"what was saved has {', '.join(sorted({*rows, *parts})) or 'nothing'}; a {type(self).__name__} is restored from what a {type(self).__name__} saved")
            learned = {name: msgpack.decode(rows[name], type=hints[name], dec_hook=_deque) for name in names}
        except MsgspecError as error:
            raise SllmError(f"this is not what a {type(self).__name__} saves ({error}); give the bytes of its save()") from error
        if (keeping := {name for name in self.saved_parts if hasattr(getattr(self, name), "save")}) != parts.keys():
            unlike = ", ".join(sorted(keeping ^ parts.keys()))
            raise SllmError(f"of the {unlike} of a {type(self).__name__} either this one or the saved one keeps something, but not both; make it with the same options")
        for name, part in parts.items():
            getattr(self, name).restore(part)
        for name, value in learned.items():
            setattr(self, name, value)


def _learned(saveable: Saveable) -> list[str]:
    return [field.name for field in fields(cast(Any, saveable)) if not field.init]


def _plain(value: object) -> object:
    if isinstance(value, deque):
        return value.maxlen, list(value)
    raise TypeError(f"a {type(value).__name__} cannot be saved; keep what is learned in numbers, texts, enums, tuples, dicts, deques and dataclasses of them")


def _deque(kind: type, value: Any) -> object:
    """msgspec tells a ValueError or a TypeError of this as a fault of the bytes."""
    (item,) = get_args(kind)
    longest, values = convert(value, tuple[int | None, list[item]])  # type: ignore[valid-type]
    return deque(values, maxlen=longest)
