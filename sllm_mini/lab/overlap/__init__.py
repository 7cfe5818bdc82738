"""Load, then run, against running while loading: `sllm-mini bench overlap` and the pictures of chapter 04."""

from sllm_mini.lab.overlap.document import prompt_rows
from sllm_mini.lab.overlap.measure import Options, measure_overlap
from sllm_mini.lab.overlap.picture import described_overlap, overlap_alt_text, plot_overlap
from sllm_mini.lab.overlap.start import Start, record_start

__all__ = [
    "Options", "Start", "described_overlap", "measure_overlap", "overlap_alt_text", "plot_overlap", "prompt_rows", "record_start",
]  # fmt: skip
