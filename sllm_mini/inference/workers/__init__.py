"""Engines in processes of their own, and the parent that gives them orders and brings back what a dead one ran.

`pool` is all of them, `process` one as its parent sees it, `worker` what runs in it around a `service`, and `messages` what they say to each
other. Explained in chapter 07.
"""

from sllm_mini.inference.workers.pool import WorkerOptions, Workers

__all__ = ["WorkerOptions", "Workers"]
