"""Devices that a graph names in its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

__all__ = ["named_devices", "rename_devices"]


def named_devices(module: nn.Module) -> Iterator[torch.device]:
    """Devices among the constant arguments of the graphs in a module."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                found: list[torch.device] = []
                fx.node.map_aggregate(
                    (node.args, node.kwargs),
                    lambda value: found.append(value) if isinstance(value, torch.device) else None,  # noqa: B023
                )
                yield from found


def rename_devices(module: nn.Module, device: torch.device) -> None:
    """Let the graphs in a module name this device wherever they name one."""

    def renamed(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, renamed)
                node.kwargs = fx.node.map_aggregate(node.kwargs, renamed)
            part.recompile()
