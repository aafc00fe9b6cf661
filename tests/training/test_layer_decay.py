"""Learning rates that fall from the output of the encoder down to its stem."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mim3d.backbones import BACKBONES, Hybrid, create_recipe
from mim3d.backbones.contract import Encoder
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import read_run
from mim3d.training.optim import build_optimizer, layer_lines, layer_scales, set_learning_rate
from mim3d.training.schedule import Optimisation, Schedule, make_schedule
from tests.training.toy_training import OPTIM, ToyObjective, toy_run


def schedule(**settings: float) -> Schedule:
    return make_schedule(Optimisation(learning_rate=1.0, **settings), effective_batch=1, max_steps=10)


class Wrapped(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(2, 2)


def test_the_hybrids_layers_go_block_by_block_from_the_stem_to_the_output() -> None:
    encoder = Hybrid(widths=(4, 8, 16), depths=(1, 2, 3), num_heads=2).build()
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert encoder.num_layers == 7
    assert {
        name.rpartition(".")[0]: layer for name, layer in layers.items() if "embed" in name or "decode" in name
    } == {
        "patch_embed1.proj": 0,
        "patch_embed1.norm": 0,
        "patch_embed2.proj": 2,
        "patch_embed2.norm": 2,
        "patch_embed3.proj": 4,
        "patch_embed3.norm": 4,
        "patch_embed4": 4,
        "stage1_output_decode": 7,
        "stage2_output_decode": 7,
    }
    blocks = {".".join(name.split(".")[:2]): layer for name, layer in layers.items() if name.startswith("blocks")}
    assert list(blocks.values()) == [1, 2, 3, 4, 5, 6]
    assert layers["norm.weight"] == 7


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_every_registered_encoder_names_a_layer_of_every_parameter(name: str) -> None:
    with torch.device("meta"):
        encoder = create_recipe(name).build()
    layers = {encoder.layer_of(parameter) for parameter, _ in encoder.named_parameters()}
    assert layers == set(range(encoder.num_layers + 1))


class Plain(Encoder):
    """An encoder that says nothing of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1))
        self.stem = nn.Linear(2, 2)
        self.low = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)]) for _ in range(2))
        self.down = nn.Linear(2, 2)
        self.high = nn.ModuleList(nn.Linear(2, 2) for _ in range(11))
        self.norm = nn.LayerNorm(2)

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        return [volume_BCXYZ]


def test_an_encoder_that_says_nothing_is_numbered_by_its_module_lists() -> None:
    encoder = Plain()
    assert encoder.num_layers == 14
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters() if not name.endswith("bias")}
    assert layers == {
        "positions": 0,
        "stem.weight": 0,
        "low.0.0.weight": 1,
        "low.1.0.weight": 2,
        "down.weight": 3,
        **{f"high.{number}.weight": 3 + number for number in range(11)},
        "norm.weight": 14,
    }


class Nested(Plain):
    """An encoder whose layers lie in a module of its own, such as one of another library."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Module()
        for name, child in list(self.named_children()):
            delattr(self, name)
            inner.add_module(name, child)
        del self.positions
        inner.positions = nn.Parameter(torch.zeros(1))
        self.body = inner


def test_layers_inside_another_module_are_numbered_as_they_are_outside() -> None:
    outside, inside = Plain(), Nested()
    assert inside.num_layers == outside.num_layers
    layers = {name: inside.layer_of(name) for name, _ in inside.named_parameters()}
    assert layers == {f"body.{name}": outside.layer_of(name) for name, _ in outside.named_parameters()}


def test_scales_are_powers_of_the_decay_and_1_above_the_encoder() -> None:
    module = Wrapped(Plain())
    scales = layer_scales(module, 0.5)
    assert scales["encoder.stem.weight"] == 0.5**14
    assert scales["encoder.high.10.bias"] == 0.5
    assert scales["encoder.norm.weight"] == 1.0
    optimizer = build_optimizer(module, schedule(layer_decay=0.5, weight_decay=0.1))
    names = {parameter: name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(parameter)
            assert group["lr_scale"] == scales.get(name, 1.0)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert not names
    set_learning_rate(optimizer, 0.2)
    set_learning_rate(optimizer, 0.1)
    assert all(group["lr"] == 0.1 * group["lr_scale"] for group in optimizer.param_groups)


@pytest.mark.parametrize("layer_decay", [None, 1.0])
def test_without_decay_there_are_the_two_groups_that_there_always_were(layer_decay: float | None) -> None:
    plain = schedule() if layer_decay is None else schedule(layer_decay=layer_decay)
    groups = build_optimizer(Wrapped(Plain()), plain).param_groups
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]
    assert layer_lines(Wrapped(Plain()), plain) == []


def test_the_range_of_the_scales_is_in_the_manifest(tmp_path: Path) -> None:
    line = "the encoder's layers learn at 0.5 (lowest) to 0.5 (highest) times the learning rate = 0.5 ^ layers above"
    _, _, run = toy_run(tmp_path / "run", optim=replace(OPTIM, layer_decay=0.5))
    assert any(line in each for each in read_run(run.path).manifest["derived"]["derivations"])


def test_lower_layers_move_less_and_the_rest_as_before(tmp_path: Path) -> None:
    """The first step of AdamW moves every weight by its learning rate."""
    settings = {"max_steps": 1, "validating": False, "dropout": 0.0}
    optim = Optimisation(learning_rate=0.01, weight_decay=0.0)
    _, still, _ = toy_run(tmp_path / "still", **settings, optim=replace(optim, learning_rate=0.0))
    _, even, _ = toy_run(tmp_path / "even", **settings, optim=optim)
    _, decayed, _ = toy_run(tmp_path / "decayed", **settings, optim=replace(optim, layer_decay=0.25))
    before = still.state_dict()
    moved = {
        run: {name: (value - before[name]).abs().max() for name, value in objective.state_dict().items()}
        for run, objective in (("even", even), ("decayed", decayed))
    }
    assert float(moved["decayed"]["encoder.proj.weight"]) == pytest.approx(0.0025, rel=1e-3)
    assert float(moved["even"]["encoder.proj.weight"]) == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(decayed.head.weight, even.head.weight)


def test_a_run_with_layer_decay_resumes_to_the_same_bits(tmp_path: Path) -> None:
    settings = {"max_steps": 12, "checkpoint_every": 4, "optim": replace(OPTIM, layer_decay=0.6)}
    _, whole, _ = toy_run(tmp_path / "whole", **settings)
    _, _, run = toy_run(tmp_path / "parts", **settings)
    (run.checkpoints_dir / "step_00000012.pt").unlink()
    _, parts, _ = toy_run(tmp_path / "parts", **settings)
    assert parts.seen == [float(sample) for sample in range(32, 48)]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in parts.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be above 0 and at most 1"),
        ({"layer_decay": 1.1}, "layer_decay is 1.1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; it must be 0 or more and below 1"),
        ({"ema_decay": -0.1}, "ema_decay is -0.1"),
    ],
)
def test_decays_out_of_range_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Optimisation(**settings)  # type: ignore[arg-type]


def test_the_objective_of_the_toy_has_one_layer_below_its_output() -> None:
    assert set(layer_scales(ToyObjective(), 0.5).values()) == {0.5}
