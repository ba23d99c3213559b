"""`nn.MultiheadAttention` spelled out in plain operators, so that its insides can be pruned."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["expand_attention"]


def expand_attention(
    module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `module` while tracing: (output, weights or None), or None where it's not covered.

    Covered: query, key and value of shape (N, L, E) or (L, N, E) by `batch_first`, of one width
    or of several; dropout; a mask of shape (L, S). Not covered: masks of other shapes, of keys,
    added biases and zero rows, a single sequence without a batch.
    """
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask",
             "average_attn_weights", "is_causal")  # fmt: skip
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attn_mask")
    plain = (
        module.bias_k is None
        and not module.add_zero_attn
        and given.get("key_padding_mask") is None
        and given.get("average_attn_weights", True)
        and not (given.get("is_causal", False) and mask is None)
    )
    if not plain or (mask is not None and _example_of(mask).ndim != 2):
        return None
    query, key, value = given["query"], given["key"], given["value"]
    if _is_single(query):
        return None
    if not module.batch_first:
        same = key is query, value is key
        query = query.transpose(0, 1)
        key = query if same[0] else key.transpose(0, 1)
        value = key if same[1] else value.transpose(0, 1)
    projected = _project(module, query, key, value)
    q, k, v = (
        x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2) for x in projected
    )
    need_weights = given.get("need_weights", True)
    mean = None
    if need_weights or mask is not None or module.dropout > 0.0:
        weights = _weights(module, q, k, mask)
        mixed = torch.matmul(weights, v)
        mean = weights.mean(dim=1) if need_weights else None
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    out = module.out_proj(mixed.transpose(1, 2).flatten(-2))
    return (out if module.batch_first else out.transpose(0, 1)), mean


def _project(module: nn.MultiheadAttention, query: Any, key: Any, value: Any) -> tuple[Any, ...]:
    """Queries, keys and values (N, L, heads * head_dim)."""
    bias = module.in_proj_bias
    if module._qkv_same_embed_dim and key is query and value is key:
        packed: tuple[Any, ...] = F.linear(query, module.in_proj_weight, bias).chunk(3, dim=-1)
        return packed
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3, dim=0)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if bias is None else bias.chunk(3, dim=0)
    return tuple(F.linear(x, weights[i], biases[i]) for i, x in enumerate((query, key, value)))


def _weights(module: nn.MultiheadAttention, q: Any, k: Any, mask: Any) -> Any:
    """What each query takes of each key, (N, heads, L, S)."""
    scores = torch.matmul(q * (module.head_dim**-0.5), k.transpose(-2, -1))
    if mask is not None and _example_of(mask).dtype == torch.bool:
        scores = scores.masked_fill(mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1)
    if module.dropout > 0.0:
        # Not by SDPA: its probability is a number, and only a flag follows the module's mode.
        weights = F.dropout(weights, module.dropout, training=module.training)
    return weights


def _is_single(query: Any) -> bool:
    """Whether there is no batch (L, E), as far as that can be told without data."""
    try:
        return _example_of(query).ndim != 3
    except fx.proxy.TraceError:
        return False


def _example_of(tensor: Any) -> torch.Tensor:
    """What a value of the graph is for the example, as far as shape and dtype go."""
    found: torch.Tensor = (
        tensor.tracer.known(tensor.node)  # type: ignore[attr-defined]
        if isinstance(tensor, fx.Proxy)
        else tensor
    )
    return found
