"""`nn.MultiheadAttention` spelled out in plain operators, so that its insides can be pruned."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["expand_attention"]


def expand_attention(
    module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `module` while tracing: (output, weights or None), or None where it's not covered.

    Covered: query, key and value of shape (N, L, E) or (L, N, E) by `batch_first`, one packed
    `in_proj_weight`, no masks, no added bias or zero rows.
    """
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask",
             "average_attn_weights", "is_causal")  # fmt: skip
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    plain = (
        module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
        and given.get("key_padding_mask") is None
        and given.get("attn_mask") is None
        and not given.get("is_causal", False)
        and given.get("average_attn_weights", True)
        and module.dropout == 0.0
    )
    if not plain:
        return None
    query, key, value = given["query"], given["key"], given["value"]
    weight, bias = module.in_proj_weight, module.in_proj_bias
    heads, width = module.num_heads, module.head_dim
    if not module.batch_first:
        same = key is query, value is key
        query = query.transpose(0, 1)
        key = query if same[0] else key.transpose(0, 1)
        value = key if same[1] else value.transpose(0, 1)
    if key is query and value is key:
        packed = F.linear(query, weight, bias)
        q, k, v = packed.chunk(3, dim=-1)
    else:
        weights = weight.chunk(3, dim=0)
        biases = (None, None, None) if bias is None else bias.chunk(3, dim=0)
        q, k, v = (F.linear(x, weights[i], biases[i]) for i, x in enumerate((query, key, value)))
    q, k, v = (x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (q, k, v))
    if given.get("need_weights", True):
        scores = torch.matmul(q * (width**-0.5), k.transpose(-2, -1)).softmax(dim=-1)
        mixed, mean = torch.matmul(scores, v), scores.mean(dim=1)
    else:
        mixed, mean = F.scaled_dot_product_attention(q, k, v), None
    out = module.out_proj(mixed.transpose(1, 2).flatten(-2))
    return (out if module.batch_first else out.transpose(0, 1)), mean
