"""What is said to a zygote and by it. Explained in chapter 05.

Its owner says `Begin` once, over the socket pair that it started the zygote with, and is answered `Ready` or `Failed`.
Every other connection is one child: `Fork`, answered by `Forked` or `Failed`, then any number of `Signal`, then `Exited`; or
one question: `Prepare`.
The connection is the child's lease: the kernel closes it for a client that dies, and the zygote ends the child.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sllm_mini.wire import Message

Name = Annotated[str, Meta(min_length=1, max_length=300)]
Path = Annotated[str, Meta(min_length=1, max_length=4096)]
Text = Annotated[str, Meta(max_length=8192)]
Pid = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Begin(Message, frozen=True):
    """What to import (`module`, or `module:function` to call once), what may be run, and the socket to listen at.
    `own_folder`: the socket's folder is the zygote's to remove."""

    imports: list[Name]
    entries: list[Name]
    path: Path
    own_folder: bool


class Ready(Message, frozen=True):
    """The zygote listens. `import_seconds` is what its imports took."""

    import_seconds: Annotated[float, Meta(ge=0)]


class Failed(Message, frozen=True):
    """One sentence: why there is no zygote, or no child."""

    message: Text


class Fork(Message, frozen=True):
    """Asks for a child that runs `entry`. `arguments` is JSON: `[positional, named]`, decoded in the child alone.
    Descriptors: the child's standard input, output and error, and, if there is a fourth, its channel."""

    max_fds = 4

    entry: Name
    arguments: bytes
    environment: dict[bytes, bytes]
    folder: bytes


class Prepare(Message, frozen=True):
    """Asks the zygote to run `entry` itself, with arguments as for `Fork`: what that makes is in every child from then on. Answered by
    `Prepared` or `Failed`; nothing is forked meanwhile."""

    entry: Name
    arguments: bytes


class Prepared(Message, frozen=True):
    """It ran. `why_not`: why this zygote can fork no more, which nothing that it runs should bring about."""

    why_not: Text = ""


class Forked(Message, frozen=True):
    """The child runs. Descriptor: its pidfd, so that its client can kill it where the zygote hangs, and never a stranger."""

    max_fds = 1

    pid: Pid


class Signal(Message, frozen=True):
    """Sends a signal to the child's process group. Not answered: what comes of it is an `Exited`, or nothing."""

    number: Annotated[int, Meta(ge=1, le=64)]


class Exited(Message, frozen=True):
    """The child ended, with this exit status, or by the signal -`status`."""

    status: Annotated[int, Meta(ge=-64, le=255)]
