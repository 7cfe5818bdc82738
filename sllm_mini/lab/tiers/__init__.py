"""A model from every tier to memory, and from one process to another: `sllm-mini bench tiers` (chapters 03 and 05)."""

from sllm_mini.lab.tiers.document import rows_of
from sllm_mini.lab.tiers.measure import Options, measure_tiers
from sllm_mini.lab.tiers.picture import described_tiers, parts_table, plot_tiers, tiers_alt_text, tiers_table

__all__ = ["Options", "described_tiers", "measure_tiers", "parts_table", "plot_tiers", "rows_of", "tiers_alt_text", "tiers_table"]
