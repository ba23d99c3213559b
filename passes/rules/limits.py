"""What may be limited besides the latency."""

from __future__ import annotations

from halp_fx.passes.rules.counts import mac_counts, parameter_counts, total
from halp_fx.passes.rules.memory import memory_moments, peak
from halp_fx.types import ChannelGroups

__all__ = ["dense_counts"]


def dense_counts(groups: ChannelGroups) -> dict[str, int]:
    """Parameters, multiply-adds and bytes of peak memory of the dense network.

    Returns:
        "params", "macs" and "memory", in the order of `Budget`.
    """
    dense = groups.dense_units
    return {
        "params": total(parameter_counts(groups), dense),
        "macs": total(mac_counts(groups), dense),
        "memory": peak(memory_moments(groups), dense)[0],
    }
