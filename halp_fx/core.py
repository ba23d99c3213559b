"""Networks with Python that can't be traced around a core that can: the core is pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from halp_fx.api import compile, plan_of
from halp_fx.budget import Budget
from halp_fx.cores import Flow, capture, prune_parts, side_by_side, with_outside
from halp_fx.cores import core_of as core_of_parts
from halp_fx.cores import put_back as put_parts_back
from halp_fx.detection import detector_parts, is_detector
from halp_fx.errors import InputError
from halp_fx.passes.rules.structure import structural_copy
from halp_fx.passes.rules.wrappers import unwrapped

__all__ = ["Core", "compile_core", "core_of", "restore_core"]

# One submodule by its name, several, or a function that makes the core of the model.
Core = str | Sequence[str] | Callable[[Any], nn.Module]

# Key of `meta`: for names the graph of the parts, else where the core is, or the core itself.
_CORE = "halp_fx_core"


def compile_core(
    model: nn.Module,
    core: Core,
    budget: float | str | Budget,
    example_inputs: Any,
    *,
    flow: Flow | None = None,
    put_back: Callable[[Any, fx.GraphModule], nn.Module | None] | None = None,
    **options: Any,
) -> nn.Module:
    """Prune the core of a model that can't be traced as a whole; all around it stays.

    The model is run once on `example_inputs`, to see with what it calls the core. Inputs and
    outputs of a core keep their channels, since nobody knows what the Python around does with them.

    Args:
        model: a trained network; it is left as it is.
        core: the name of a submodule, or several names, none inside of another: they are pruned
            together, for one budget. Or a function `core(model) -> nn.Module` that makes the
            core out of (a copy of) the model, then with `put_back`.
        budget: of the core, as in `halp_fx.compile`.
        example_inputs: a tensor or a tuple, positional arguments of the whole model; where `core`
            is a function, those of what it returns.
        flow: for names: `flow(run, *inputs)` calls `run(name, *args)` for each name once, and
            returns all results that are not passed on to other names. It takes the tensors that
            the model calls the first name with. Channels of what is passed on may then go: you
            promise that nothing else in the model reads them (their sizes in space may be read),
            or reads them so that it doesn't matter which and how many there are.
        put_back: `put_back(copied_model, pruned_core)` puts the core of a function into a copy of
            the model; it may return another module to be the result.
        options: as in `halp_fx.compile`. For names without `candidates`, `steps` and scores by
            outputs; `data` holds `(inputs, target)` of the whole model, and `loss`, without which
            there is no `data`, takes the output of the whole model.

    Returns:
        A copy of the model, of the same class, with a smaller core. Names in its `state_dict()`
        are as they were, but for residual branches that were dropped. `plan_of` and `core_of` take
        it.

    Raises:
        InputError: an argument is wrong; a part is not called on the example.
        TraceError: the core can't be traced.
        HalpError: what `halp_fx.compile` raises.

    Example:
        >>> small = halp_fx.compile_core(model, "backbone", 0.5, torch.rand(1, 3, 64, 64))
        >>> small = halp_fx.compile_core(model, ["encoder", "head"], 0.5, x)
        >>> small = halp_fx.compile_core(  # channels between the two may go as well
        ...     model, ["encoder", "head"], 0.5, x,
        ...     flow=lambda run, image: run("head", run("encoder", image)))
    """
    model = unwrapped(model, stacklevel=3)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, not {type(model).__name__}: pass the network itself"
        )
    if callable(core):
        if put_back is None or flow is not None:
            raise InputError(
                "core is a function: pass put_back=callable(copied_model, pruned_core) with it, "
                "and no flow"
            )
        return _compile_function(model, core, budget, example_inputs, put_back, options)
    if put_back is not None:
        raise InputError("put_back is for a core that is a function: leave it out with names")
    names = [core] if isinstance(core, str) else list(core)
    if not names:
        raise InputError("core names nothing: pass the name of a submodule, or several")
    inputs = _positional(example_inputs)
    calls, tensors = capture(model, names, inputs)
    if flow is None:
        flow = side_by_side(calls)
        read = names
    else:
        read = names[:1]
    taken = tuple(t for name in read for t in tensors[name])
    pruned = prune_parts(compile, model, calls, flow, budget, taken, read=read, **options)
    with_outside(pruned, names, inputs, options.get("latency"))
    return pruned


def core_of(pruned: nn.Module) -> fx.GraphModule:
    """The pruned core of a model as one `torch.fx.GraphModule`, which shares its weights.

    Where a function made the core, this is what `put_back` was given. Of parts, what stands
    between them is what the core was pruned with: for detectors with regions of interest a resize
    in place of their pooling. To run such a core is of use for measuring only.

    Raises:
        InputError: the model has no core of ours.
    """
    held = getattr(pruned, "meta", {}).get(_CORE)
    if isinstance(held, fx.Graph) or held is None:
        return core_of_parts(pruned)
    core = dict(pruned.named_modules()).get(held) if isinstance(held, str) else held
    if not isinstance(core, fx.GraphModule):
        raise InputError(
            f"the pruned core was at {held!r} of {type(pruned).__name__}, where there is none now: "
            "take core_of before anything else is put in its place"
        )
    return core


def restore_core(
    model: nn.Module,
    core: fx.GraphModule,
    example_inputs: Any,
    names: Sequence[str] | None = None,
) -> nn.Module:
    """Put a pruned core that was saved back into the dense model that it came from.

    Args:
        model: the model as it was before pruning; its weights outside of the core are kept.
        core: what `core_of` gave, as saved by `halp_fx.save` and loaded by `halp_fx.load`. One
            that a function made goes back by your own `put_back`.
        example_inputs: as they were given for pruning.
        names: the names given as `core` then, in that order; None for detectors of torchvision.

    Returns:
        A copy of the model with the smaller core.

    Raises:
        InputError: the core is not of this model.

    Example:
        >>> halp_fx.save(halp_fx.core_of(pruned), "detector.halp")
        >>> again = halp_fx.restore_core(detector, halp_fx.load("detector.halp"), images)
    """
    if names is None:
        if not is_detector(model):
            raise InputError(f"{type(model).__name__} is no detector: pass the names of its core")
        inputs, names = detector_parts(model, example_inputs)
    else:
        inputs = _positional(example_inputs)
    plan_of(core)
    calls, _ = capture(model, list(names), inputs)
    return put_parts_back(model, calls, core)


def _compile_function(
    model: nn.Module,
    core: Callable[[Any], nn.Module],
    budget: float | str | Budget,
    example_inputs: Any,
    put_back: Callable[[Any, fx.GraphModule], nn.Module | None],
    options: dict[str, Any],
) -> nn.Module:
    made = core(structural_copy(model))
    if not isinstance(made, nn.Module):
        raise InputError(f"core gave a {type(made).__name__}: return a torch.nn.Module")
    small = compile(made, budget, example_inputs, **options)
    copied = copy.deepcopy(model)
    result = put_back(copied, small)
    whole = copied if result is None else result
    known = getattr(whole, "meta", None)
    # By its path where it has one: unlike the module, that holds in copies of a GraphModule too.
    places = (name for name, module in whole.named_modules() if module is small)
    meta: Any = {
        **(known if isinstance(known, dict) else {}),
        "halp_fx": plan_of(small),
        _CORE: next(places, small),
    }
    whole.meta = meta
    return whole


def _positional(example_inputs: Any) -> tuple[Any, ...]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, (tuple, list)) and example_inputs:
        return tuple(example_inputs)
    raise InputError(
        f"example_inputs must be a tensor or a tuple, not {type(example_inputs).__name__}: pass "
        "positional arguments of the whole model"
    )
