"""What is around the network that is trained: nothing, DistributedDataParallel, or the caller's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halp_fx.errors import InputError, warn_caller
from halp_fx.passes.rules.wrappers import inside_of

__all__ = ["Wrap", "retire", "wrapping_of"]

Wrap: TypeAlias = Callable[[nn.Module], nn.Module]

# Options that `_options` reads by itself, or that say nothing when a network is wrapped again.
_APART = {
    "module",
    "process_group",
    "device_mesh",
    "broadcast_buffers",
    "forward_sync_buffers",
    "init_sync",
    "check_reduction",
    "bucket_cap_mb",
    "bucket_cap_mb_list",
    "mixed_precision",
    "delay_all_reduce_named_params",
    "param_to_hook_all_reduce",
}


def wrapping_of(model: nn.Module, wrap: Wrap | None) -> tuple[nn.Module, Wrap]:
    """The model without DistributedDataParallel, and what puts the like around a network.

    Raises:
        InputError: an option of DistributedDataParallel can't be had again for another network.
    """
    if wrap is not None and not callable(wrap):
        raise InputError(f"wrap is {wrap!r}: pass a callable that wraps a network, or None")
    _, inside = inside_of(model) or ("", None)
    if isinstance(inside, DistributedDataParallel):
        if wrap is None:
            warn_caller(
                "halp_fx: the compiled model is a DistributedDataParallel, which is kept, but not "
                "compiled: for both pass wrap=lambda net: torch.compile(...) of one around it"
            )
        model = inside
    if not isinstance(model, DistributedDataParallel):
        return model, wrap if wrap is not None else _as_it_is
    if getattr(model, "mixed_precision", None) is not None:
        raise InputError(
            "DistributedDataParallel has mixed_precision, which hangs on the parameters from "
            "before a cut: leave it out and run the network in torch.autocast"
        )
    if wrap is not None:
        return model.module, wrap
    for what, lost in (
        ("communication hooks", getattr(model, "_comm_hooks", None)),
        ("delay_all_reduce_named_params", getattr(model, "_delay_all_reduce_params", None)),
    ):
        if lost:
            raise InputError(
                f"DistributedDataParallel has {what}, which can't be carried over to the network "
                "after a cut: pass wrap=lambda net: ..., which wraps it as you did"
            )
    options = _options(model)
    ignored = sorted(model.parameters_to_ignore)

    def again(network: nn.Module) -> nn.Module:
        if ignored:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, ignored)
        return DistributedDataParallel(network, **options)

    return model.module, again


def _options(model: DistributedDataParallel) -> dict[str, Any]:
    """What it was built with, by the attributes that this version of torch keeps."""
    known = inspect.signature(DistributedDataParallel).parameters
    options = {
        name: getattr(model, name) for name in known if name not in _APART and hasattr(model, name)
    }
    mesh = getattr(model, "device_mesh", None)
    options |= {"process_group": model.process_group} if mesh is None else {"device_mesh": mesh}
    # True is the default, and newer torch warns where it is named. Not its forward_sync_buffers,
    # which would set all processes' buffers to the first one's after each cut.
    if not model.broadcast_buffers:
        options["broadcast_buffers"] = False
    listed = getattr(model, "bucket_bytes_cap_list", None)
    if listed:
        options["bucket_cap_mb_list"] = [size / 2**20 for size in listed]
    elif not getattr(model, "bucket_bytes_cap_default", False):
        options["bucket_cap_mb"] = model.bucket_bytes_cap / 2**20
    return options


def retire(wrapper: nn.Module) -> None:
    """Let nobody run a DistributedDataParallel from before a cut.

    It would run the network as it is now, and leave the gradients of each process its own.
    """
    if isinstance(wrapper, DistributedDataParallel):
        wrapper.register_forward_pre_hook(_outdated)


def _outdated(wrapper: nn.Module, inputs: Any) -> None:  # noqa: ARG001
    raise InputError(
        "this DistributedDataParallel is from before a cut, its gradients would not be brought "
        "together: call pruner.model each time, not a variable of your own"
    )


def _as_it_is(network: nn.Module) -> nn.Module:
    return network
