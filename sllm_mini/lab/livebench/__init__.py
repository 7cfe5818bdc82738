"""A trace played on a live cluster, the same one simulated, and how well the one predicts the other. `sllm-mini bench cluster`, chapter 08."""

from sllm_mini.lab.livebench.calibrate import Calibration
from sllm_mini.lab.livebench.document import (
    measure_calibration,
    measure_cluster,
    read_cluster,
    recorded_calibration,
    row_of,
)
from sllm_mini.lab.livebench.workload import Options

__all__ = ["Calibration", "Options", "measure_calibration", "measure_cluster", "read_cluster", "recorded_calibration", "row_of"]
