"""A client of another making, in an environment of its own: the `llm` program of the command line, told of this server in its settings. Chapter 11."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from serving_world import KEY, World, open_world

PROGRAM = Path(__file__).parents[1] / ".venv" / "clients" / "bin" / "llm"
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="there is no .venv/clients; make setup makes it")


@dataclass
class Llm:
    """The program, with settings that name the models of a server."""

    world: World
    folder: Path

    def prompt(self, *arguments: str, model: str = "mine", key: str = KEY) -> subprocess.CompletedProcess[str]:
        command = [str(PROGRAM), "prompt", "--no-log", "--key", key, "--model", model, *arguments]
        environment = {"PATH": os.defpath, "HOME": str(self.folder), "LLM_USER_PATH": str(self.folder), "NO_PROXY": "*"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llm]:
    folder = tmp_path_factory.mktemp("llm")
    with open_world(folder, api_keys=(KEY,), comment_seconds=0.02) as world:
        lines = []
        for name, model, completion in (("mine", "a", False), ("text", "a", True), ("unknown", "nobody", False)):
            lines += [f"- model_id: {name}", f"  model_name: {model}", f"  api_base: {world.server.url}/v1", "  api_key_name: sllm", *(["  completion: true"] if completion else [])]
        (folder / "keys.json").write_text(json.dumps({"sllm": KEY}))
        (folder / "extra-openai-models.yaml").write_text("\n".join(lines) + "\n")
        yield Llm(world, folder)


@pytest.mark.parametrize("model", ["mine", "text"])
def test_a_text_streamed_is_the_text_whole(llm: Llm, model: str) -> None:
    given = ("-o", "max_tokens", "20", "-o", "seed", "5", "Once upon a time")
    streamed, whole = llm.prompt(*given, model=model), llm.prompt("--no-stream", *given, model=model)
    assert (streamed.returncode, whole.returncode) == (0, 0), streamed.stderr + whole.stderr
    assert streamed.stdout.strip() and streamed.stdout == whole.stdout
    path, body = ("/v1/completions", {"prompt": "Once upon a time"}) if model == "text" else ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Once upon a time"}]})
    choice = llm.world.send("POST", path, {"model": "a", "max_tokens": 20, "seed": 5, **body}).document["choices"][0]
    assert whole.stdout.strip() == (choice["text"] if model == "text" else choice["message"]["content"]).strip()


def test_it_is_told_what_was_used(llm: Llm) -> None:
    done = llm.prompt("--usage", "-o", "max_tokens", "7", "Hello")
    assert done.returncode == 0 and "7 output" in done.stderr, done.stderr


@pytest.mark.parametrize(("model", "key", "words"), [("unknown", KEY, "there is no model 'nobody'"), ("mine", "wrong", "API key is missing or wrong")])
def test_a_refusal_reaches_its_reader_as_a_sentence(llm: Llm, model: str, key: str, words: str) -> None:
    done = llm.prompt("Hello", model=model, key=key)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
