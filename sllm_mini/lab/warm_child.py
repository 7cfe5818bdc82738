"""The processes of chapter 05: one that starts a model by whatever means it was itself started, and the store's.

`serve` is what a zygote forks, `python -m sllm_mini.lab.warm_child serve REQUEST` the same in a fresh process; both climb
the warmth ladder, report it as lines of JSON on their channel and then answer what they are asked until it is closed.
`alone` has no channel, so that CRIU can save it. `store` keeps a store until its standard input ends, so that none
outlives its owner. Heavy imports stand where they are timed. Run by `lab.warm`. Shown in chapter 05.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sllm_mini.cluster.zygote import RUNTIME
from sllm_mini.errors import SllmError
from sllm_mini.types import Span, SpanRecorder, Warmth

if TYPE_CHECKING:
    import torch

    from sllm_mini.inference import Engine

Answer = dict[str, Any]


def climb(task: Mapping[str, Any]) -> tuple[Answer, Engine]:
    """From wherever this process begins to the first token. `task` holds the fields of `lab.warm.Task` and `spawned`, when
    the process was asked for on the machine's monotonic clock. Raises what loading, attaching and generating raise."""
    begun = "fork" if "torch" in sys.modules else "interpreter"
    recorder = SpanRecorder([Span(begun, task["spawned"], time.monotonic(), warmth=Warmth.PROCESS)])
    import_runtime(task["path"], recorder)
    from sllm_mini.device import get_device
    from sllm_mini.inference import Engine, load_tokenizer
    from sllm_mini.loading import start_load
    from sllm_mini.loading.handle import LoadHandle
    from sllm_mini.loading.model import build_skeleton, fill
    from sllm_mini.storage import StoreClient

    with recorder.span("open device", warmth=Warmth.RUNTIME):
        target = _open_device(task["device"])
    if task["store"]:  # the one difference: an attachment answers what a load answers
        with recorder.span("attach", warmth=Warmth.DEVICE):
            loading: Any = StoreClient(task["store"]).attach(task["name"], get_device(task["device"]))
    else:
        with recorder.span("start load", warmth=Warmth.DRAM):
            loading = start_load(task["path"], get_device(task["device"]))
    with recorder.span("tokenizer", warmth=Warmth.DRAM):
        tokenizer = load_tokenizer(loading.checkpoint)
    with recorder.span("skeleton", warmth=Warmth.DRAM):
        model = build_skeleton(loading.checkpoint)
    with recorder.span("wait for bytes", warmth=Warmth.DEVICE):
        tensors = loading.wait()
    if isinstance(loading, LoadHandle):
        begin = loading.report.started
        recorder.spans.append(Span("bytes", begin, begin + loading.report.seconds, "loader", loading.checkpoint.nbytes, Warmth.DEVICE))
    with recorder.span("fill", warmth=Warmth.DEVICE):
        fill(model, tensors, target, loading.checkpoint)
    with recorder.span("engine", warmth=Warmth.READY):
        engine = Engine(model, tokenizer)
        prompt_ids = engine.encode(task["prompt"])
    with recorder.span("first call", warmth=Warmth.READY):
        for _ in engine.generate(prompt_ids[:1], max_new_tokens=2, stop_at_eos=False):
            pass
    with recorder.span("first token", warmth=Warmth.READY):
        token_id = next(engine.generate(prompt_ids, max_new_tokens=1)).token_id
    first_token = recorder.spans[-1].end
    spans = [asdict(span) for span in recorder.spans]
    return {"spans": spans, "first_token": first_token, "token_ids": [token_id], "prompt_tokens": len(prompt_ids), "nbytes": loading.checkpoint.nbytes}, engine


def import_runtime(path: str, recorder: SpanRecorder) -> None:
    """Everything that a process needs whichever model it serves, as spans; in a forked child it is there already."""
    with recorder.span("import torch", warmth=Warmth.RUNTIME):
        import torch  # noqa: F401
    with recorder.span("import transformers", warmth=Warmth.RUNTIME):
        from sllm_mini.lab.coldstart import import_model_class

        import_model_class(path)
    with recorder.span("import sllm_mini", warmth=Warmth.RUNTIME):
        import sllm_mini.inference.engine
        import sllm_mini.lab.bench.checksum
        import sllm_mini.loading.model
        import sllm_mini.storage.client  # noqa: F401


def _open_device(name: str) -> str:
    import torch

    from sllm_mini.device import get_device

    target = get_device(name)
    torch.zeros(1, device=target.name).add_(1)  # the first operation makes torch's own context
    target.synchronize()
    return target.name


class _Server:
    """What a started process can be asked for. Each method is one question; its arguments are the question's fields."""

    def __init__(self, task: Mapping[str, Any], engine: Engine | None) -> None:
        self.task, self.engine = task, engine
        self.held: dict[str, torch.Tensor] = {}

    def again(self) -> Answer:
        """The first token of one more request."""
        if self.engine is None:
            raise ValueError("this process has the runtime and no model; start one with a model")
        started = time.monotonic()
        token_id = next(self.engine.generate(self.task["prompt"], max_new_tokens=1)).token_id
        return {"seconds": time.monotonic() - started, "token_id": token_id}

    def bring(self, how: str, path: str, store: str, name: str, keep: bool) -> Answer:
        """A model's tensors brought and used twice: by "copy" or "map" from its files, hashes checked, or by "attach"."""
        from sllm_mini.lab.bench.checksum import sum_tensors
        from sllm_mini.loading import LoadOptions, start_load
        from sllm_mini.storage import StoreClient

        self.drop()
        started = time.monotonic()
        if how == "attach":
            loading: Any = StoreClient(store).attach(name, self.task["device"])
        else:
            loading = start_load(path, self.task["device"], options=LoadOptions(map_cached=how == "map"))
        tensors = dict(loading.wait())
        ready = time.monotonic()
        total, nbytes = sum_tensors(tensors.values())
        used = time.monotonic()
        sum_tensors(tensors.values())
        again = time.monotonic()
        if keep:
            self.held = tensors
        del loading, tensors
        gc.collect()
        return {"seconds": ready - started, "use_seconds": used - ready, "again_seconds": again - used, "sum": total, "nbytes": nbytes}

    def total(self) -> Answer:
        """The sum over every byte that is held now."""
        from sllm_mini.lab.bench.checksum import sum_tensors

        return {"sum": sum_tensors(self.held.values())[0]}

    def write(self) -> Answer:
        """Overwrites the largest tensor that is held with zeros; its name and bytes."""
        name = max(self.held, key=lambda one: self.held[one].nbytes)
        self.held[name].zero_()
        return {"name": name, "nbytes": self.held[name].nbytes}

    def drop(self) -> Answer:
        """Lets go of what is held."""
        self.held = {}
        gc.collect()
        return {}


def serve(task: dict[str, Any], *, channel: socket.socket) -> None:
    """Climbs, reports, and answers until the other side closes the channel. A task without a path imports the runtime only."""
    with channel, channel.makefile("rw", encoding="utf-8") as lines:

        def report(work: Callable[[], Answer]) -> bool:
            try:
                answer = work()
            except (SllmError, OSError, ValueError, LookupError, RuntimeError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
            return "error" not in answer

        server = _Server(task, None)

        def begin() -> Answer:
            if not task["path"]:
                import_runtime("", SpanRecorder())
                for name in RUNTIME:
                    importlib.import_module(name)
                return {}
            answer, server.engine = climb(task)
            return answer

        if not report(begin):
            return
        questions: dict[str, Callable[..., Answer]] = {one.__name__: one for one in (server.again, server.bring, server.total, server.write, server.drop)}
        while line := lines.readline():
            question = json.loads(line)
            report(lambda: questions[question.pop("do")](**question))  # noqa: B023 - called at once


def alone(task: dict[str, Any], out: str) -> None:
    """Climbs, then writes a line to the file `out` now and after each SIGUSR1: how many there were, and the time and the
    id of the first token of one more request."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # in every thread that torch will start, too
    _, engine = climb(task)
    server, number = _Server(task, engine), 0
    while True:
        token_id = server.again()["token_id"]
        with open(f"{out}.new", "w", encoding="utf-8") as file:
            json.dump({"number": number, "at": time.monotonic(), "token_id": token_id}, file)
        os.replace(f"{out}.new", out)
        signal.sigwait({signal.SIGUSR1})
        number += 1


def store(folder: str, address: str, dram_nbytes: int, device_nbytes: dict[str, int]) -> None:
    """A store that says "ready" on standard output and ends with its standard input."""
    from sllm_mini.storage import Store, StoreServer

    with Store(folder, dram_nbytes=dram_nbytes, device_nbytes=device_nbytes) as opened, StoreServer(opened, address):
        print("ready", flush=True)
        sys.stdin.read()


def main(arguments: list[str]) -> int:
    """`serve TASK` (the channel is its standard input), `alone TASK OUT` or `store OPTIONS`; arguments are JSON."""
    verb, *given = arguments
    if verb == "serve":
        serve(json.loads(given[0]), channel=socket.socket(fileno=os.dup(0)))
    elif verb == "alone":
        alone(json.loads(given[0]), given[1])
    else:
        store(**json.loads(given[0]))
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an interpreter that has torch takes a second to take itself down, which nobody measures
