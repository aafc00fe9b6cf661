"""A masked autoencoder of nnU-Net's residual-encoder U-Net, as the OpenMind benchmark trains it (Wald et al. 2024)."""

from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn

from mim3d.backbones import ResEnc


class DenseMAE(nn.Module):
    """The network on a volume whose hidden blocks are zero, and the squared error of their voxels.

    Args:
        recipe: Sizes of the encoder.
        edge: Voxels of a hidden block along each axis.
    """

    def __init__(self, recipe: ResEnc, edge: int) -> None:
        super().__init__()
        num_stages = len(recipe.widths)
        self.edge = edge
        self.network = ResidualEncoderUNet(
            recipe.in_channels,
            num_stages,
            list(recipe.widths),
            nn.Conv3d,
            3,
            [1] + [2] * (num_stages - 1),
            list(recipe.depths),
            recipe.in_channels,
            [1] * (num_stages - 1),
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )

    def forward(self, volume_BCXYZ: Tensor, hidden_BL: Tensor) -> Tensor:
        """Loss over hidden voxels.

        Args:
            volume_BCXYZ: The volumes.
            hidden_BL: True for hidden blocks, in raster order.
        """
        grid = [voxels // self.edge for voxels in volume_BCXYZ.shape[2:]]
        hidden = hidden_BL.reshape(len(hidden_BL), 1, *grid).to(volume_BCXYZ.dtype)
        for axis in (2, 3, 4):
            hidden = hidden.repeat_interleave(self.edge, dim=axis)
        predicted: Tensor = self.network(volume_BCXYZ * (1 - hidden))
        return ((predicted - volume_BCXYZ) ** 2 * hidden).sum() / hidden.sum()
