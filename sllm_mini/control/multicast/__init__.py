"""Scale-out plans: how the blocks of one model reach many instances, each plan a pure schedule of transfers.

λScale's binomial pipeline and its k-way form, BlitzScale's serial chain, FaaSNet's tree, and everyone reading the store, all in
one model of the network (`schedule`), judged by one `check` and summed up by one `summarize`. Beside them two models
of execution while scaling: BlitzScale's ZigZag (`zigzag`) and HydraServe's estimate (`hydraserve`). Taught in chapter 10.
"""

from sllm_mini.control.multicast.binomial import binomial_pipeline, binomial_step, k_way_pipeline
from sllm_mini.control.multicast.chain import serial_chain
from sllm_mini.control.multicast.check import check
from sllm_mini.control.multicast.hydraserve import hydraserve_ttft
from sllm_mini.control.multicast.schedule import Plan, Transfer
from sllm_mini.control.multicast.store import store_reads
from sllm_mini.control.multicast.summary import Summary, plan_seconds, summarize
from sllm_mini.control.multicast.tree import binary_tree

__all__ = [
    "Plan", "Summary", "Transfer", "binary_tree", "binomial_pipeline", "binomial_step", "check", "hydraserve_ttft",
    "k_way_pipeline", "plan_seconds", "serial_chain", "store_reads", "summarize",
]  # fmt: skip
