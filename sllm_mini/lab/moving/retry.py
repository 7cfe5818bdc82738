"""What a killed request costs when it is tried again, against one that moved: from measured parts, pure. Chapter 07."""

from __future__ import annotations

from dataclasses import dataclass

from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text


@dataclass(frozen=True, slots=True)
class Loss:
    """One way to leave a machine: how long the reader waits for the next token that is new, and how many tokens are computed a
    second time in a prefill and in decode steps."""

    name: str
    seconds: float
    recomputed_tokens: int
    decoded_again: int


def losses(*, context: int, said: int, pause_seconds: float, recompute_tokens_per_second: float, step_seconds: float, start_seconds: float) -> list[Loss]:
    """For a request with a prompt of `context` tokens and `said` tokens given out.

    Moved: the pause that was measured. From the ledger: a running engine recomputes all, then takes one step. Retried: the
    prompt alone is kept, so every token is decoded again; on a running engine, and on one that must be started first.
    No queue is counted, so the last three are the least that they can be.
    """
    again = context / recompute_tokens_per_second + said * step_seconds
    return [
        Loss("moved live", pause_seconds, 0, 0),
        Loss("killed, begun again from the ledger", (context + said) / recompute_tokens_per_second + step_seconds, context + said, 0),
        Loss("killed and retried, an instance is ready", again + step_seconds, context, said),
        Loss("killed and retried, an instance is started", start_seconds + again + step_seconds, context, said),
    ]


def losses_table(found: list[Loss]) -> Table:
    """Each way, and how much longer the reader waits than for the first."""
    rows = tuple(
        (one.name, seconds_text(one.seconds), f"x{one.seconds / found[0].seconds:,.0f}", f"{one.recomputed_tokens:,}", f"{one.decoded_again:,}") for one in found
    )
    headers = ("how the request leaves the machine", "until the next new token", "against the first", "tokens in prefills again", "tokens decoded again")
    return Table(headers, rows, numeric=frozenset({1, 2, 3, 4}), note="No queue is counted; the client's own timeout, which a provider's retry begins with, neither.")
