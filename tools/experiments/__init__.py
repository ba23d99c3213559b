"""Experiments on real data, as commands: `halp-fx experiment NAME`."""

__all__: list[str] = []
