"""An empty prompt loads a model, and with keep_alive 0 puts it away: as Ollama has it. Chapter 11."""

from __future__ import annotations

import asyncio
import time

from sllm_mini.serving.errors import ApiError, of_submit
from sllm_mini.serving.state import State
from sllm_mini.types import Warmth

_LOOK_SECONDS = 0.1


async def preload(state: State, model: str, keep_alive: float | None, warmth: Warmth = Warmth.READY) -> str:
    """What became of it, "load" once an instance is as warm as that (DRAM or more), or "unload". Raises ApiError(503) where none is after `hold_seconds`."""
    cluster = state.cluster
    try:
        if keep_alive == 0:
            await state.aside(lambda: cluster.unload(model))
            return "unload"
        await state.aside(lambda: cluster.prewarm(model, warmth, keep_alive))
    except Exception as error:
        raise of_submit(error) from error
    end = time.monotonic() + state.limits.hold_seconds
    while not any(each.model == model and each.warmth >= warmth for node in await state.aside(cluster.nodes) for each in node.instances):
        if time.monotonic() > end:
            raise ApiError(503, "held_too_long", f"no instance of the model was warm within {state.limits.hold_seconds:g} s; there may be no room", retry_after=10.0)
        await asyncio.sleep(_LOOK_SECONDS)
    return "load"
