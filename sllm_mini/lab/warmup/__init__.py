"""What comes after the weights, first and again, cold and prepared: `sllm-mini bench warmup` (chapter 06)."""

from sllm_mini.lab.warmup.measure import PARTS, Options, measure_warmup, read_warmup, rows_of, why_no_compiler
from sllm_mini.lab.warmup.picture import (
    described_warmup,
    factor_of,
    kernels_table,
    plot_part,
    warmup_alt_text,
    warmup_table,
)

__all__ = [
    "PARTS",
    "Options",
    "described_warmup",
    "factor_of",
    "kernels_table",
    "measure_warmup",
    "plot_part",
    "read_warmup",
    "rows_of",
    "warmup_alt_text",
    "warmup_table",
    "why_no_compiler",
]
