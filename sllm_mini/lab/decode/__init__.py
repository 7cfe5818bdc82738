"""Tokens per second: our engine, transformers' `generate` and its continuous batching. `sllm-mini bench decode`, chapter 07."""

from sllm_mini.lab.decode.document import read_decode
from sllm_mini.lab.decode.measure import Options, measure_decode

__all__ = ["Options", "measure_decode", "read_decode"]
