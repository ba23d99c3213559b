"""A pruned network in one file that opens without the class it came from.

    save -> names (what a file may call), values, graphs, modules, plans -> load

The file is safetensors: the weights under their `state_dict()` names, and the structure as JSON in
the header. Nothing in it is code: functions and classes are looked up by name in an allow-list, so
a file from a stranger can at worst describe a network of ordinary torch operations.
"""

from __future__ import annotations

from halp_fx.recipe.files import FORMAT_VERSION, load, save, save_weights

__all__ = ["FORMAT_VERSION", "load", "save", "save_weights"]
