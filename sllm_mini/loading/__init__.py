"""Bytes in motion: the pipelined loader, load handles, models filled without a second copy, machine limits (chapter 02)."""

from sllm_mini.loading.flow import LoadOptions, LoadReport
from sllm_mini.loading.handle import LoadHandle
from sllm_mini.loading.load import load_tensors, start_load
from sllm_mini.loading.model import load_model
from sllm_mini.loading.pool import ChunkPool

__all__ = ["ChunkPool", "LoadHandle", "LoadOptions", "LoadReport", "load_model", "load_tensors", "start_load"]
