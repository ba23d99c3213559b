"""Attention in all spellings, transformer layers, windows, recurrent layers, einsum.

Products of activations (q with k) have no consumer's weights to mask: most of these patterns are
held to the oracle that zeroes producers as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, image, pattern, tokens

__all__: list[str] = []


@pattern("attention_by_hand", tokens(), strict=False, free=(("proj.weight", 1), ("up.weight", 0)))
class AttentionByHand(nn.Module):
    """A fused qkv layer, reshape to (3, N, heads, L, head_dim), softmax, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 96), nn.Linear(32, 16)
        self.up, self.down, self.out = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(n, length, 32))
        return self.out(x + self.down(F.gelu(self.up(x))))


@pattern("attention_scale_by_shape", tokens(), strict=False)
class AttentionScaleByShape(nn.Module):
    """1 / sqrt(head_dim) is computed from the tensor: it must stay the dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32)
        self.proj, self.out = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, 4, -1).transpose(1, 2)
        k = self.k(x).view(n, length, 4, -1).transpose(1, 2)
        v = self.v(x).view(n, length, 4, -1).transpose(1, 2)
        scores = torch.matmul(q, k.mT) / q.shape[-1] ** 0.5
        y = torch.matmul(F.softmax(scores, -1), v).transpose(1, 2).flatten(2)
        return self.out(F.relu(self.proj(y)))


@pattern("attention_sdpa", tokens(), strict=False, free=(("proj.weight", 1),))
class AttentionSDPA(nn.Module):
    """F.scaled_dot_product_attention with its default scale, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 96, bias=False), nn.Linear(32, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        n, length, width = q.shape
        q, k, v = (part.view(n, length, 4, width // 4).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(F.relu(self.proj(y.transpose(1, 2).reshape(n, length, width))))


@pattern("attention_many_heads", tokens(), strict=False, free=(("q.weight", 0), ("proj.weight", 1)))
class AttentionManyHeads(nn.Module):
    """More heads than channels of each: whole heads go."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32)
        self.proj, self.out = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (f(x).unflatten(-1, (8, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(F.relu(self.proj(y)))


@pattern("attention_values", tokens(), free=(("v.weight", 0),), whole=(("out.weight", 0),))
class AttentionValues(nn.Module):
    """Weights come from the input alone: only the values have channels to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.mix, self.out = nn.Linear(16, 48), nn.Linear(48, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        weights = torch.bmm(x, x.transpose(1, 2)).softmax(-1)
        return self.out(F.relu(self.mix(torch.bmm(weights, self.v(x)))))


@pattern("multihead_attention", tokens(), strict=False, free=(("up.weight", 0),))
class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention, batch first, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.out = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        y, _ = self.attention(x, x, x, need_weights=False)
        x = x + y
        return self.out(x + self.down(F.gelu(self.up(x))))


@pattern(
    "multihead_cross",
    lambda: (torch.randn(2, 5, 16), torch.randn(2, 7, 24)),
    strict=False,
    free=(("attention.out_proj.weight", 1), ("attention.q_proj_weight", 0), ("up.weight", 0)),
)
class MultiheadCross(nn.Module):
    """Keys and values of another width, and the attention weights as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, kdim=24, vdim=24, batch_first=True)
        self.up, self.out = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        y, weights = self.attention(x, memory, memory)
        return self.out(F.relu(self.up(y + x))), weights


@pattern(
    "multihead_masked",
    tokens(),
    strict=False,
    free=(("attention.out_proj.weight", 1), ("embed.weight", 0)),
)
class MultiheadMasked(nn.Module):
    """A causal mask and dropout in nn.MultiheadAttention."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(16, 16), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 4, dropout=0.2, batch_first=True)
        self.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        y, _ = self.attention(x, x, x, attn_mask=self.mask, need_weights=False)
        return self.out(F.relu(x + y))


def _layer(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.1, activation="gelu", batch_first=True, norm_first=norm_first
    )
    return nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 4))


_LAYER_FREE = (("0.weight", 0), ("1.self_attn.out_proj.weight", 1), ("1.linear1.weight", 0))


@pattern("transformer_layer", tokens(), strict=False, norm_stats=True, free=_LAYER_FREE)
def transformer_layer() -> nn.Module:
    """nn.TransformerEncoderLayer, norm last."""
    return _layer(norm_first=False)


@pattern("transformer_layer_norm_first", tokens(), strict=False, norm_stats=True, free=_LAYER_FREE)
def transformer_layer_norm_first() -> nn.Module:
    """nn.TransformerEncoderLayer, norm first."""
    return _layer(norm_first=True)


@pattern("vit", strict=False, norm_stats=True, free=(("up.weight", 0),))
class ViT(nn.Module):
    """Patch embedding, class token, position embedding, one block, head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16) * 0.1)
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm_b, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.last, self.out = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], dim=1) + self.position
        z = self.norm(y)
        y = y + self.attention(z, z, z, need_weights=False)[0]
        y = y + self.down(F.gelu(self.up(self.norm_b(y))))
        return self.out(self.last(y)[:, 0])


@pattern("non_local", strict=False, free=(("stem.0.weight", 0),))
class NonLocal(nn.Module):
    """Attention over space by bmm, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 16)
        self.q, self.k, self.v = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.back, self.out = nn.Conv2d(8, 16, 1), Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        n, _, h, w = x.shape
        q = self.q(x).view(n, -1, h * w).permute(0, 2, 1)
        k = self.k(x).view(n, -1, h * w)
        v = self.v(x).view(n, -1, h * w).permute(0, 2, 1)
        y = torch.bmm(torch.bmm(q, k).softmax(-1), v)
        return self.out(x + self.back(y.permute(0, 2, 1).reshape(n, -1, h, w)))


@pattern("channel_attention", strict=False, whole=(("a.0.weight", 0),))
class ChannelAttention(nn.Module):
    """Attention between channels (DANet): a softmax over them, so they all stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.out = cbr(3, 32), cbr(32, 8), cbr(8, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(self.stem(x)).flatten(2)
        y = torch.bmm(torch.bmm(y, y.transpose(1, 2)).softmax(-1), y)
        return self.out(self.b(y.view(y.shape[0], -1, 8, 8)))


@pattern("swin_window", strict=False, norm_stats=True, free=(("up.weight", 0),))
class SwinWindow(nn.Module):
    """Shifted windows with a position bias by index, then patch merging."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 1), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(49, 2) * 0.1)
        self.register_buffer("index", torch.randint(0, 49, (256,)))
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.merge_norm, self.merge = nn.LayerNorm(64), nn.Linear(64, 32, bias=False)
        self.out = nn.Linear(32, 5)

    def attend(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = torch.roll(x, (-2, -2), (1, 2))
        x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        qkv = self.qkv(x).reshape(x.shape[0], 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.table[self.index].view(16, 16, 2).permute(2, 0, 1)
        scores = (q * (c // 2) ** -0.5) @ k.transpose(-2, -1) + bias
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c))
        y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(y, (2, 2), (1, 2))

    def forward(self, x: Tensor) -> Any:
        y = self.patch(x).permute(0, 2, 3, 1)
        y = y + self.attend(self.norm(y))
        y = y + self.down(F.gelu(self.up(y)))
        parts = [y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        y = self.merge(self.merge_norm(torch.cat(parts, -1)))
        return self.out(y.mean((1, 2)))


@pattern("patch_merging", free=(("a.0.weight", 0), ("merge.weight", 0)))
class PatchMerging(nn.Module):
    """Four neighbours become channels, a linear layer reduces them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.merge = cbr(3, 16), nn.Linear(64, 24, bias=False)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).permute(0, 2, 3, 1)
        n, h, w, c = y.shape
        y = y.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.out(F.gelu(self.merge(y)).mean((1, 2)))


@pattern("lstm", tokens(), free=(("out.0.weight", 0),))
class LSTM(nn.Module):
    """nn.LSTM, bidirectional; it may be held whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn = nn.Linear(16, 24), nn.LSTM(24, 12, batch_first=True, bidirectional=True)
        self.out = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Any:
        y, (hidden, _) = self.rnn(F.relu(self.a(x)))
        return self.out(y[:, -1] + hidden.transpose(0, 1).flatten(1))


@pattern("gru", image(3, 8, 8))
class GRU(nn.Module):
    """Columns of a feature map as a sequence, as text recognition does; two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn = cbr(3, 16), nn.GRU(16, 12, num_layers=2, batch_first=True)
        self.b, self.out = nn.Linear(12, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        y, _ = self.rnn(self.a(x).mean(2).transpose(1, 2))
        return self.out(F.relu(self.b(y)))


@pattern("einsum", tokens(), columns={"weight": (0,), "mix": (1,)})
class Einsum(nn.Module):
    """Contractions by einsum, weights as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 32)
        self.weight = nn.Parameter(torch.randn(32, 24) * 0.2)
        self.mix = nn.Parameter(torch.randn(4, 24) * 0.2)

    def forward(self, x: Tensor) -> Any:
        y = torch.einsum("nlc,cd->nld", F.relu(self.a(x)), self.weight)
        return torch.einsum("nld,kd->nlk", F.relu(y), self.mix)


@pattern("matmul_weights", tokens(), columns={"weight": (0,), "last": (0,)})
class MatmulWeights(nn.Module):
    """The operator @, torch.addmm and weights that are transposed on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32) * 0.2)
        self.middle = nn.Parameter(torch.randn(24, 32) * 0.2)
        self.last = nn.Parameter(torch.randn(24, 4) * 0.2)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        y = F.relu(F.relu(x @ self.weight) @ self.middle.t()).mean(1)
        return torch.addmm(self.shift, y, self.last)
