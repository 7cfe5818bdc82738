"""Two of the processes of `overhead`: `client URL` sends, `direct CHECKPOINT THREADS DEVICE` calls an engine of its own. Each reads a question a line and
answers it with a line of JSON, until its input ends. Run with `python -m`. Chapter 11."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from sllm_mini.lab.servebench.sender import Sender


def direct(path: str, threads: int, device: str) -> None:
    import torch

    from sllm_mini.inference import Engine

    torch.set_num_threads(threads)
    engine = Engine.load(path, device)
    for line in _questions():
        asked = json.loads(line)
        began, first, text, count = time.perf_counter(), None, "", 0
        for piece in engine.generate(asked["prompt"], max_new_tokens=asked["max_tokens"]):
            first = time.perf_counter() - began if first is None else first
            text += piece.text
            count += 1
        _answer({"first_seconds": first, "seconds": time.perf_counter() - began, "text": text, "tokens": count, "error": ""})


def client(url: str) -> None:
    sender = Sender(url)
    for line in _questions():
        _answer(asdict(sender.send(json.loads(line))))
    sender.close()


def _questions() -> Any:
    _answer({})  # it is up
    return iter(sys.stdin.readline, "")


def _answer(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "direct":
        direct(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        client(sys.argv[2])
