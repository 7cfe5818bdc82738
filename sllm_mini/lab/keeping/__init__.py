"""Cold starts against wasted memory: simulated runs of every keep-alive policy, and the pictures of chapter 09."""

from sllm_mini.lab.keeping.contenders import CONTENDERS, Outcome, run_contender

__all__ = ["CONTENDERS", "Outcome", "run_contender"]
