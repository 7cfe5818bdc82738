"""An empty prompt loads a model, and with keep_alive 0 puts it away: as Ollama has it. Chapter 11."""

from __future__ import annotations

import asyncio
import time

from sllm_mini.serving.errors import ApiError, of_submit
from sllm_mini.serving.state import State
from sllm_mini.types import Warmth

_LOOK_SECONDS, _ASK_SECONDS = 0.1, 2.0


async def preload(state: State, model: str, keep_alive: float | None, warmth: Warmth = Warmth.READY, *, hold_seconds: float | None = None) -> str:
    """What became of it, "load" once an instance is as warm as that (DRAM or more), or "unload". It is asked for again while there is none: there may be room
    by then. Raises ApiError(503) where none is after `hold_seconds` (the server's own unless given), (404) for one that is deleted meanwhile."""
    cluster = state.cluster
    if keep_alive == 0:
        try:
            await state.aside(lambda: cluster.unload(model))
        except Exception as error:
            raise of_submit(error) from error
        return "unload"
    await _ask(state, model, warmth, keep_alive)
    hold_seconds = state.limits.hold_seconds if hold_seconds is None else hold_seconds
    begun = asked = time.monotonic()
    while not any(each.model == model and each.warmth >= warmth for node in await state.aside(cluster.nodes) for each in node.instances):
        now = time.monotonic()
        if now - begun > hold_seconds:
            raise ApiError(503, "held_too_long", f"no instance of the model was warm within {hold_seconds:g} s; there may be no room", retry_after=10.0)
        if now - asked > _ASK_SECONDS:
            asked = now
            await _ask(state, model, warmth, keep_alive)
        await asyncio.sleep(_LOOK_SECONDS)
    return "load"


async def _ask(state: State, model: str, warmth: Warmth, keep_alive: float | None) -> None:
    try:
        await state.aside(lambda: state.cluster.prewarm(model, warmth, keep_alive))
    except Exception as error:
        raise of_submit(error) from error
