"""Loading of teachers: one file for each family of diffusers pipelines.

A family is a module of this package with `PIPELINES`, the class names it serves, and
`load(folder, source, device, dtype) -> Teacher`, which imports the pipeline when called. A new file is found by itself.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError

from carv_attrib.config import TeacherDtype, check_choice
from carv_attrib.errors import ArgumentError, TeacherError
from carv_attrib.teacher import Teacher

PACKAGED = {"demo": "teacher", "demo-pixels": "pixel_teacher"}
"""Teachers that come with the package, and their folders in `carv_attrib/demo`."""


def load_teacher(source: str | Path, *, device: str = "auto", dtype: TeacherDtype = "float32") -> Teacher:
    """Return the frozen teacher saved at a local folder or hub id, from safetensors only.

    Args:
        source: folder of a diffusers pipeline (with `model_index.json`), a hub id, or a packaged teacher: `demo`, or
            `demo-pixels` in pixel space.
        device: auto (CUDA where there is one, else the CPU), or a torch device.
        dtype: of weights and activations.

    Raises:
        ArgumentError: for a device or dtype that does not exist here.
        TeacherError: if the pipeline is missing, is not supported, or has no safetensors weights.
    """
    check_choice("dtype", dtype, TeacherDtype)
    folder = _local_folder(str(source))
    source = str(folder.resolve()) if folder == Path(source) else str(source)  # a relative path is of no use later
    name = _pipeline_class(folder)
    families = {pipeline: module for module in _families() for pipeline in module.PIPELINES}
    if name not in families:
        raise TeacherError(
            f"{source} is a {name}, which is not supported; supported are {', '.join(sorted(families))}."
        )
    _check_weights(folder)
    place = resolve_device(device)
    try:
        with _quiet_diffusers():
            teacher: Teacher = families[name].load(folder, source, place, getattr(torch, dtype))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as err:
        raise TeacherError(f"{source} cannot be loaded as a {name}: {' '.join(str(err).split())}") from err
    return teacher


def resolve_device(device: str) -> torch.device:
    """Return the torch device that `device` names.

    Raises:
        ArgumentError: if there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as err:
        raise ArgumentError(f"`device` {device!r} cannot be used here; use auto or cpu.") from err
    return resolved


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Hide the progress bars of diffusers, and leave them as they were."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _families() -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def _local_folder(source: str) -> Path:
    """Return the folder that holds the pipeline; a hub id is downloaded, or found in the cache, without pickles."""
    if source in PACKAGED:
        return Path(__file__).parent.parent / "demo" / PACKAGED[source]
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise TeacherError(f"`teacher` {source} is not a folder; give the folder of a diffusers pipeline or a hub id.")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(source, use_safetensors=True))
    except (OSError, ValueError) as err:
        reason = " ".join(str(err).split())[:200]
        raise TeacherError(
            f"`teacher` {source} is neither a folder nor a hub id that can be reached: {reason}"
        ) from err


def _pipeline_class(folder: Path) -> str:
    index = folder / "model_index.json"
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise TeacherError(f"{folder} holds no diffusers pipeline: {index.name} is missing or unreadable.") from err


def _check_weights(folder: Path) -> None:
    """Refuse a folder where a component has only pickled weights."""
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        names = [path.name for path in component.iterdir()]
        if any(n.endswith((".bin", ".pt", ".ckpt")) for n in names) and not any(
            n.endswith(".safetensors") for n in names
        ):
            raise TeacherError(
                f"{component} has no safetensors weights, only pickled ones, which are never read; "
                "convert it with `save_pretrained(..., safe_serialization=True)`."
            )
