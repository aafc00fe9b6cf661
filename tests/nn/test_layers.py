"""Layers compute what their published (Conv3d) counterparts compute, and their gradients are exact."""

import torch
from torch.nn import functional as F

from mim3d.nn.blocks import InstanceNorm, Pointwise, Projection, SingleVoxelNorm
from mim3d.nn.tokens import sincos_positions
from mim3d.nn.volumes import from_blocks, patchify, to_blocks, unpatchify


def test_projection_and_pointwise_equal_convolutions() -> None:
    torch.manual_seed(0)
    volume = torch.randn(2, 3, 8, 4, 12)
    for layer, stride in ((Projection(3, 5, 4), 4), (Pointwise(3, 5), 1)):
        expected = F.conv3d(volume, layer.weight, layer.bias, stride=stride)
        torch.testing.assert_close(
            layer(volume.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3), expected, atol=1e-5, rtol=1e-5
        )


def test_patches_go_back_to_the_same_volume() -> None:
    volume = torch.arange(2 * 2 * 8 * 4 * 12, dtype=torch.float32).reshape(2, 2, 8, 4, 12)
    assert torch.equal(unpatchify(patchify(volume, (4, 4, 4)), (2, 1, 3), (4, 4, 4)), volume)
    assert torch.equal(from_blocks(to_blocks(volume, (4, 4, 4)), (2, 1, 3)).permute(0, 4, 1, 2, 3), volume)


def test_positions_differ_everywhere_and_leftover_channels_are_zero() -> None:
    positions = sincos_positions((3, 4, 2), 20)
    assert positions.shape == (24, 20)
    assert (positions[:, 18:] == 0).all()
    assert len(torch.unique(positions, dim=0)) == 24


def test_instance_norms_take_a_single_voxel_and_do_not_depend_on_the_layout() -> None:
    torch.manual_seed(0)
    volume = torch.randn(2, 16, 5, 6, 7)
    for kind in (SingleVoxelNorm, InstanceNorm):
        norm = kind(16, affine=True)
        torch.nn.init.normal_(norm.bias)
        torch.testing.assert_close(norm(volume[:1, :, :1, :1, :1]).flatten(), norm.bias, atol=1e-3, rtol=0)
        torch.testing.assert_close(norm(volume), F.instance_norm(volume, weight=norm.weight, bias=norm.bias))
    # In bfloat16 convolutions give maps channels last, for which group norms have a gradient that takes far longer.
    for dtype in (torch.float32, torch.bfloat16):
        normed = norm(volume.to(dtype, memory_format=torch.channels_last_3d))
        assert normed.is_contiguous() and torch.equal(normed, norm(volume.to(dtype)))
