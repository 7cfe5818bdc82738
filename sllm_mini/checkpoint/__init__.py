"""Bytes at rest: the loading-optimised checkpoint format, its writer, converter, verifier and exporter (chapter 01)."""

from sllm_mini.checkpoint.convert import convert_checkpoint, save_checkpoint
from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.export import export_safetensors
from sllm_mini.checkpoint.verify import VerifyReport, verify_checkpoint
from sllm_mini.checkpoint.writer import WriteOptions

__all__ = [
    "Checkpoint",
    "VerifyReport",
    "WriteOptions",
    "convert_checkpoint",
    "export_safetensors",
    "open_checkpoint",
    "save_checkpoint",
    "verify_checkpoint",
]
