"""MONAI's masked autoencoder with the loss of the paper (He et al. 2022), as one would train it."""

import math

import torch
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from torch import Tensor, nn

from mim3d.backbones import ViT


class MonaiMAE(nn.Module):
    """The network, and the mean squared error of hidden tokens at mean 0 and variance 1.

    Args:
        encoder: Sizes of the encoder.
        decoder: Width, blocks and heads of the decoder.
        edge: Voxels of a crop along each axis.
        mask_ratio: Hidden share of the tokens.
    """

    def __init__(self, encoder: ViT, decoder: tuple[int, int, int], edge: int, mask_ratio: float) -> None:
        super().__init__()
        width, depth, num_heads = decoder
        self.token_edge = encoder.token_edge
        self.network = MaskedAutoEncoderViT(
            in_channels=encoder.in_channels,
            img_size=edge,
            patch_size=encoder.token_edge,
            hidden_size=encoder.width,
            mlp_dim=int(encoder.width * encoder.mlp_ratio),
            num_layers=encoder.depth,
            num_heads=encoder.num_heads,
            masking_ratio=mask_ratio,
            decoder_hidden_size=width,
            decoder_mlp_dim=4 * width,
            decoder_num_layers=depth,
            decoder_num_heads=num_heads,
            qkv_bias=True,
        )

    def forward(self, volume_BCXYZ: Tensor) -> Tensor:
        """Loss over hidden tokens, which are drawn here."""
        batch, channels, *shape = volume_BCXYZ.shape
        edge = self.token_edge
        x, y, z = (voxels // edge for voxels in shape)
        predicted_BLP, mask_BL = self.network(volume_BCXYZ)
        parts = volume_BCXYZ.reshape(batch, channels, x, edge, y, edge, z, edge).permute(0, 2, 4, 6, 3, 5, 7, 1)
        target_BLP = parts.reshape(batch, x * y * z, math.prod((edge, edge, edge, channels)))
        mean, variance = target_BLP.mean(-1, keepdim=True), target_BLP.var(-1, keepdim=True)
        error_BL = (predicted_BLP - (target_BLP - mean) / torch.sqrt(variance + 1e-6)).square().mean(-1)
        return (error_BL * mask_BL).sum() / mask_BL.sum()
