"""Requests per second of the simulator against a bare SimPy queue. `sllm-mini bench simulate`, chapter 08."""

from sllm_mini.lab.simulating.document import read_simulating
from sllm_mini.lab.simulating.measure import Options, measure_simulating
from sllm_mini.lab.simulating.workload import Workload

__all__ = ["Options", "Workload", "measure_simulating", "read_simulating"]
