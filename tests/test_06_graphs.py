"""Decode steps: the same logits eager, captured lazily and captured up front; the fake's graphs replay as CUDA's do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sllm_mini.device import CpuDevice, get_device
from sllm_mini.device.base import Device
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import DeviceError, ModelError, UnsupportedError
from sllm_mini.inference.graphs import MODES, DecodeSteps, Mode

CAPACITY = 64


def model_of(kind: str = "llama") -> Any:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61,
        "max_position_embeddings": 256,
    }  # fmt: skip
    config = {
        "llama": lambda: LlamaConfig(**shape),
        "qwen3": lambda: Qwen3Config(**shape),
        "window": lambda: MistralConfig(**shape, sliding_window=9),
        "two windows": lambda: Gemma3TextConfig(**shape, sliding_window=9, layer_types=["sliding_attention", "full_attention"]),
    }[kind]()
    return AutoModelForCausalLM.from_config(config).eval()


WINDOWS = {"window": [9, 9], "two windows": [9, None]}


def slots(rows: int = 4) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    keys, values = ([torch.zeros(rows, 2, CAPACITY, 8) for _ in range(2)] for _ in range(2))
    return keys, values


def steps_of(model: Any, device: Device, mode: Mode, **more: Any) -> DecodeSteps:
    return DecodeSteps(model, *slots(), device=device, mode=mode, **{"max_batch": 3, **more})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Work this small only waits for other threads, and on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "mode"), [("llama", "eager"), ("qwen3", "eager"), ("llama", "lazy"), ("window", "lazy"), ("two windows", "upfront")])
def test_steps_give_what_one_pass_gives(kind: str, mode: Mode) -> None:
    model, device = model_of(kind), RecordingRuntime().device()
    tokens = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(1))
    steps = steps_of(model, device, mode, windows=WINDOWS.get(kind))
    with torch.inference_mode():
        expected = model(tokens).logits
        late = 5  # the third row begins later, so that lengths differ
        for at in range(16):
            rows = 3 if at >= late else 2
            places = torch.tensor([at, at, at - late][:rows])
            found = steps(tokens[torch.arange(rows), places], places + 1)
            assert (found - expected[torch.arange(rows), places]).abs().max() < 1e-4
    assert [one.batch for one in steps.captures] == {"eager": [], "lazy": [2, 3], "upfront": [3, 2, 1]}[mode]


def test_capturing_up_front_leaves_what_slots_hold() -> None:
    keys, values = slots()
    for tensor in (*keys, *values):
        tensor.normal_(generator=torch.Generator().manual_seed(3))
    before = [tensor.clone() for tensor in (*keys, *values)]
    DecodeSteps(model_of(), keys, values, device=RecordingRuntime().device(), mode="upfront", max_batch=4)
    assert all(torch.equal(*pair) for pair in zip(before, (*keys, *values), strict=True))


def test_a_step_touches_its_own_rows_only() -> None:
    keys, values = slots()
    steps = DecodeSteps(model_of(), keys, values, device=RecordingRuntime().device(), mode="lazy", max_batch=4)
    steps(torch.tensor([5, 6]), torch.tensor([3, 8]))
    for tensor in (*keys, *values):
        written = tensor.abs().sum((1, 3)).nonzero().tolist()
        assert written == [[0, 2], [1, 7]]


def test_what_cannot_be_captured_is_refused() -> None:
    model = model_of()
    with pytest.raises(UnsupportedError, match="cpu has no CUDA graphs"):
        steps_of(model, CpuDevice(), "lazy")
    assert steps_of(model, CpuDevice(), "eager")(torch.tensor([1]), torch.tensor([1])).shape == (1, 61)
    with pytest.raises(ValueError, match="there are 4 slots"):
        steps_of(model, CpuDevice(), "eager", max_batch=5)
    with pytest.raises(ValueError, match="steps of 1 to 3"):
        steps_of(model, CpuDevice(), "eager")(torch.tensor([1] * 4), torch.tensor([1] * 4))
    with pytest.raises(ModelError, match="takes no logits_to_keep and no position_ids"):
        steps_of(torch.nn.Linear(2, 2), CpuDevice(), "eager")


# The fake's own graphs: wrong host logic must look wrong


def test_a_replay_uses_the_memory_and_the_numbers_of_its_capture() -> None:
    device = RecordingRuntime().device()
    source, target, number = torch.tensor([1.0, 2.0]), torch.zeros(2), 10.0
    replay = device.capture(lambda: target.copy_(source.add(number)[None].squeeze(0)))  # type: ignore[arg-type]
    source.fill_(5.0)
    number = 100.0  # a Python number is baked in
    replay()
    assert target.tolist() == [15.0, 15.0]
    source = torch.tensor([7.0, 7.0])  # and so is where a tensor lies
    replay()
    assert target.tolist() == [15.0, 15.0]


def test_a_capture_cannot_wait_for_the_device() -> None:
    device, numbers = RecordingRuntime().device(), torch.ones(2)
    with pytest.raises(DeviceError, match="a capture cannot wait for the device"):
        device.capture(lambda: numbers.mul_(numbers.sum().item()))  # type: ignore[arg-type]
    again = torch.ones(2)
    device.capture(lambda: again.mul_(2.0))()  # type: ignore[arg-type]
    assert again.tolist() == [8.0, 8.0]  # warm-up, capture, replay: the fake runs all three


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_gpu_steps_give_what_one_pass_gives(mode: Mode) -> None:
    device, model = get_device("cuda"), model_of().cuda()
    keys, values = ([one.cuda() for one in part] for part in slots())
    tokens = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(1)).cuda()
    steps = DecodeSteps(model, keys, values, device=device, mode=mode, max_batch=3)
    with torch.inference_mode():
        expected = model(tokens).logits
        for at in range(16):
            found = steps(tokens[:, at], torch.full((3,), at + 1, device="cuda"))
            assert (found - expected[:, at]).abs().max() < 1e-3
