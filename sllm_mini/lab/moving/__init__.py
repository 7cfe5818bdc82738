"""A request that moves between two processes, measured: `sllm-mini bench migrate` and the pictures of chapter 07."""

from sllm_mini.lab.moving.document import break_even, prompt_rows, read_moves
from sllm_mini.lab.moving.measure import Options, Trace, measure_moves, trace_move

__all__ = ["Options", "Trace", "break_even", "measure_moves", "prompt_rows", "read_moves", "trace_move"]
