"""Stochastic depth: what is left out, for whom, and that nothing changes where it is off."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from mim3d.backbones import BACKBONES, Hybrid, create_model, create_recipe
from mim3d.backbones.hybrid import HybridEncoder
from mim3d.core.errors import ConfigError
from mim3d.core.settings import resolve, to_named
from mim3d.kernels.depthwise import depthwise_dense
from mim3d.loading.samples import SampleDataset
from mim3d.methods import Method, create_method
from mim3d.nn.blocks import ConvBlock, DropPath, TransformerBlock
from mim3d.objective import Objective
from mim3d.scans.intensity import Intensity
from mim3d.training.memory import StepMemory
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings
from tests.array_scans import random_scan

RECIPE = Hybrid(widths=(6, 12, 24), depths=(1, 2, 2), num_heads=2)


def encoder_of(drop_path: float, *, recompute: bool = False) -> HybridEncoder:
    torch.manual_seed(0)
    return replace(RECIPE, drop_path=drop_path, recompute=recompute).build().double()


def test_chances_grow_linearly_with_depth_up_to_what_was_asked_for() -> None:
    encoder = encoder_of(0.5)
    chances = [module.prob for module in encoder.modules() if isinstance(module, DropPath)]
    assert chances == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(module.prob == 0 for module in encoder_of(0.0).modules() if isinstance(module, DropPath))


def test_samples_lose_a_branch_as_a_whole_and_the_others_keep_more_of_it() -> None:
    torch.manual_seed(0)
    weights = DropPath(0.25).weights(torch.zeros(40, 3, 5), num_samples=10)
    assert weights.shape == (40, 1, 1)
    by_sample = weights.reshape(10, 4)
    assert torch.equal(by_sample, by_sample[:, :1].expand(10, 4))
    assert set(by_sample[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    many = DropPath(0.25).weights(torch.zeros(40_000, 1))
    assert float(many.mean()) == pytest.approx(1.0, abs=0.02)


def block_weights(monkeypatch: pytest.MonkeyPatch, *weights: float) -> None:
    """Let branches count these, in turn, for the samples in their order."""
    given = iter(weights)

    def fixed(self: DropPath, features: Tensor, num_samples: int | None = None) -> Tensor:
        return features.new_full((len(features), *(1,) * (features.ndim - 1)), next(given))

    monkeypatch.setattr(DropPath, "weights", fixed)


def test_a_convolution_block_without_its_branches_is_the_identity_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    block, features = ConvBlock(6, drop_path=0.5), torch.randn(2, 4, 4, 4, 6)
    block_weights(monkeypatch, 0.0, 0.0)
    assert torch.equal(block(features, depthwise_dense), features)


def test_branches_of_a_block_are_weighed_one_by_one_with_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = ConvBlock(6, drop_path=0.5).double()
    features = torch.randn(2, 4, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    block_weights(monkeypatch, 0.5, 2.0)
    ours = block(features, depthwise_dense)
    (grad,) = torch.autograd.grad(ours.square().sum(), features)
    block.eval()
    branch = block.conv2(block.attn(block.conv1(block.norm1(features)), depthwise_dense))
    middle = features + 0.5 * branch
    expected = middle + 2.0 * (block.mlp(middle, block.norm2) - middle)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), features)[0])


def test_branches_of_a_transformer_block_are_weighed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    block, tokens = TransformerBlock(8, 2, drop_path=0.5), torch.randn(2, 5, 8)
    block_weights(monkeypatch, 0.0, 2.0)
    torch.testing.assert_close(block(tokens), tokens + 2.0 * block.mlp(block.norm2(tokens)))


def test_evaluation_leaves_nothing_out_and_zero_draws_nothing() -> None:
    volume, visible = torch.rand(2, 1, 16, 16, 16, dtype=torch.float64), torch.tensor([[0, 3, 5], [1, 2, 7]])
    plain, dropping = encoder_of(0.0), encoder_of(0.5).eval()
    before = torch.get_rng_state()
    for look in (
        lambda encoder: encoder.encode_visible(volume, visible),
        lambda encoder: encoder.feature_maps(volume)[-1],
    ):
        assert torch.equal(look(plain), look(dropping))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dense", [False, True])
def test_volumes_are_left_out_alone_whether_all_or_only_visible_tokens_are_computed(dense: bool) -> None:
    """Two equal volumes give the same tokens exactly where the same branches were drawn for both."""
    encoder = encoder_of(0.5).train()
    one = torch.rand(1, 1, 16, 16, 16, dtype=torch.float64)
    volume, visible = one.expand(2, -1, -1, -1, -1), torch.tensor([[0, 3, 5]]).expand(2, 3)

    def tokens() -> Tensor:
        return encoder.feature_maps(volume)[-1].flatten(2).mT if dense else encoder.encode_visible(volume, visible)

    drawn = []
    for seed in range(20):
        torch.manual_seed(seed)
        first, second = tokens()
        drawn.append(first)
        torch.manual_seed(seed)
        assert torch.equal(tokens()[1], second)
        assert not torch.allclose(first, second)
    assert any(not torch.allclose(drawn[0], other) for other in drawn[1:])


def test_visible_tokens_alone_give_the_dense_result_when_the_same_is_drawn() -> None:
    encoder = encoder_of(0.5).train()
    volume, visible = torch.rand(2, 1, 16, 16, 16, dtype=torch.float64), torch.arange(8).expand(2, 8)
    torch.manual_seed(3)
    dense = encoder.feature_maps(volume)[-1].flatten(2).mT
    torch.manual_seed(3)
    torch.testing.assert_close(encoder.encode_visible(volume, visible), dense)


def test_recomputation_draws_the_same_again() -> None:
    plain, recomputed = encoder_of(0.5), encoder_of(0.5, recompute=True)
    volume, visible = torch.rand(3, 1, 16, 16, 16, dtype=torch.float64), torch.tensor([[0, 3, 5]]).expand(3, 3)
    for encoder in (plain, recomputed):
        torch.manual_seed(5)
        encoder.encode_visible(volume, visible).square().sum().backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_names_and_shapes_of_parameters_stay_the_published_ones() -> None:
    assert encoder_of(0.5).state_dict().keys() == encoder_of(0.0).state_dict().keys()


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_it_is_a_setting_of_every_registered_backbone_and_goes_into_its_card(name: str) -> None:
    recipe = create_recipe({"name": name, "drop_path": 0.2})
    assert resolve(to_named(recipe, BACKBONES), BACKBONES, "backbone") == recipe != create_recipe(name)


def objective_of(method: Method, drop_path: float) -> Objective:
    torch.manual_seed(0)
    return method.build(replace(RECIPE, drop_path=drop_path)).train()


def test_masked_pre_training_draws_it_anew_at_every_step_and_its_memory_is_foreseen() -> None:
    scan = random_scan((32, 32, 32))
    small = {"name": "MiM", "decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
    method = create_method(small).planned(RECIPE, [scan.shape])
    dataset = SampleDataset([scan], method.sampler(RECIPE), Intensity(), 0, None)
    batch = default_collate([dataset[0], dataset[1]])
    losses = []
    for seed in (1, 2, 1):
        objective = objective_of(method, 0.5)
        torch.manual_seed(seed)
        loss = objective(batch, 0.0).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(parameter.grad is not None for parameter in objective.parameters())
    assert losses[0] == losses[2] != losses[1]
    sample = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in dataset[0].items()}
    loop, optim = LoopSettings(max_steps=2, accelerator="cpu"), Optimisation(learning_rate=1e-3)
    plain, dropping = (
        StepMemory(partial(objective_of, method, drop_path), sample, loop, optim).need(2, 1).activations
        for drop_path in (0.0, 0.5)
    )
    assert dropping > plain


@pytest.mark.parametrize("drop_path", [-0.1, 1.0])
def test_a_chance_out_of_range_is_refused(drop_path: float) -> None:
    with pytest.raises(ConfigError, match=f"drop_path is {drop_path}; it must lie between 0 and 1"):
        create_model("hybrid", drop_path=drop_path)
