"""Which widths a caller allows: for all groups of channels, or by patterns over their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from halp_fx.errors import InputError
from halp_fx.passes.rules.scope import check_patterns, matches, output_dims, owner_of
from halp_fx.passes.rules.structure import tensor_at
from halp_fx.types import ChannelGroups, Group

__all__ = ["MIN_SHARE", "GroupWidths", "Widths"]

MIN_SHARE = 0.1  # of its units that a group keeps where nothing else is said

Share: TypeAlias = float | Mapping[str, float]
Count: TypeAlias = int | Mapping[str, int]


@dataclass(frozen=True)
class GroupWidths:
    """What one group may keep."""

    min_share: float = 0.0  # of its units
    min_width: int = 0  # channels
    round_to: int | None = None  # channels; None: as suits the group's size


@dataclass(frozen=True)
class Widths:
    """What the groups may keep; each setting is one for all, or a dict pattern -> value.

    A pattern is a glob over the name of a group and over the modules and parameters that give its
    channels. Where several match, the one with the most characters besides wildcards counts, and
    among equals the largest value; where none does, the group is free.

    Raises:
        InputError: a value is out of range or of a wrong type.
    """

    min_share: Share = 0.0  # least share of its units that a group keeps
    min_width: Count = 0  # least number of channels that a group keeps; all where it has fewer
    round_to: Count | None = None  # kept channels are multiples of it, or all; None: chosen

    def __post_init__(self) -> None:
        for value in _values(self.min_share):
            number = not isinstance(value, bool) and isinstance(value, (int, float))
            if not number or not 0 <= value <= 1:
                raise InputError(f"min_share is {value!r}: pass a share from 0 to 1")
        counts = (("min_width", self.min_width, 0), ("round_to", self.round_to, 1))
        for name, setting, least in counts:
            for value in _values(setting):
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise InputError(
                        f"{name} is {value!r}: pass a whole number of channels, at least {least}"
                    )
        for name, setting in self._by_name:
            if isinstance(setting, Mapping) and not all(isinstance(p, str) for p in setting):
                raise InputError(f"{name} has keys that are no text: pass patterns, as 'layer1.*'")

    @property
    def _by_name(self) -> tuple[tuple[str, Any], ...]:
        return (
            ("min_share", self.min_share),
            ("min_width", self.min_width),
            ("round_to", self.round_to),
        )

    def resolve(self, groups: ChannelGroups) -> tuple[GroupWidths, ...]:
        """The settings of each group.

        Raises:
            InputError: a pattern matches nothing, or a least width is more than any group that it
                is for has.
        """
        root = groups.traced.root
        for what, setting in self._by_name:
            if isinstance(setting, Mapping):
                check_patterns(setting, root, what, [g.name for g in groups.groups])
        names = [(group.name, *_producers(root, group)) for group in groups.groups]
        self._check_reach(groups.groups, names)
        return tuple(
            GroupWidths(
                _chosen(self.min_share, own, 0.0),
                _chosen(self.min_width, own, 0),
                _chosen(self.round_to, own, None),
            )
            for own in names
        )

    def _check_reach(self, groups: Sequence[Group], names: Sequence[tuple[str, ...]]) -> None:
        """A least width that no group has is a mistake, not a wish."""
        each = self.min_width if isinstance(self.min_width, Mapping) else {"*": self.min_width}
        for pattern, least in each.items():
            found = [
                (g.units * g.width, g.name)
                for g, own in zip(groups, names, strict=True)
                if any(matches(pattern, name) for name in own)
            ]
            if found and least > max(found)[0]:
                most, widest = max(found)
                raise InputError(
                    f"min_width is {least} for {pattern!r}, but the widest group that it matches "
                    f"({widest!r}) has {most} channels: pass at most that"
                )


def _values(setting: Any) -> Iterable[Any]:
    if isinstance(setting, Mapping):
        return setting.values()
    return () if setting is None else (setting,)


def _chosen(setting: Any, names: Sequence[str], default: Any) -> Any:
    """The value for a group: that of the most specific pattern which matches one of its names."""
    if not isinstance(setting, Mapping):
        return default if setting is None else setting
    found = [
        (sum(c not in "*?[]!" for c in pattern), value)
        for pattern, value in setting.items()
        if any(matches(pattern, name) for name in names)
    ]
    return max(found)[1] if found else default


def _producers(root: nn.Module, group: Group) -> list[str]:
    """The parameters and buffers that give the group's channels, not those that only read them."""
    found = []
    for member in group.members:
        try:
            dims = output_dims(owner_of(root, member.name), tensor_at(root, member.name))
        except AttributeError:  # a constant that tracing added
            dims = (0,)
        if member.dim in dims:
            found.append(member.name)
    return found
