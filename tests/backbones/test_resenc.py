"""nnU-Net's residual encoder: the published network to the digit, its names of parameters, and what is built on it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mim3d.backbones import BACKBONES, ResEnc, create_model, create_recipe
from mim3d.core.errors import ConfigError
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.weights import load_into
from tests.labelled import LABELS

RECIPE = ResEnc(widths=(4, 6, 8), depths=(1, 2, 2), in_channels=2)


def published(recipe: ResEnc, num_classes: int) -> nn.Module:
    """The network as nnU-Net's plans describe it, with weights that are nowhere zero."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    num_stages = len(recipe.widths)
    network = ResidualEncoderUNet(
        recipe.in_channels,
        num_stages,
        list(recipe.widths),
        nn.Conv3d,
        3,
        [1] + [2] * (num_stages - 1),
        list(recipe.depths),
        num_classes,
        [1] * (num_stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def test_encoder_and_decoder_are_nnunets_network_with_its_heads(tmp_path):
    torch.manual_seed(0)
    theirs = published(RECIPE, num_classes=3)
    objective = Segmentation().build(RECIPE, LABELS)
    torch.save({"network_weights": theirs.state_dict()}, tmp_path / "checkpoint_final.pth")
    report = load_into(objective.encoder, tmp_path / "checkpoint_final.pth", min_coverage=1.0)
    assert report.coverage == 1.0
    ours = objective.decoder
    for number, (up, block) in enumerate(zip(reversed(ours.ups), reversed(ours.blocks), strict=True)):
        up.load_state_dict(theirs.decoder.transpconvs[number].state_dict())
        convolution = theirs.decoder.stages[number].convs[0]
        block[0].load_state_dict(convolution.conv.state_dict())
        block[1].load_state_dict(convolution.norm.state_dict())
    for head, layer in zip([ours.head, *ours.deep_heads], reversed(theirs.decoder.seg_layers), strict=True):
        head.load_state_dict(layer.state_dict())
    num_values = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(parameter.numel() for parameter in objective.parameters()) == num_values
    volume = torch.randn(2, 2, 8, 12, 16)
    found = ours.heads_of(volume, objective.features(volume))
    for logits, expected in zip(found, theirs(volume), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(objective.logits(volume), found[0])


@pytest.mark.parametrize(
    ("name", "millions", "edge"), [("resenc_s", 24.4, 8), ("resenc_m", 57.1, 16), ("resenc_l", 90.3, 32)]
)
def test_sizes_are_nnunets_presets_by_the_number_of_stages(name, millions, edge):
    with torch.device("meta"):
        encoder = create_model(name)
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert encoder.input_multiple == (edge,) * 3
    assert encoder.strides == tuple(2**stage for stage in range(len(encoder.widths)))


def test_a_file_holds_every_tensor_once():
    state = RECIPE.build().state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)


def test_layers_are_numbered_block_by_block_over_all_stages():
    encoder = RECIPE.build()
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert encoder.num_layers == 5
    assert {name: layer for name, layer in layers.items() if name.endswith("conv1.conv.weight")} == {
        "stages.0.blocks.0.conv1.conv.weight": 1,
        "stages.1.blocks.0.conv1.conv.weight": 2,
        "stages.1.blocks.1.conv1.conv.weight": 3,
        "stages.2.blocks.0.conv1.conv.weight": 4,
        "stages.2.blocks.1.conv1.conv.weight": 5,
    }
    assert layers["stem.convs.0.conv.weight"] == 0
    assert max(layers.values()) == 5


def test_recomputation_changes_no_gradient_and_one_voxel_is_enough():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        encoder = replace(RECIPE, recompute=recompute).build()
        maps = encoder(torch.randn(1, 2, *encoder.input_multiple))
        assert maps[-1].shape == (1, 8, 1, 1, 1)
        sum(features.square().sum() for features in maps).backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_drop_path_rises_with_depth_and_is_off_in_evaluation():
    encoder = replace(RECIPE, drop_path=0.5).build()
    chances = [block.drop_path.drop_prob for stage in encoder.stages for block in stage.blocks]
    assert chances == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    volume = torch.randn(1, 2, 8, 8, 8)
    for module in encoder.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.ones_(module.weight)
    plain = RECIPE.build()
    plain.load_state_dict(encoder.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(encoder.eval()(volume), plain.eval()(volume), strict=True))


def test_a_missing_package_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package dynamic-network-architectures.*'mim3d\[resenc\]'"):
        create_recipe("resenc_s")
    assert create_recipe("hybrid_nano")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"widths": (4, 8), "depths": (1,)}, "one entry per stage"),
        ({"widths": (4, 8), "depths": (1, 0)}, "each from 1 to 1000"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        ResEnc(**settings)


def test_the_decoder_is_planned_for_the_backbone_and_stays_as_given():
    resenc, hybrid = BACKBONES["resenc_nano"], BACKBONES["hybrid_nano"]
    assert (Segmentation().with_decoder(resenc).decoder, Segmentation().with_decoder(hybrid).decoder) == (
        "nnunet",
        "adapter",
    )
    assert Segmentation().with_decoder(resenc).deep_supervision
    assert not Segmentation().with_decoder(hybrid).deep_supervision
    asked = Segmentation(decoder="unet", deep_supervision=True)
    assert asked.with_decoder(resenc) == asked
    decoder = Segmentation(decoder="unet").build(RECIPE, LABELS).decoder
    assert decoder.stem is None, "the encoder has a map of full resolution"
