"""From a model and a named core to the model with a smaller core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn

from halp_fx.cores.assembly import Flow, assemble
from halp_fx.cores.calls import Call
from halp_fx.cores.data import PartInputs
from halp_fx.cores.outside import split_ms
from halp_fx.cores.put_back import put_back
from halp_fx.cores.whole import scores_of_whole
from halp_fx.errors import InputError
from halp_fx.latency import Backend, OnnxRuntime, Stored, resolve_backend
from halp_fx.minibatches import device_of
from halp_fx.passes.saliency import BY_BOTH, BY_LOSS, BY_OUTPUTS
from halp_fx.types import Plan

__all__ = ["Compile", "prune_parts", "with_outside"]

Compile = Callable[..., fx.GraphModule]  # `halp_fx.compile`, for a network that can be traced


def prune_parts(
    compile: Compile,
    model: nn.Module,
    calls: Mapping[str, Call],
    flow: Flow,
    budget: Any,
    inputs: tuple[torch.Tensor, ...],
    *,
    read: Sequence[str],
    scored: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    saliency: Any = None,
    **options: Any,
) -> nn.Module:
    """Prune parts of `model` together, and put them back into a copy of it.

    Args:
        compile: `halp_fx.compile`.
        flow: how tensors go from part to part.
        inputs: what `flow` takes.
        read: the parts that the model calls with these inputs.
        scored: the model as it is run on `data` for the saliency; None: `model`.
        options: further options of `halp_fx.compile`.

    Raises:
        InputError: as `halp_fx.compile`; or `candidates` or `steps` is not 1.
    """
    refuse_trials(options)
    if data is not None and loss is None:
        raise InputError(
            "data was given without loss, which the core of a model needs: pass "
            "loss=callable(output, target)"
        )
    if isinstance(saliency, str) and saliency in (*BY_BOTH, *BY_OUTPUTS):
        raise InputError(
            f"saliency={saliency!r} is not known for the core of a model, whose own output is no "
            "tensor to differentiate: leave it out, or pass 'fisher', 'taylor1.5' or 'taylor'"
        )
    if data is not None and loss is not None and saliency in (None, *BY_LOSS):
        saliency = scores_of_whole(model if scored is None else scored, data, loss, saliency)
    if options.get("reconstruct") and data is not None and not isinstance(data, Iterator):
        data, loss = PartInputs(model, read, data), None
    core = compile(
        assemble(model, calls, flow, len(inputs)), budget, inputs,
        data=data, loss=loss, saliency=saliency, **options,
    )  # fmt: skip
    return put_back(model, calls, core)


def refuse_trials(options: Mapping[str, Any]) -> None:
    """Nothing can be tried on data by the core alone."""
    for name in ("steps", "candidates"):
        if options.get(name, 1) != 1:
            raise InputError(
                f"{name}={options[name]!r} is not known for the core of a model, which can't be "
                "run on data alone: leave it out"
            )


def with_outside(
    pruned: nn.Module,
    parts: list[str],
    inputs: tuple[Any, ...],
    latency: Any,
    before: str | None = None,
) -> None:
    """Note in the report what the model takes outside of its core, where costs are measured.

    "whole_ms" of one call, "outside_ms" of it outside of the core, with "outside_share"; for a
    model with a part `before` the core, as a detector's transform, "pre_processing_ms",
    "post_processing_ms" and "post_processing_share" besides. What is outside is measured in eager
    PyTorch; the core in the back-end of the plan. Nothing is noted where the back-end measures on
    another kind of device than the model is on, or in another type.
    """
    device = device_of(pruned)
    backend = resolve_backend(latency, device=device).backend
    if not backend.measured or isinstance(backend, Stored) or not _alike(backend, pruned):
        return
    meta = cast(dict[str, Any], pruned.meta)
    plan: Plan = meta["halp_fx"]
    timed = [*parts, *([before] if before is not None else [])]
    whole_ms, ms = split_ms(pruned, timed, inputs, getattr(backend, "threads", None))
    in_torch_ms = sum(ms[name] for name in parts)
    outside_ms = max(whole_ms - in_torch_ms, 0.0)
    core_ms = in_torch_ms
    if backend.name != "torch":
        core_ms = float(plan.report.get("measured_ms", plan.predicted_ms))
    whole_ms = core_ms + outside_ms
    facts = {
        "whole_ms": whole_ms,
        "outside_ms": outside_ms,
        "outside_share": outside_ms / whole_ms,
    }
    if before is not None:
        after_ms = max(outside_ms - ms[before], 0.0)
        facts |= {
            "pre_processing_ms": ms[before],
            "post_processing_ms": after_ms,
            "post_processing_share": after_ms / whole_ms,
        }
    meta["halp_fx"] = replace(plan, report={**plan.report, **facts})


def _alike(backend: Backend, model: nn.Module) -> bool:
    """Whether a back-end measures on the kind of device that a model is on, in its type."""
    own = next(model.parameters(), None)
    kind = "cpu" if own is None else own.device.type
    where = torch.device(getattr(backend, "device", "cpu")).type
    if isinstance(backend, OnnxRuntime) and backend.provider != "CPUExecutionProvider":
        where = "elsewhere"
    dtype = getattr(backend, "dtype", None)
    return where == kind and (own is None or dtype is None or dtype == own.dtype)
