"""What was pruned and why, for people (Markdown) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from halp_fx.types import ChannelGroups, Pin, Plan

__all__ = ["render_markdown", "summarize", "to_json"]

_SHOWN_TENSORS = 4  # tensors named for each pin in the Markdown report; the JSON has them all


def summarize(plan: Plan) -> dict[str, Any]:
    """The facts of a plan as plain numbers, strings, lists and dicts.

    Args:
        plan: what `halp_fx.plan_of` returns for a network that was pruned or loaded.

    Returns:
        A dict that `json` can write: `model`, `saliency`, `data_free`, `latency_ms` (by the
        table), `measured_ms` (None where the network was not measured), `met` (by measurement, if
        there is one), `also` (the same of each latency that is limited besides), `gap`,
        `value_kept`, `solver`, `state_size` (numbers in the state dict, None where a plan was not
        carried out), `groups`, `pins`, `opaque` and `facts` (what the stages noted). Of a network
        that was loaded, `model`, `groups`, `pins` and `opaque` are None: a file of `halp_fx.save`
        doesn't describe the dense network.
    """
    # None where the network was loaded, whatever the annotation says.
    found = cast("ChannelGroups | None", plan.groups)
    summary = {
        "model": found and found.traced.model_name,
        "saliency": plan.report.get("saliency", "unknown"),
        "data_free": plan.report.get("data_free"),
        "latency_ms": {
            "dense": plan.dense_ms,
            "budget": plan.budget_ms,
            "predicted": plan.predicted_ms,
        },
        "measured_ms": _measured(plan.report),
        "met": plan.report.get("met", plan.predicted_ms <= plan.budget_ms),
        "also": [_further(entry) for entry in plan.report.get("also", ())],
        "gap": plan.gap,
        "value_kept": plan.value / plan.dense_value if plan.dense_value else 0.0,
        "solver": plan.solver,
        "state_size": plan.report.get("state_size"),
        "groups": found and _groups(plan),
        "pins": found and _merge_pins(found.pins),
        "opaque": found and dict(sorted(found.traced.opaque.items())),
        "facts": {name: fact for name, fact in plan.report.items() if name != "state_size"},
    }
    plain = _plain(summary)
    assert isinstance(plain, dict)
    return plain


def to_json(plan: Plan) -> str:
    """The summary of a plan as strict JSON text (numbers that are not finite become strings)."""
    return json.dumps(summarize(plan), indent=2, allow_nan=False) + "\n"


def render_markdown(plan: Plan) -> str:
    """The report that `halp-fx prune` leaves: latency, widths, what had to stay and by whom.

    Of a network that was loaded, latency and the facts of the run alone.
    """
    summary = summarize(plan)
    sections = [
        f"# {summary['model'] or 'Network'}, pruned to a latency budget",
        _verdict(summary),
        _table(("", "dense", "pruned", "ratio"), _size_rows(summary)),
    ]
    if summary["groups"] is not None:
        sections += ["## Groups of channels", _group_text(summary)]
        sections += ["## Channels that had to stay", _pin_text(summary)]
    if summary["opaque"]:
        rows = [(f"`{name}`", why) for name, why in summary["opaque"].items()]
        sections += ["## Modules held whole", _table(("module", "why"), rows)]
    if summary["facts"]:
        rows = [(name, value) for name, value in _flatten(summary["facts"])]
        sections += ["## Facts of the run", _table(("fact", "value"), rows)]
    return "\n\n".join(sections) + "\n"


def _measured(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    if "measured_ms" not in facts:
        return None
    return {
        "dense": facts.get("measured_dense_ms"),
        "budget": facts.get("measured_budget_ms"),
        "pruned": facts["measured_ms"],
        "spread": facts.get("measured_spread_ms"),
    }


def _groups(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": group.name,
            "units": group.units,
            "kept": len(units),
            "width": group.width,
            "inexact": list(group.inexact),
        }
        for group, units in zip(plan.groups.groups, plan.units, strict=True)
    ]


def _merge_pins(pins: tuple[Pin, ...]) -> list[dict[str, Any]]:
    merged: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for pin in pins:
        tensor = {"name": pin.name, "dim": pin.dim, "channels": len(pin.index)}
        merged.setdefault((pin.node, pin.reason, pin.source), []).append(tensor)
    return [
        {"node": node, "reason": reason, "source": source, "tensors": tensors}
        for (node, reason, source), tensors in merged.items()
    ]


def _further(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A latency that is limited besides: measured where it was, else by its table."""
    measured = "measured_ms" in entry
    pruned = entry["measured_ms"] if measured else entry["predicted_ms"]
    budget = entry["measured_budget_ms"] if measured else entry["budget_ms"]
    return {
        "backend": entry["backend"],
        "measured": measured,
        "pruned_ms": pruned,
        "budget_ms": budget,
        "met": entry.get("met", pruned <= budget),
    }


def _verdict(summary: Mapping[str, Any]) -> str:
    latency, measured = summary["latency_ms"], summary["measured_ms"]
    met = "meets" if summary["met"] else "**misses**"
    if measured is None:
        first = (
            f"By the latency table the pruned network takes {_ms(latency['predicted'])} and {met} "
            f"the budget of {_ms(latency['budget'])}; it has not been measured."
        )
    else:
        first = (
            f"Measured, the pruned network takes {_ms(measured['pruned'])}{_spread(measured)} and "
            f"{met} the budget of {_ms(measured['budget'])}; by the latency table it takes "
            f"{_ms(latency['predicted'])}."
        )
    for further in summary["also"]:
        first += (
            f" By {further['backend']} it takes {_ms(further['pruned_ms'])}"
            f"{'' if further['measured'] else ' by the table'} and "
            f"{'meets' if further['met'] else '**misses**'} the budget of "
            f"{_ms(further['budget_ms'])}."
        )
    first += _outside(summary["facts"])
    kind = f"Channels were scored by `{summary['saliency']}`"
    if summary["data_free"]:
        kind += ", from the weights alone: scores from data are better"
    steps = int(summary["facts"].get("steps", 1))
    left = f" that the last of {steps} steps chose from" if steps > 1 else ""
    return (
        f"{first}\n\n{kind}. The `{summary['solver']}` solver kept "
        f"{_percent(summary['value_kept'])} of the saliency{left}, proven to be within "
        f"{_percent(summary['gap'], 2)} of the best choice of widths by the table."
    )


def _outside(facts: Mapping[str, Any]) -> str:
    """What pruning can't make faster, of a model whose core was pruned."""
    if "outside_share" not in facts:
        return ""
    text = (
        f" A call of the whole model takes {_ms(facts['whole_ms'])}, of which "
        f"{_percent(facts['outside_share'])} are outside of what was pruned"
    )
    if "post_processing_share" in facts:
        text += f" and {_percent(facts['post_processing_share'])} post-processing"
    return f"{text}: no pruning makes these faster."


def _spread(measured: Mapping[str, Any]) -> str:
    """Half the interquartile range of the samples beside the dense network's."""
    spread = measured.get("spread")
    return "" if spread is None else f" (+- {_ms(spread)})"


def _size_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    latency, state, groups = summary["latency_ms"], summary["state_size"], summary["groups"]
    rows = [
        (
            "latency by the table",
            _ms(latency["dense"]),
            _ms(latency["predicted"]),
            _ratio(latency["predicted"], latency["dense"]),
        )
    ]
    if summary["measured_ms"] is not None:
        dense, pruned = summary["measured_ms"]["dense"], summary["measured_ms"]["pruned"]
        rows.append(("latency measured", _ms(dense), _ms(pruned), _ratio(pruned, dense)))
    if state is not None:
        dense, kept = state["dense"], state["kept"]
        name = "numbers in the state dict"
        rows.append((name, f"{dense:,}", f"{kept:,}", _ratio(kept, dense)))
    if groups is not None:
        units = sum(group["units"] for group in groups)
        kept = sum(group["kept"] for group in groups)
        rows.append(("channel units that may go", f"{units:,}", f"{kept:,}", _ratio(kept, units)))
    return rows


def _group_text(summary: Mapping[str, Any]) -> str:
    rows = [
        (f"`{g['name']}`", f"{g['kept']}", f"{g['units']}", _ratio(g["kept"], g["units"]))
        for g in summary["groups"]
    ]
    text = _table(("group", "kept", "units", "ratio"), rows)
    inexact = [group for group in summary["groups"] if group["inexact"]]
    if not inexact:
        return text
    lines = [
        f"- `{g['name']}`: " + ", ".join(f"`{node}`" for node in g["inexact"]) for g in inexact
    ]
    return (
        f"{text}\n\nThese groups pass through statistics over channels, so the pruned network "
        "is not the dense one with masked inputs there:\n\n" + "\n".join(lines)
    )


def _pin_text(summary: Mapping[str, Any]) -> str:
    if not summary["pins"]:
        return "None."
    rows = []
    for pin in summary["pins"]:
        tensors = pin["tensors"]
        names = [f"`{t['name']}[{t['dim']}]` ({t['channels']})" for t in tensors[:_SHOWN_TENSORS]]
        if len(tensors) > _SHOWN_TENSORS:
            names.append(f"and {len(tensors) - _SHOWN_TENSORS} more")
        source = f"`{pin['source']}`" if pin["source"] else ""
        rows.append((", ".join(names), f"`{pin['node']}`", pin["reason"], source))
    return _table(("tensor [dim] (channels)", "pinned by node", "reason", "source"), rows)


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(_escape(str(cell)) for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _ms(value: Any) -> str:
    return f"{value:.3f} ms" if isinstance(value, float | int) else str(value)


def _percent(value: Any, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if isinstance(value, float | int) else str(value)


def _ratio(part: Any, whole: Any) -> str:
    return f"{part / whole:.3f}" if isinstance(whole, float | int) and whole else ""


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            rows.append((prefix + name, f"{value:.6g}"))
        elif isinstance(value, list):
            rows.append((prefix + name, ", ".join(map(str, value))))
        else:
            rows.append((prefix + name, str(value)))
    return rows


def _plain(value: Any) -> Any:
    """Plain Python for what stages put into a report."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    return str(value)
