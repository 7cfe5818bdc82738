"""Messages become a prompt by the template that the model came with: transformers' rendering, in jinja's immutable sandbox. Chapter 11.

A template is a program of whoever made the model. The sandbox keeps it from this process, not from looping, so it runs in a thread
of its own and has so much time; one that does not end costs that thread, and the model's template is not run again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import partial

from sllm_mini.serving.chat_protocol import Message
from sllm_mini.serving.errors import ApiError, invalid, unsupported
from sllm_mini.serving.options import Limits
from sllm_mini.serving.texts import ModelText

_ROLES = {"developer": "system"}


class Templates:
    """Renders chats. For one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._endless: list[ModelText] = []
        """Those whose template did not end."""

    async def render(self, model: ModelText, messages: Sequence[Message]) -> str:
        """The prompt, to be encoded without special tokens before it: the template writes its own. Raises ApiError(400)."""
        chat = plain_messages(messages)
        if model.tokenizer is None or not getattr(model.tokenizer, "chat_template", None):
            raise ApiError(400, "no_chat_template", f"{model.name} has no chat template; use /v1/completions", param="model")
        if self._limits.special_in_content == "refuse":
            _refuse_special(model, chat)
        if any(each is model for each in self._endless):
            raise _endless(model)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[str] = loop.create_future()
        threading.Thread(target=_run, args=(model, chat, loop, done), name="sllm-template", daemon=True).start()
        try:
            return await asyncio.wait_for(done, self._limits.template_seconds)
        except TimeoutError:
            self._endless.append(model)
            raise _endless(model) from None


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
