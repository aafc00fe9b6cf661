"""The hybrid backbone: exact masking, any grid, and the published network to the digit."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.yardstick.dense_mim import DenseEncoder
from mim3d.backbones import create_model, list_models
from mim3d.backbones.hybrid import HybridEncoder
from mim3d.core.errors import ConfigError
from mim3d.nn.decoder import TokenDecoder
from mim3d.nn.losses import SQUARED_ERROR, reconstruction_target
from mim3d.nn.tokens import split_tokens, take_tokens
from mim3d.nn.volumes import patchify
from mim3d.weights.families.mim import MIM
from mim3d.weights.states import HeldWeights


def small_encoder(**changes: object) -> HybridEncoder:
    settings = {
        "widths": (6, 12, 24),
        "depths": (1, 2, 2),
        "num_heads": 2,
    }
    torch.manual_seed(0)
    return create_model("hybrid", **{**settings, **changes}).double()


def shown(hidden: Tensor) -> Tensor:
    return split_tokens(hidden, int(hidden[0].sum()))[0]


def random_mask(batch: int, length: int, ratio: float) -> Tensor:
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).argsort(1)
    return order < round(ratio * length)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(("batch", "grid"), [(1, (3, 3, 3)), (2, (4, 2, 3)), (3, (2, 5, 2))])
def test_visible_tokens_alone_give_the_dense_result_and_its_gradients(
    ratio: float, batch: int, grid: tuple[int, int, int]
) -> None:
    encoder = small_encoder()
    dense = DenseEncoder(encoder.recipe).double()
    dense.load_state_dict(encoder.state_dict())
    volume = torch.rand(batch, 1, *(8 * tokens for tokens in grid), dtype=torch.float64)
    hidden = random_mask(batch, math.prod(grid), ratio)
    expected, ours = dense(volume, hidden), encoder.encode_visible(volume, shown(hidden))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(expected)
    grads, expected_grads = (
        torch.autograd.grad((latents * direction).sum(), list(module.parameters()))
        for latents, module in ((ours, encoder), (expected, dense))
    )
    for (name, _), grad, reference in zip(encoder.named_parameters(), grads, expected_grads, strict=True):
        assert float((grad - reference).abs().max()) <= 1e-6 * float(reference.abs().max()), name


def test_hidden_voxels_do_not_reach_visible_tokens() -> None:
    encoder = small_encoder()
    hidden = random_mask(1, 24, 0.5)
    volume = torch.rand(1, 1, 32, 16, 24, dtype=torch.float64)
    hidden_voxels = hidden.reshape(1, 1, 4, 2, 3)
    for axis in (2, 3, 4):
        hidden_voxels = hidden_voxels.repeat_interleave(8, dim=axis)
    other = torch.where(hidden_voxels, torch.rand_like(volume), volume)
    assert torch.equal(encoder.encode_visible(volume, shown(hidden)), encoder.encode_visible(other, shown(hidden)))


def test_recomputation_changes_no_gradient() -> None:
    plain, recomputed = small_encoder(), small_encoder(recompute=True)
    volume, hidden = torch.rand(1, 1, 16, 16, 16, dtype=torch.float64), random_mask(1, 8, 0.5)
    for encoder in (plain, recomputed):
        encoder.encode_visible(volume, shown(hidden)).square().sum().backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_feature_maps_have_the_promised_strides_and_widths() -> None:
    encoder = small_encoder(in_channels=2)
    maps = encoder.feature_maps(torch.rand(1, 2, 16, 32, 24, dtype=torch.float64))
    for features, stride, width in zip(maps, encoder.strides, encoder.widths, strict=True):
        assert features.shape == (1, width, 16 // stride, 32 // stride, 24 // stride)


def test_an_input_that_is_no_multiple_of_the_stride_is_refused_with_sizes_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"axis Z \(90\) is not a multiple of stride 8; use 88 or 96"):
        small_encoder().feature_maps(torch.rand(1, 1, 16, 16, 90, dtype=torch.float64))


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="hybrid_base"):
        create_model("hybrid_bas")


@pytest.mark.parametrize(
    "name", ["hybrid_nano", "hybrid_tiny", "hybrid_small", "hybrid_base", "hybrid_large", "hybrid_huge"]
)
def test_every_size_has_the_published_make_up(name: str) -> None:
    assert name in list_models()
    with torch.device("meta"):
        encoder = create_model(name)
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
    if name == "hybrid_base":
        assert num_parameters == pytest.approx(34.0e6, rel=0.01)
    assert encoder.input_multiple == ((8, 8, 8) if name == "hybrid_nano" else (16, 16, 16))


@pytest.mark.parametrize(("layout", "name"), [("pretrain_base", "hybrid_base"), ("pretrain_tiny", "hybrid_tiny")])
def test_parameters_have_the_published_names_and_shapes(shared_data: object, layout: str, name: str) -> None:
    facts = shared_data.parent / "facts" / "published_mim_state_dict.json"
    published = json.loads(facts.read_text())[layout]
    with torch.device("meta"):
        encoder = create_model(name)
        decoder = TokenDecoder(encoder.embed_dim, 576, 8, 16, 4096)
    ours = {key: list(value.shape) for key, value in encoder.state_dict().items()}
    ours |= {
        key if key == "mask_token" else f"decoder_{key}": list(value.shape)
        for key, value in decoder.state_dict().items()
    }
    heads = {
        key: shape for key, shape in published.items() if not key.startswith("aggregate_") and "pos_embed" not in key
    }
    assert ours == heads


@pytest.fixture(scope="module")
def published(shared_data: object) -> dict[str, object]:
    """The published network with its recorded weights, and what it gave."""
    folder = shared_data.parent / "vectors"
    state = {key: torch.from_numpy(value) for key, value in np.load(folder / "pretrain_small_state.npz").items()}
    own = MIM.own_tensors(HeldWeights(state))
    encoder = create_model("hybrid_tiny", depths=(1, 1, 1, 2))
    decoder = TokenDecoder(96, 48, 1, 3, 4096)
    for module, prefix in ((encoder, "encoder."), (decoder, "decoder.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)})
    volume = torch.from_numpy(np.load(folder / "input96_uint8.npz")["input"]).float()[None, None] / 255
    recorded = dict(np.load(folder / "pretrain_small_single_level.npz"))
    return {"encoder": encoder, "decoder": decoder, "volume": volume, "recorded": recorded}


@pytest.mark.parametrize("case", ["r60", "blk50"])
@torch.no_grad()
def test_the_published_network_is_reproduced(published: dict, case: str) -> None:
    encoder, decoder, volume, recorded = (published[key] for key in ("encoder", "decoder", "volume", "recorded"))
    hidden = torch.from_numpy(recorded[f"{case}.mask"]) > 0.5

    def close(ours: Tensor, key: str) -> None:
        reference = recorded[key]
        assert np.abs(ours.numpy() - reference).max() <= 1e-5 * np.abs(reference).max(), key

    latent = encoder.encode_visible(volume, shown(hidden))
    order = np.argsort(recorded[f"{case}.ids_keep"][0])
    recorded[f"{case}.sorted"] = recorded[f"{case}.latent"][:, order]
    close(latent, f"{case}.sorted")
    visible, places = split_tokens(hidden, int(hidden.sum()))
    features = decoder([(latent, visible)], (6, 6, 6))
    close(features, f"{case}.decoder_features")
    close(decoder.pred(features)[..., ::16], f"{case}.pred_every16")
    target = patchify(volume, (16, 16, 16))
    close(target[..., ::16], "target_every16")
    predicted, own = decoder.predict(features, places), take_tokens(target, places)
    close(SQUARED_ERROR(predicted, reconstruction_target(own)), f"{case}.loss_norm_pix")
    close(SQUARED_ERROR(predicted, reconstruction_target(own, normalised=False)), f"{case}.loss_raw")
