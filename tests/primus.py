"""Primus (Wald et al., arXiv 2503.01835) written out plainly, in the names of its authors' package."""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int, int]


class PlainAttention(nn.Module):
    """Attention whose queries and keys are complex numbers, turned by the place of their token."""

    def __init__(self, width: int, num_heads: int, normed: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.v_proj, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width) if normed else nn.Identity()

    def forward(self, tokens: Tensor, turns: Tensor) -> Tensor:
        query, key, value = (
            projection(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (
            torch.view_as_real(torch.view_as_complex(one.unflatten(3, (-1, 2)).contiguous()) * turns).flatten(3)
            for one in (query, key)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return self.proj(self.norm((weights @ value).transpose(1, 2).flatten(2)))


class PlainGated(nn.Module):
    """An MLP with gates, and a norm of its hidden channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(width * 8 / 3)
        self.fc1_g, self.fc1_x, self.fc2 = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1_g(tokens)) * self.fc1_x(tokens)))


class PlainPrimusBlock(nn.Module):
    """A block; learned factors and the norm of attention can be left out, as the package allows."""

    def __init__(self, width: int, num_heads: int, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = PlainAttention(width, num_heads, scaled), PlainGated(width)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(width)) if scaled else None for _ in range(2))

    def forward(self, tokens: Tensor, turns: Tensor) -> Tensor:
        first, second = (1 if gamma is None else gamma for gamma in (self.gamma_1, self.gamma_2))
        tokens = tokens + first * self.attn(self.norm1(tokens), turns)
        return tokens + second * self.mlp(self.norm2(tokens))


class PlainPrimus(nn.Module):
    """The network with random weights, all of them of a size that shows in the features.

    Args:
        grid: Tokens along each axis.
        width: Channels of a token.
        depth: Blocks.
        num_heads: Heads.
        edge: Voxels of a token.
        channels: Channels of the input.
        num_registers: Tokens besides, which have positions of their own that are learned, and are not turned.
        scaled: Whether branches have learned factors, and attention a norm.
    """

    def __init__(
        self,
        grid: Grid = (2, 3, 4),
        width: int = 24,
        depth: int = 2,
        num_heads: int = 2,
        *,
        edge: int = 8,
        channels: int = 1,
        num_registers: int = 0,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        self.grid, self.num_heads, self.num_registers = grid, num_heads, num_registers
        self.down_projection, self.eva = nn.Module(), nn.Module()
        self.down_projection.proj = nn.Conv3d(channels, width, edge, edge)
        self.eva.pos_embed = nn.Parameter(torch.empty(1, num_registers + math.prod(grid), width))
        self.eva.blocks = nn.ModuleList(PlainPrimusBlock(width, num_heads, scaled) for _ in range(depth))
        self.eva.norm = nn.LayerNorm(width)
        self.up_projection = nn.Module()
        self.up_projection.decode = nn.Sequential(nn.ConvTranspose3d(width, 8, 2, 2), nn.ConvTranspose3d(8, 3, 4, 4))
        if num_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, num_registers, width))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.register_buffer("mask_token", torch.zeros(1, 1, width))
        self.eval()

    def turns(self) -> Tensor:
        """How far each pair of channels of a head is turned, for each token, as complex numbers of length 1."""
        num_frequencies = self.eva.pos_embed.shape[2] // self.num_heads // 6
        frequencies = [1 / 10_000 ** (number / num_frequencies) for number in range(num_frequencies)]
        places = itertools.product(*map(range, self.grid))
        angles = [[index * one for index in place for one in frequencies] for place in places]
        angles = [[0.0] * 3 * num_frequencies] * self.num_registers + angles
        turned = torch.tensor(angles, dtype=torch.float64)
        return torch.polar(torch.ones_like(turned), turned).to(torch.complex64)

    def features(self, volume: Tensor, *, exchanged: bool = False) -> Tensor:
        """Tokens as a map ``(B, width, ...)``, before the decoder.

        Args:
            volume: The volume, whose axes are those of the grid.
            exchanged: Number the first two axes the other way round, as nnssl does where it pre-trains.
        """
        embedded = self.down_projection.proj(volume)
        if exchanged:
            embedded = embedded.transpose(2, 3)
        tokens = embedded.flatten(2).mT
        if self.num_registers:
            tokens = torch.cat([self.register_tokens.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens, turns = tokens + self.eva.pos_embed, self.turns()
        for block in self.eva.blocks:
            tokens = block(tokens, turns)
        tokens = self.eva.norm(tokens)[:, self.num_registers :]
        features = tokens.mT.unflatten(2, embedded.shape[2:])
        return features.transpose(2, 3) if exchanged else features
