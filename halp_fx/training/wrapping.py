"""What is around the network that is trained: nothing, DistributedDataParallel, or the caller's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halp_fx.errors import InputError

__all__ = ["Wrap", "retire", "wrapping_of"]

Wrap: TypeAlias = Callable[[nn.Module], nn.Module]

_OPTIONS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
)


def wrapping_of(model: nn.Module, wrap: Wrap | None) -> tuple[nn.Module, Wrap]:
    """The model without DistributedDataParallel, and what puts the like around a network.

    Options of DistributedDataParallel are kept; communication hooks are not, for those pass `wrap`.
    """
    if wrap is not None and not callable(wrap):
        raise InputError(f"wrap is {wrap!r}: pass a callable that wraps a network, or None")
    if not isinstance(model, DistributedDataParallel):
        return model, wrap if wrap is not None else _as_it_is
    options: dict[str, Any] = {name: getattr(model, name) for name in _OPTIONS}
    if not model.broadcast_buffers:  # True is the default, and newer torch warns where it is named
        options["broadcast_buffers"] = False
    if not getattr(model, "bucket_bytes_cap_default", False):
        options["bucket_cap_mb"] = model.bucket_bytes_cap / 2**20

    def again(network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network, **options)

    return model.module, wrap if wrap is not None else again


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
