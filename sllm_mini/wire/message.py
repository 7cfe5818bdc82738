"""Schemas: what may be said over a channel, and how strictly it is read. Explained in chapter 05.

Messages are tagged msgspec structs in MessagePack. Unknown tags and fields, wrong types, numbers out of their bounds
and trailing bytes are refused; nothing is ever unpickled. Decoding asks for memory in proportion to the message.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, ClassVar

import msgspec
from msgspec import inspect

from sllm_mini.errors import WireError

_making = threading.Lock()
"""msgspec shows a type's fields to other threads before it knows them all: who makes a decoder of the same type meanwhile decodes with
fields that are not there, and the process crashes (0.22)."""
_UNCHECKED = (inspect.AnyType, inspect.RawType, inspect.ExtType, inspect.CustomType, inspect.TypedDictType, inspect.DataclassType)


class ChannelClosed(WireError):
    """The conversation is over: closed between two messages by either side, or ended by an earlier failure."""


class WireTimeout(WireError):
    """The deadline passed. `ended` is False where no byte of a frame had moved: the channel is still usable then."""

    def __init__(self, message: str, *, ended: bool = False) -> None:
        super().__init__(message)
        self.ended = ended


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that goes over a channel; the class name is its tag, and so part of the protocol.

    Bound numbers with `Annotated[int, msgspec.Meta(ge=…, le=…)]`: both sides check. Structs inside derive from it too.
    """

    max_fds: ClassVar[int] = 0
    """Descriptors that this message may carry, at most MAX_FDS."""


def decoder(message_type: Any) -> msgspec.msgpack.Decoder[Any]:
    """The strict decoder of a Message class or a union of them. Raises ValueError if the type leaves anything unchecked.

    Decoders hold no state between calls, so one serves all threads.
    """
    with _making:
        return _decoder(message_type)


@functools.lru_cache(maxsize=256)
def _decoder(message_type: Any) -> msgspec.msgpack.Decoder[Any]:
    top = inspect.type_info(message_type)
    for kind in top.types if isinstance(top, inspect.UnionType) else (top,):
        if not (isinstance(kind, inspect.StructType) and issubclass(kind.cls, Message)):
            raise ValueError(f"{message_type} is not a Message or a union of Messages; derive it from sllm_mini.wire.Message")
    _check(top, set())
    return msgspec.msgpack.Decoder(message_type)


def _check(node: Any, seen: set[type]) -> None:
    """Walks a type and everything inside it, and refuses what msgspec would let pass unseen."""
    if isinstance(node, tuple):
        for part in node:
            _check(part, seen)
    elif isinstance(node, _UNCHECKED):
        raise ValueError(f"a message may not contain {type(node).__name__}, which is not checked; name its fields in a Message")
    elif isinstance(node, inspect.StructType):
        if not node.forbid_unknown_fields:
            raise ValueError(f"{node.cls.__name__} lets unknown fields pass; derive it from sllm_mini.wire.Message")
        if node.cls not in seen:
            seen.add(node.cls)
            for field in node.fields:
                _check(field.type, seen)
    elif isinstance(node, inspect.Type):
        for name in node.__struct_fields__:
            _check(getattr(node, name), seen)
