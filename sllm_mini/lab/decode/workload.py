"""The requests of `bench decode`: how many at once, how long their prompts and answers are. Pure. Shown in chapter 07."""

from __future__ import annotations

import random
from dataclasses import dataclass

_FIRST_ID = 3
_IDS = 64


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, and how many tokens to answer with, whatever they are."""

    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are asked for at once. `name` says how many and whether their lengths differ."""

    name: str
    requests: tuple[Request, ...]

    @property
    def new_tokens(self) -> int:
        return sum(request.new_tokens for request in self.requests)


def workloads(batches: tuple[int, ...], prompt_tokens: int, new_tokens: int, seed: int) -> list[Workload]:
    """For each batch size, requests of one length; for each above 1 also requests whose prompts are between a quarter and
    the whole of `prompt_tokens`, and their answers likewise, as requests of many users are."""
    generator = random.Random(seed)

    def prompt(count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(_FIRST_ID, _FIRST_ID + _IDS) for _ in range(count))

    found = []
    for batch in batches:
        found.append(Workload(f"{batch} alike", tuple(Request(prompt(prompt_tokens), new_tokens) for _ in range(batch))))
        if batch > 1:
            unlike = tuple(Request(prompt(_some(generator, prompt_tokens)), _some(generator, new_tokens)) for _ in range(batch))
            found.append(Workload(f"{batch} unlike", unlike))
    return found


def _some(generator: random.Random, most: int) -> int:
    return generator.randint(max(1, most // 4), most)
