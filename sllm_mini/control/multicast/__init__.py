"""Scale-out plans: how the blocks of one model reach many instances, each plan a pure schedule of transfers.

λScale's binomial pipeline and its k-way form, BlitzScale's serial chain, FaaSNet's tree, and everyone reading the store, all in
one model of the network (`schedule`), judged by one `check` and summed up by one `summarize`. Beside them two models
of execution while scaling: BlitzScale's ZigZag (`zigzag`) and HydraServe's estimate (`hydraserve`). `gather` makes a plan of nodes
that want one model at once. Taught in chapter 10.
"""

from sllm_mini.control.multicast.binomial import binomial_pipeline, binomial_step, k_way_pipeline
from sllm_mini.control.multicast.chain import serial_chain
from sllm_mini.control.multicast.check import check
from sllm_mini.control.multicast.gather import Gathered, plan_of, shares_of, stages_of
from sllm_mini.control.multicast.hydraserve import hydraserve_ttft
from sllm_mini.control.multicast.joint import JointStage, JointStart, joint_stages, joint_start
from sllm_mini.control.multicast.schedule import Plan, Transfer
from sllm_mini.control.multicast.store import store_reads
from sllm_mini.control.multicast.summary import Summary, plan_seconds, summarize
from sllm_mini.control.multicast.tree import binary_tree

__all__ = [
    "Gathered", "JointStage", "JointStart", "Plan", "Summary", "Transfer", "binary_tree", "binomial_pipeline", "binomial_step", "check", "hydraserve_ttft", "joint_stages", "joint_start",
    "k_way_pipeline", "plan_of", "plan_seconds", "serial_chain", "shares_of", "stages_of", "store_reads", "summarize",
]  # fmt: skip
