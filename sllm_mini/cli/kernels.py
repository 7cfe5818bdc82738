"""`sllm-mini kernels`: compiles the package's CUDA kernels ahead of time, so that no start ever waits for a compiler."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text, seconds_text

if TYPE_CHECKING:
    from sllm_mini.device.cuda import NvrtcCompiler


def kernels(
    model: Annotated[list[Path] | None, typer.Argument(metavar="[MODEL]...", help="Checkpoints whose attention is built too; default: the shapes of Llama and OPT.")] = None,
    arch: Annotated[list[str] | None, typer.Option("--arch", metavar="SM", help="sm_ and the digits of a compute capability, such as sm_90 for 9.0; repeatable. Default: this machine's GPU, or all that are usual.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Default: csrc/built of this installation, the one place where the package looks for what was built ahead; copy there what you build elsewhere.", file_okay=False)] = None,
    json: JsonOption = False,
) -> None:
    """Compile the CUDA kernels ahead of time. Needs NVRTC and cupy, but no GPU.

    A start looks in csrc/built of the installation first, then in the cache (SLLM_MINI_KERNELS, or sllm_mini/kernels in the user's cache folder), and compiles only then.
    """
    from sllm_mini.device.cuda import NvrtcCompiler
    from sllm_mini.device.kernels_image import KernelFolders, Recipe, build_ahead
    from sllm_mini.errors import ResourceError, UnsupportedError
    from sllm_mini.inference.attention import SOURCE
    from sllm_mini.resources import resource

    for architecture in arch or ():
        if not re.fullmatch(r"sm_\d{2,3}", architecture):
            raise typer.BadParameter(f"--arch {architecture} names no architecture of a GPU; give sm_ and the digits of its compute capability, such as sm_90 for 9.0")
    folder = out or next(iter(KernelFolders.of_user().ahead), None)
    if folder is None:
        raise ResourceError("this installation has no kernels; name a folder with --out and run from a checkout")
    sources, built = resource("csrc"), []
    if importlib.util.find_spec("cupy") is None:
        raise UnsupportedError('cupy is not installed, through which kernels are compiled; pip install "sllm_mini[cuda13]"')
    recipes = []
    for architecture in arch or _architectures():
        recipes += [Recipe.of(sources / name, (), architecture) for name in ("sum64.cu", "xxh3_leaves.cu")]
        recipes += [Recipe.of(sources / SOURCE, options, architecture) for options in _attention_options(model)]
    compiler = NvrtcCompiler()
    if arch:
        _check_known(arch, compiler)
    for recipe, path, seconds in build_ahead(recipes, folder, compiler):
        built.append({"source": recipe.source.name, "options": list(recipe.options), "architecture": recipe.architecture, "path": str(path), "nbytes": path.stat().st_size, "seconds": seconds})
        if not json:
            terminal.stdout_console().print(f"{recipe.source.name} {' '.join(recipe.options)} for {recipe.architecture}: {nbytes_text(path.stat().st_size)} in {seconds_text(seconds)}")
    if json:
        terminal.emit_json({"folder": str(folder), "built": built})


def _check_known(asked: list[str], compiler: NvrtcCompiler) -> None:
    """Raises UnsupportedError for an architecture that this compiler does not make code for."""
    from sllm_mini.errors import UnsupportedError

    version = compiler.version  # raises where there is no NVRTC
    for architecture in asked:
        if architecture not in compiler.architectures:
            raise UnsupportedError(f"--arch {architecture}: {version} makes no code for it; choose among {', '.join(compiler.architectures)}")


def _architectures() -> tuple[str, ...]:
    from sllm_mini.device.cuda import cuda_device, why_no_cuda
    from sllm_mini.device.kernels_image import ARCHITECTURES

    return ("sm_{}{}".format(*cuda_device().properties().compute_capability),) if why_no_cuda() is None else ARCHITECTURES


def _attention_options(models: list[Path] | None) -> list[tuple[str, ...]]:
    from sllm_mini.inference.attention import AttentionShape

    if not models:
        shapes = [AttentionShape(head_dim, group, "bfloat16") for head_dim, group in ((64, 1), (64, 4), (128, 1), (128, 4))]
    else:
        from sllm_mini.checkpoint import open_checkpoint
        from sllm_mini.loading.model import build_skeleton

        skeletons = [build_skeleton(open_checkpoint(path)) for path in models]
        shapes = [AttentionShape.of_config(one.config, str(one.dtype)) for one in skeletons]
    return list(dict.fromkeys(shape.options for shape in shapes))
