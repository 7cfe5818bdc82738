"""How long a live migration takes, in closed form: rounds that recompute what is missing while the source decodes on.

ServerlessLLM (OSDI'24): the destination recomputes the tokens so far, then those that came meanwhile, until few are missing;
then the source stops and the rest is recomputed in the pause. Taught in chapter 07. Pure; costs some ten rounds.
"""

from __future__ import annotations

_MOST_ROUNDS = 64


def move_rounds(tokens: int, prefill_seconds: float, decode_seconds: float, gap_tokens: int) -> tuple[float, float]:
    """Seconds of the rounds while the source decodes, and of the pause after them, for a request of so many tokens.

    `prefill_seconds` and `decode_seconds` are per token. Where recomputing is not faster than decoding the gap never closes,
    and the source stops after the first round.
    """
    missing, rounds = float(tokens), 0.0
    for _ in range(_MOST_ROUNDS):
        if missing <= gap_tokens:
            break
        seconds = missing * prefill_seconds
        rounds += seconds
        came = seconds / decode_seconds if decode_seconds > 0 else 0.0
        if came >= missing:
            missing = came
            break
        missing = came
    return rounds, missing * prefill_seconds
