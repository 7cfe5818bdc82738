"""The models that a bench loads: a directory, a published shape, or ten thousand small tensors (chapter 02)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.checkpoint.publish import publish
from sllm_mini.checkpoint.safetensors_file import encode_header, read_header
from sllm_mini.checkpoint.shapes import SHAPES
from sllm_mini.errors import CheckpointError

SMALL = "small"
_SMALL_TENSORS = 10_000
_SHARD_NBYTES = 1 << 50  # one file, whatever the size
_RANKS = (8, 16, 32, 64)
_SIZES = (256, 512, 768, 1024, 2048)
_UNSHARDED, _SHARDED = "model.safetensors", "model-*.safetensors"


@dataclass(frozen=True, slots=True)
class Model:
    """A Hugging Face directory to load from. `made` if this bench wrote it; `weights` says what they are."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    tensor_count: int
    nbytes: int
    weights: str
    made: bool

    @property
    def is_whole(self) -> bool:
        """True where a configuration lies beside the tensors, so that a model can be built."""
        return (self.folder / "config.json").exists()


def find_model(name: str, folder: Path, *, seed: int = 0) -> Model:
    """The model that `name` means, written below `folder` if it is a shape or "small" and not there yet.

    Raises CheckpointError for a name that is neither and for a directory without safetensors files, and what
    `make_model` raises.
    """
    home = Path(name)
    if home.is_dir():
        return _described(home.resolve().name, home, "the directory's own", made=False)
    if name == SMALL:
        return _made(name, folder, seed, lambda target: _write_small(target, seed))
    if name in SHAPES:
        from sllm_mini.checkpoint.random_model import make_model

        return _made(name, folder, seed, lambda target: make_model(name, target, seed=seed, max_shard_nbytes=_SHARD_NBYTES))
    raise CheckpointError(f"it is no directory, and no shape has that name; name a Hugging Face directory, {SMALL!r}, or one of {', '.join(SHAPES)}", path=name)


def _made(name: str, folder: Path, seed: int, write: Callable[[Path], object]) -> Model:
    home = folder / f"{name}-seed{seed}"
    made = not home.is_dir()
    if made:
        folder.mkdir(parents=True, exist_ok=True)
        write(home)
    return _described(name, home, f"random weights, seed {seed}", made=made)


def _described(name: str, home: Path, weights: str, *, made: bool) -> Model:
    files = [home / _UNSHARDED] if (home / _UNSHARDED).exists() else sorted(home.glob(_SHARDED))
    if not files:
        raise CheckpointError(f"it holds no {_UNSHARDED}; name a Hugging Face directory with safetensors weights", path=home)
    entries = [entry for file in files for entry in read_header(file)]
    return Model(name, home, tuple(files), len(entries), sum(entry.nbytes for entry in entries), weights, made)


def small_shapes(count: int, seed: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in a collection of LoRA adapters: pairs of a down and an up projection, each with a scale."""
    import numpy as np

    generator = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    number = 0
    while len(shapes) < count:
        rank, inner, outer = (int(generator.choice(sizes)) for sizes in (_RANKS, _SIZES, _SIZES))
        prefix = f"adapters.{number // 64}.layers.{number % 64}"
        shapes |= {f"{prefix}.alpha": (), f"{prefix}.lora_down.weight": (rank, inner), f"{prefix}.lora_up.weight": (outer, rank)}
        number += 1
    return dict(list(shapes.items())[:count])


def _write_small(target: Path, seed: int, count: int = _SMALL_TENSORS) -> None:
    """One safetensors file of many small tensors (float16, scales float32), as the format's own library lays it out:
    wide types first, then by name."""
    import numpy as np

    shapes = small_shapes(count, seed)
    order = sorted(shapes, key=lambda name: (bool(shapes[name]), name))
    kinds = {name: ("F16", np.dtype("<f2")) if shapes[name] else ("F32", np.dtype("<f4")) for name in order}
    sizes = {name: kinds[name][1].itemsize * int(np.prod(shapes[name], dtype=np.int64)) for name in order}
    generator = np.random.default_rng(seed)
    with publish(target) as work, (work / _UNSHARDED).open("wb") as file:
        file.write(encode_header({name: (kinds[name][0], shapes[name], sizes[name]) for name in order}, {"format": "pt"}))
        for name in order:
            kind = kinds[name][1]
            file.write(generator.standard_normal(sizes[name] // kind.itemsize, dtype=np.float32).astype(kind).tobytes())
