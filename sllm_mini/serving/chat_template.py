"""Messages become a prompt by the template that the model came with: transformers' rendering, in jinja's immutable sandbox. Chapter 11.

A template is a program of whoever made the model. The sandbox keeps it from this process, not from looping, so it runs in a thread
of its own and has so many seconds of a processor; while one that has not ended by then goes on, the model's template is not run again.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sllm_mini.serving.chat_protocol import Message
from sllm_mini.serving.errors import ApiError, invalid, unsupported
from sllm_mini.serving.options import Limits
from sllm_mini.serving.texts import ModelText

_ROLES = {"developer": "system"}
_AT_ONCE = 8
"""Templates that run."""
_LOOK_SECONDS = 0.05


class Templates:
    """Renders chats. For one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free = asyncio.Semaphore(_AT_ONCE)
        self._late: list[tuple[ModelText, threading.Thread]] = []
        """Those whose template did not end in time."""

    async def render(self, model: ModelText, messages: Sequence[Message]) -> str:
        """The prompt, to be encoded without special tokens before it: the template writes its own. Raises ApiError(400)."""
        chat = plain_messages(messages)
        if model.tokenizer is None or not getattr(model.tokenizer, "chat_template", None):
            raise ApiError(400, "no_chat_template", f"{model.name} has no chat template; use /v1/completions", param="model")
        if self._limits.special_in_content == "refuse":
            _refuse_special(model, chat)
        async with self._free:
            self._late = [(late, thread) for late, thread in self._late if thread.is_alive()]
            if any(late is model for late, _ in self._late):
                raise _endless(model)
            loop = asyncio.get_running_loop()
            done: asyncio.Future[str] = loop.create_future()
            thread = threading.Thread(target=_run, args=(model, chat, loop, done), name="sllm-template", daemon=True)
            thread.start()
            left = self._limits.template_seconds
            while left > 0:
                await asyncio.wait({done}, timeout=max(left, _LOOK_SECONDS))
                if done.done():
                    return done.result()
                left = self._limits.template_seconds - _busy_seconds(thread)
            self._late.append((model, thread))
            raise _endless(model)


def _busy_seconds(thread: threading.Thread) -> float:
    """How long a processor has worked on it: one that waits for others is not what is slow. 0 for one that has just ended."""
    try:
        fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def plain_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """As templates take them: role and text. Raises ApiError(400) for what is no text."""
    return [{"role": _ROLES.get(each.role, each.role), "content": _content(each, number)} for number, each in enumerate(messages)]


def _content(message: Message, number: int) -> str:
    where = f"messages.{number}"
    if message.tool_calls:
        raise unsupported(f"{where}.tool_calls")
    if message.content is None:
        raise invalid(f"{where}.content is missing; give a text", f"{where}.content")
    if isinstance(message.content, str):
        return message.content
    for place, part in enumerate(message.content):
        if part.type != "text":
            raise unsupported(f"{where}.content.{place}.type", "is not 'text', and only texts are taken here")
        if part.text is None:
            raise invalid(f"{where}.content.{place}.text is missing; give a text", f"{where}.content.{place}.text")
    return "".join(part.text or "" for part in message.content)


def _refuse_special(model: ModelText, chat: Sequence[dict[str, str]]) -> None:
    special = [str(token) for token in getattr(model.tokenizer, "all_special_tokens", ())]
    for number, message in enumerate(chat):
        found = next((token for token in special if token in message["content"]), None)
        if found is not None:
            raise invalid(f"messages.{number} spells {found!a:.40}, which {model.name} reads as a mark of its own; write it differently", f"messages.{number}.content")


def _endless(model: ModelText) -> ApiError:
    return ApiError(400, "no_chat_template", f"the chat template of {model.name} did not end in time; use /v1/completions", param="model")


def _run(model: ModelText, chat: list[dict[str, str]], loop: asyncio.AbstractEventLoop, done: asyncio.Future[str]) -> None:
    from jinja2 import TemplateError

    error: Exception | None = None
    text = ""
    try:
        text = str(model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))  # type: ignore[union-attr]
    except TemplateError as raised:
        error = invalid(f"the chat template of {model.name} does not take these messages: {str(raised)!a:.300}", "messages")
    except Exception as raised:  # noqa: BLE001 - a template may raise anything that Python can; it is told as the request's error
        error = invalid(f"the chat template of {model.name} fails on these messages ({type(raised).__name__})", "messages")
    try:
        loop.call_soon_threadsafe(partial(_tell, done, text, error))
    except RuntimeError:
        return  # the loop has ended, and whoever waited with it


def _tell(done: asyncio.Future[str], text: str, error: Exception | None) -> None:
    if done.done():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(text)
