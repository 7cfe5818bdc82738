"""Programs that units of the report run with `python -c`, because no command of the package does what they do."""

from __future__ import annotations

MODEL = """
from sys import argv
from sllm_mini.checkpoint.random_model import make_model
make_model(argv[1], argv[2], max_shard_nbytes=1 << 50)  # one file: not every peer reads several
"""
"""Arguments: the name of a published shape, the folder that the model is made in."""
COLD_START = """
from sys import argv
from sllm_mini.lab.anatomy import measure_cold_start
from sllm_mini.lab.models import tiny_checkpoint
path = tiny_checkpoint().path
for _ in range(int(argv[3])):  # the libraries' files come from the disk in the first
    start = measure_cold_start(path, device=argv[1], prompt="Once upon a time", max_new_tokens=24)
start.save(argv[2])
"""
"""Arguments: the device, the file that the last of the starts is saved to, how many starts."""
CHAPTERS_MODEL = "from sllm_mini.lab.models import {0}; print({0}().path)"
"""To be formatted with the function of `lab.models` that makes the model which chapters measure on."""
