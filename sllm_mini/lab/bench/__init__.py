"""Every loader a user would pick, in one interleaved run beside the limits of the machine: `sllm-mini bench load` (chapter 02)."""

from sllm_mini.lab.bench.document import read_document, rows_of, save_document
from sllm_mini.lab.bench.load import entries, measure_load
from sllm_mini.lab.bench.measure import Options
from sllm_mini.lab.bench.picture import bench_table, described_roofline, plot_roofline, roofline_alt_text

__all__ = [
    "Options", "bench_table", "described_roofline", "entries", "measure_load", "plot_roofline", "read_document", "roofline_alt_text", "rows_of",
    "save_document",
]  # fmt: skip
