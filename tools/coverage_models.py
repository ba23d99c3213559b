"""Which models a coverage sweep examines, and the smallest sensible inputs for them."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable
from enum import StrEnum
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from halp_fx.errors import DependencyError, InputError
from halp_fx.tools.models import close_matches

__all__ = ["Family", "count_parameters", "example_for", "model_names"]

_SIZES = (64, 96, 128, 160, 224, 256, 288, 299, 384, 448, 512)  # pixels
_CLIPS = ((8, 64), (8, 112), (16, 112), (16, 224))  # frames, pixels


class Family(StrEnum):
    """Models of one kind; `torchvision` is all of its kinds but detection."""

    torchvision = "torchvision"
    classification = "classification"
    segmentation = "segmentation"
    video = "video"
    optical_flow = "optical_flow"
    detection = "detection"
    timm = "timm"


def model_names(
    family: Family,
    *,
    limit: int | None = None,
    names: Iterable[str] = (),
    seed: int = 0,
    max_params: float = 100e6,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Names as `load_model` takes them, `torchvision:...` or `timm:...`.

    Args:
        limit: at most so many. None: every torchvision model; of timm one model for each of its
            architecture files.
        names: these instead, without their library's prefix or with it.
        seed: of the choice among timm's models.
        max_params: of timm only models with at most so many parameters.
        progress: called as `progress("listing", done, total)`.

    Raises:
        DependencyError: the library is not installed.
        InputError: one of `names` is unknown.
    """
    chosen = [name.strip() for name in names if name.strip()]
    if family is Family.timm:
        library = _library("timm", "timm")
        if chosen:
            return _checked("timm", chosen, library.list_models())
        return _timm_sample(library, limit, seed, max_params, progress)
    library = _library("torchvision.models", "vision")
    if chosen:
        return _checked("torchvision", chosen, library.list_models())
    kinds = [k for k in Family if k not in (Family.torchvision, Family.timm, Family.detection)]
    found: list[str] = []
    for kind in kinds if family is Family.torchvision else [family]:
        module = library if kind is Family.classification else getattr(library, kind)
        found.extend(f"torchvision:{name}" for name in library.list_models(module=module))
    return found[:limit]


def example_for(spec: str, model: nn.Module) -> tuple[Any, ...]:
    """The smallest sensible inputs that `model` accepts, batch 1.

    Raises:
        InputError: it accepts none that were tried.
    """
    tried: list[str] = []
    for inputs in _candidates(spec, model):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                model(*inputs)
        except Exception as error:  # noqa: BLE001 (too small an input fails in any way)
            shape = tuple(inputs[0].shape) if isinstance(inputs[0], torch.Tensor) else "a list"
            tried.append(f"{shape}: {_first_line(error)}")
            continue
        return inputs
    raise InputError(f"{spec} accepts none of the inputs that were tried; {'; '.join(tried[-2:])}")


def count_parameters(build: Callable[[], nn.Module]) -> int | None:
    """Parameters of the model that `build` makes, without their memory; None: can't be told."""
    try:
        with torch.random.fork_rng(devices=[]), _Weightless():
            return sum(p.numel() for p in build().parameters())
    except Exception:  # noqa: BLE001 (an initialisation that needs values)
        return None


class _Weightless(TorchFunctionMode):
    """Makes new weights without data; what a model computes its settings from stays real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _library(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{module.partition('.')[0]} is not installed; run 'pip install \"halp-fx[{extra}]\"'"
        ) from error


def _checked(library: str, names: Iterable[str], known: list[str]) -> list[str]:
    found = []
    for name in names:
        name = name.removeprefix(f"{library}:")
        if name not in known:
            raise InputError(f"{library} has no model {name!r}{close_matches(name, known)}")
        found.append(f"{library}:{name}")
    return found


def _timm_sample(
    library: ModuleType,
    limit: int | None,
    seed: int,
    max_params: float,
    progress: Callable[[str, int, int], None] | None,
) -> list[str]:
    """Files in random order, one model of each; then a second model of each, and so on."""
    files: dict[str, list[str]] = {}
    for name in library.list_models(pretrained=False):
        files.setdefault(library.model_entrypoint(name).__module__, []).append(name)
    generator = random.Random(seed)
    order = sorted(files)
    generator.shuffle(order)
    for names in files.values():
        generator.shuffle(names)
    wanted = len(order) if limit is None else limit
    found: list[str] = []
    while len(found) < wanted and any(files.values()):
        for file in order:
            if len(found) == wanted:
                break
            if (name := _next_within(library, files[file], max_params)) is not None:
                found.append(f"timm:{name}")
                if progress is not None:
                    progress("listing", len(found), wanted)
    return found


def _next_within(library: ModuleType, names: list[str], max_params: float) -> str | None:
    """The first of `names` that is small enough; those looked at are taken out."""
    while names:
        name = names.pop(0)
        count = count_parameters(lambda: library.create_model(name, pretrained=False))  # noqa: B023
        if count is None or count <= max_params:
            return name
    return None


def _candidates(spec: str, model: nn.Module) -> Iterable[tuple[Any, ...]]:
    library, _, name = spec.partition(":")
    if library == "timm":
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", {})
        channels, *size = config.get("input_size", (3, 224, 224))
        if not config.get("fixed_input_size", False):
            for side in (s for s in _SIZES if s < min(size)):
                yield (_image(1, channels, side, side),)
        yield (_image(1, channels, *size),)
        return
    models = importlib.import_module("torchvision.models")
    if name in models.list_models(module=models.video):
        yield from ((_image(1, 3, frames, side, side),) for frames, side in _CLIPS)
    elif name in models.list_models(module=models.optical_flow):
        for side in (128, 256):
            yield _image(1, 3, side, side), _image(1, 3, side, side, seed=1)
    elif name in models.list_models(module=models.detection):
        yield ([_image(3, 128, 128)],)
    else:
        yield from ((_image(1, 3, side, side),) for side in _SIZES)


def _image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
