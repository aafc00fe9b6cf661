"""The layers of the networks, channels last, with parameters stored in the published (Conv3d) layout.

Shapes: N samples or token blocks, X Y Z space, C channels, B batch, L tokens, E embedding.
"""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.kernels.residual_mlp import residual_mlp
from mim3d.nn.tokens import RotaryPairs, rotate

#: Longest sequence whose table of attention weights is worth its memory.
WRITTEN_OUT_LENGTH = 512


class DepthwiseConvolution(Protocol):
    """Applies a depth-wise kernel to channels-last features, in whatever layout they are held."""

    def __call__(self, features_NXYZC: Tensor, weight: Tensor, bias: Tensor, /) -> Tensor: ...


class Pointwise(nn.Module):
    """A 1x1x1 convolution, computed as a matrix product over the last axis.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight.flatten(1), self.bias)


class Projection(nn.Module):
    """A convolution whose kernel equals its stride, computed as a matrix product over whole patches.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
        kernel_size: Edge of the patch that becomes one voxel.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, kernel_size, kernel_size, kernel_size))
        # As convolutions begin, in the published networks too. With zeros, what is exactly 0 (air, where intensities
        # are mapped to 0 and more) would stay 0, and the norms that follow multiply its gradient by 300 each.
        bound = (in_dim * kernel_size**3) ** -0.5
        self.bias = nn.Parameter(torch.empty(out_dim).uniform_(-bound, bound))
        # Xavier over the matrix that it really is, as for a linear layer on patches.
        nn.init.xavier_uniform_(self.weight.data.view(out_dim, -1))

    def forward(self, features_NXYZC: Tensor) -> Tensor:
        n, x, y, z, c = features_NXYZC.shape
        k = self.kernel_size
        patches = features_NXYZC.reshape(n, x // k, k, y // k, k, z // k, k, c)
        # Features and weight must agree on the order inside a patch: the smaller of the two is rearranged.
        if features_NXYZC.numel() < self.weight.numel():
            patches, weight = patches.permute(0, 1, 3, 5, 7, 2, 4, 6), self.weight.flatten(1)
        else:
            patches, weight = patches.permute(0, 1, 3, 5, 2, 4, 6, 7), self.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(patches.flatten(4), weight, self.bias)


class PatchEmbed(nn.Module):
    """Non-overlapping patch embedding: projection, LayerNorm, GELU.

    Args:
        in_dim: Channels in.
        out_dim: Channels out.
        kernel_size: Edge of a patch.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int = 2) -> None:
        super().__init__()
        self.proj = Projection(in_dim, out_dim, kernel_size)
        self.norm = nn.LayerNorm(out_dim, eps=1e-5)

    def forward(self, features_NXYZC: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(features_NXYZC)))


class Depthwise(nn.Module):
    """The parameters of a depth-wise convolution; the layout of the features decides how it is applied.

    Args:
        dim: Channels.
        kernel_size: Edge of the kernel.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features_NXYZC: Tensor, depthwise: DepthwiseConvolution) -> Tensor:
        return depthwise(features_NXYZC, self.weight, self.bias)


class DropPath(nn.Module):
    """Leaves a residual branch out of training steps at random, sample by sample (stochastic depth).

    Huang et al. 2016, "Deep Networks with Stochastic Depth". A branch that is kept counts 1 / (1 - prob), so that its
    expectation is what evaluation computes with all branches (there they are scaled in evaluation instead, equation 5).

    Args:
        prob: Chance that a sample goes without the branch.
    """

    def __init__(self, prob: float) -> None:
        super().__init__()
        self.prob = prob

    @property
    def active(self) -> bool:
        """Whether anything is left out: in training, with a chance above 0."""
        return self.training and self.prob > 0

    def weights(self, features: Tensor, num_samples: int | None = None) -> Tensor:
        """What a branch counts for each row of ``features`` ``(N, ...)``: ``(N, 1, ...)``, 0 or 1 / (1 - prob).

        Args:
            features: Rows; those of one sample follow each other.
            num_samples: Samples that the rows belong to, as many each; None where every row is one.
        """
        rows = len(features)
        samples = rows if num_samples is None else num_samples
        kept = features.new_empty(samples).bernoulli_(1 - self.prob) / (1 - self.prob)
        return kept.repeat_interleave(rows // samples).reshape(rows, *(1,) * (features.ndim - 1))

    def extra_repr(self) -> str:
        """The chance."""
        return f"prob={self.prob:g}"


class PointwiseMlp(nn.Module):
    """Two 1x1x1 convolutions with GELU between them, behind a norm and around them the residual.

    Args:
        dim: Channels in and out.
        hidden_dim: Channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Pointwise(dim, hidden_dim)
        self.fc2 = Pointwise(hidden_dim, dim)

    def forward(self, features: Tensor, norm: nn.LayerNorm) -> Tensor:
        weights = (self.fc1.weight.flatten(1), self.fc1.bias, self.fc2.weight.flatten(1), self.fc2.bias)
        return residual_mlp(features, norm.weight, norm.bias, *weights, norm.eps)


class ConvBlock(nn.Module):
    """Masked convolution block: x + conv1x1(dwconv5(visible * conv1x1(LN(x)))), then x + MLP(LN(x)).

    ``visible`` is part of the layout's depth-wise convolution: hidden voxels count as zero there.

    Args:
        dim: Channels.
        mlp_ratio: Hidden channels of the MLP per channel.
        kernel_size: Edge of the depth-wise kernel.
        drop_path: Chance that a sample goes without a branch, in training.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, kernel_size: int = 5, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.conv1 = Pointwise(dim, dim)
        self.attn = Depthwise(dim, kernel_size)
        self.conv2 = Pointwise(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = PointwiseMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, features_NXYZC: Tensor, depthwise: DepthwiseConvolution, num_samples: int | None = None
    ) -> Tensor:
        """Features as they came; ``num_samples`` says how many volumes the ``N`` rows belong to (None: one each)."""
        branch_NXYZC = self.conv2(self.attn(self.conv1(self.norm1(features_NXYZC)), depthwise))
        if not self.drop_path.active:
            return self.mlp(features_NXYZC + branch_NXYZC, self.norm2)
        features_NXYZC = features_NXYZC + self.drop_path.weights(branch_NXYZC, num_samples) * branch_NXYZC
        # The kernel adds the residual itself: weight 0 gives the features back exactly, 1 / (1 - prob) more than all.
        weights = self.drop_path.weights(features_NXYZC, num_samples)
        return torch.lerp(features_NXYZC, self.mlp(features_NXYZC, self.norm2), weights)


def attend(query_BHLd: Tensor, key_BHLd: Tensor, value_BHLd: Tensor) -> Tensor:
    """Softmax attention ``(B, heads, L, d)`` by the faster kernel for the device and precision.

    The library's fused kernel, but for training in bfloat16 on a CPU: there matrix products written out take a quarter
    to a half of its time (benchmarks/attention.py).
    """
    narrow = query_BHLd.dtype == torch.bfloat16 and query_BHLd.device.type == "cpu"
    if not (narrow and query_BHLd.requires_grad and query_BHLd.shape[2] <= WRITTEN_OUT_LENGTH):
        return F.scaled_dot_product_attention(query_BHLd, key_BHLd, value_BHLd)
    scores = (query_BHLd * query_BHLd.shape[-1] ** -0.5) @ key_BHLd.transpose(-2, -1)
    return scores.softmax(-1) @ value_BHLd


class Attention(nn.Module):
    """Multi-head self-attention over all tokens.

    Args:
        dim: Token width.
        num_heads: Heads; must divide ``dim``.
        key_bias: Whether keys have a bias, as queries and values do.
        norm: A norm of what the heads give, before it is projected; none if not given.
        rotary_pairs: Channels of a head that rotary positions turn as a pair.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_bias: bool = True,
        norm: nn.Module | None = None,
        rotary_pairs: RotaryPairs = "halves",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rotary_pairs = rotary_pairs
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        self.query_bias, self.value_bias = (None if key_bias else nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.norm = norm
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_BLE: Tensor, angles_BLd: Tensor | None = None) -> Tensor:
        """Tokens after attention; queries and keys are turned by ``angles`` where given, see :func:`rotate`."""
        batch, length, dim = tokens_BLE.shape
        qkv = self._projected(tokens_BLE).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if angles_BLd is not None:
            query, key = (rotate(vectors, angles_BLd[:, None], self.rotary_pairs) for vectors in (query, key))
        attended = attend(query, key, value).transpose(1, 2).reshape(batch, length, dim)
        return self.proj(attended if self.norm is None else self.norm(attended))

    def _projected(self, tokens_BLE: Tensor) -> Tensor:
        if self.query_bias is None or self.value_bias is None:
            return self.qkv(tokens_BLE)
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        return F.linear(tokens_BLE, self.qkv.weight, bias)


class SingleVoxelNorm(nn.InstanceNorm3d):
    """Instance norm ``(N, C, X, Y, Z)`` that also takes a map of a single voxel, of which the bias is left."""

    def forward(self, features_NCXYZ: Tensor) -> Tensor:
        if math.prod(features_NCXYZ.shape[2:]) > 1:
            return super().forward(features_NCXYZ)
        return self._by_groups(features_NCXYZ)

    def _by_groups(self, features_NCXYZ: Tensor) -> Tensor:
        """A group norm with one channel a group; torch.nn.functional's refuses a single voxel as well.

        Convolutions in bfloat16 give maps channels last, of which its gradient takes twenty times as long.
        """
        return torch.group_norm(features_NCXYZ.contiguous(), self.num_features, self.weight, self.bias, self.eps)


class InstanceNorm(SingleVoxelNorm):
    """The same as a group norm on CPUs, where that takes half the time.

    On a GPU autocast would make float32 of what a group norm gives.
    """

    def forward(self, features_NCXYZ: Tensor) -> Tensor:
        if features_NCXYZ.device.type == "cpu":
            return self._by_groups(features_NCXYZ)
        return super().forward(features_NCXYZ)


class Mlp(nn.Module):
    """Two linear layers with GELU between them.

    Args:
        in_dim: Width in.
        hidden_dim: Width between.
        out_dim: Width out.
        norm: A norm of what lies between; none if not given.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.norm = norm
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(tokens))
        return self.fc2(hidden if self.norm is None else self.norm(hidden))


class SwiGlu(nn.Module):
    """A gated MLP (Shazeer 2020): one linear layer makes gates and values, another brings their product back.

    Args:
        dim: Width in and out.
        hidden_dim: Width between.
        norm: A norm of the product; none if not given.
    """

    def __init__(self, dim: int, hidden_dim: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim)
        self.norm = norm
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.fc1(tokens).chunk(2, dim=-1)
        hidden = F.silu(gate) * value
        return self.fc2(hidden if self.norm is None else self.norm(hidden))


class TransformerBlock(nn.Module):
    """Pre-norm ViT block (Dosovitskiy et al. 2021): x + attention(LN(x)), then x + MLP(LN(x)).

    Args:
        dim: Token width.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP per token width. A gated MLP has two thirds of it, and so as many parameters.
        drop_path: Chance that a sample goes without a branch, in training.
        mlp: Kind of the MLP.
        layer_scale: Start of a learned factor for each channel of a branch (Touvron et al. 2021); none if not given.
        mlp_norm: Whether the hidden channels of the MLP are normed before they are brought back.
        attention_norm: Whether what the heads of attention give is normed before it is projected.
        key_bias: Whether keys of attention have a bias.
        rotary_pairs: Channels of a head that rotary positions turn as a pair.
        norm_eps: What norms add to the variance.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        *,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        layer_scale: float | None = None,
        mlp_norm: bool = False,
        attention_norm: bool = False,
        key_bias: bool = True,
        rotary_pairs: RotaryPairs = "halves",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * mlp_ratio) if mlp == "gelu" else round(dim * mlp_ratio * 2 / 3)
        of_heads = nn.LayerNorm(dim, eps=norm_eps) if attention_norm else None
        of_hidden = nn.LayerNorm(hidden_dim, eps=norm_eps) if mlp_norm else None
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, key_bias=key_bias, norm=of_heads, rotary_pairs=rotary_pairs)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden_dim, dim, of_hidden) if mlp == "gelu" else SwiGlu(dim, hidden_dim, of_hidden)
        self.drop_path = DropPath(drop_path)
        self.scale1, self.scale2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)
        )

    def forward(self, tokens_BLE: Tensor, angles_BLd: Tensor | None = None) -> Tensor:
        tokens_BLE = self._added(tokens_BLE, self.attn(self.norm1(tokens_BLE), angles_BLd), self.scale1)
        return self._added(tokens_BLE, self.mlp(self.norm2(tokens_BLE)), self.scale2)

    def _added(self, tokens_BLE: Tensor, branch_BLE: Tensor, scale_E: Tensor | None) -> Tensor:
        """Tokens plus a branch, which some samples may go without."""
        if scale_E is not None:
            branch_BLE = scale_E * branch_BLE
        if self.drop_path.active:
            branch_BLE = self.drop_path.weights(branch_BLE) * branch_BLE
        return tokens_BLE + branch_BLE


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, as in MAE; for ``module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
