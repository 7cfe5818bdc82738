"""Runs a module with the recording fake GPU where CUDA would be: `python -m sllm_mini.lab.report.rehearsal MODULE ARGS…`.

For `make gpu-report --rehearse` and nothing else: what it prints was measured on a processor. Only this process sees the
fake; processes that it starts see the machine as it is. `device/fake.py` says what the fake is.
"""

from __future__ import annotations

import runpy
import sys

MEMORY_NBYTES = 1 << 30


def install() -> None:
    """From here on `cuda:0` is the fake, in this process. Call before anything else of the package is imported."""
    import sllm_mini.device as house
    from sllm_mini.device import cuda
    from sllm_mini.device.fake import RecordingRuntime

    gpu = RecordingRuntime(memory_nbytes=MEMORY_NBYTES, pinned_nbytes=MEMORY_NBYTES).device()
    # Modules take these by name from here, so this has to come before they are imported.
    for module in (cuda, house):
        vars(module)["why_no_cuda"] = lambda: None
    vars(cuda)["_toolkit"] = lambda: gpu.toolkit
    vars(cuda)["_device"] = lambda index: gpu


def main() -> None:
    module = sys.argv[1]
    install()
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
