"""First weights by which a network can begin to learn."""

import pytest
import torch

from mim3d.backbones import create_model


@pytest.mark.parametrize("name", ["hybrid_nano", "hybrid_tiny", "swin_nano", "swin_tiny", "vit_nano", "primus_nano"])
def test_air_that_is_mapped_to_zero_has_gradients_like_any_other_voxels(name: str) -> None:
    """Huge ones in the first step fill the moments of AdamW, and little is learned by all that follow."""
    norms = []
    for air in (0.0, 1.0):
        torch.manual_seed(0)
        encoder = create_model(name)
        volume = torch.rand(2, 1, 32, 32, 32)
        volume[..., :16] *= 1 - air
        sum((features * torch.randn_like(features)).mean() for features in encoder(volume)).backward()
        grads = [parameter.grad.norm() for parameter in encoder.parameters() if parameter.grad is not None]
        norms.append(float(torch.stack(grads).norm()))
    assert norms[1] < 30 * norms[0]
