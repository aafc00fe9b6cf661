"""MiM as a whole: children equal slices of their parents, losses by name, gradients where they belong."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from mim3d.backbones import create_recipe
from mim3d.backbones.hybrid import Hybrid
from mim3d.core.errors import ConfigError
from mim3d.loading.loader import Loader
from mim3d.loading.samples import SampleDataset
from mim3d.methods import create_method
from mim3d.methods.crops import draw_origin
from mim3d.methods.mim.hierarchy import Level
from mim3d.methods.mim.method import MiM
from mim3d.methods.mim.objective import MiMObjective, slice_volumes
from mim3d.nn.losses import SQUARED_ERROR, reconstruction_target
from mim3d.nn.tokens import take_tokens
from mim3d.nn.volumes import flip, patchify, resize_image
from mim3d.scans.intensity import Intensity
from tests.array_scans import ArrayScan, random_scan
from tests.batches import on_cpu

BACKBONE = Hybrid(widths=(6, 12, 24), depths=(1, 1, 1), num_heads=2)
DECODER = {"decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
INTENSITY = Intensity(window=(-1000.0, 1000.0))


def nano(**changes: object) -> MiM:
    return MiM(**DECODER, **changes).planned(BACKBONE, [(80, 80, 80)])


def one_batch(method: MiM, scan: ArrayScan, samples: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    dataset = SampleDataset([scan], method.sampler(BACKBONE), INTENSITY, seed, None)
    return default_collate([dataset[index] for index in range(samples)])


def objective_of(method: MiM) -> MiMObjective:
    torch.manual_seed(0)
    return method.build(BACKBONE)


def test_a_child_equals_the_slice_of_its_parents_crop_under_every_flip() -> None:
    scan = random_scan((80, 70, 90))
    method = nano(flip_prob=0.5, intensity_gain=0.0, intensity_bias=0.0)
    for seed in range(8):
        batch = one_batch(method, scan, samples=1, seed=seed)
        coarse, middle, fine = objective_of(method).level_volumes(batch)
        place = batch["place/middle"][0]
        for child, unit in zip(middle, place, strict=True):
            x, y, z = (int(index) * 16 for index in np.unravel_index(int(unit), (2, 2, 2)))
            in_parent = coarse[0, :, x : x + 16, y : y + 16, z : z + 16]
            torch.testing.assert_close(resize_image(child[None], (16, 16, 16))[0], in_parent, atol=1e-6, rtol=1e-5)
        for index, (child, unit) in enumerate(zip(fine, batch["place/fine"][0], strict=True)):
            x, y, z = (int(i) * 8 for i in np.unravel_index(int(unit), (4, 4, 4)))
            in_parent = middle[index // 4, :, x : x + 8, y : y + 8, z : z + 8]
            torch.testing.assert_close(child, resize_image(in_parent[None], (32, 32, 32))[0])


def test_levels_read_from_the_scan_are_the_scans_own_voxels() -> None:
    scan = random_scan((64, 64, 64))
    method = nano(flip_prob=1.0, intensity_gain=0.0, intensity_bias=0.0)
    batch = one_batch(method, scan, samples=1)
    whole = torch.from_numpy(INTENSITY.apply(scan.image, scan.statistics))
    flipped = flip(whole, (True, True, True))
    for child, unit in zip(batch["middle"][0], batch["place/middle"][0], strict=True):
        x, y, z = (int(index) * 32 for index in np.unravel_index(int(unit), (2, 2, 2)))
        torch.testing.assert_close(child, flipped[:, x : x + 32, y : y + 32, z : z + 32])


def test_one_intensity_draw_holds_for_the_whole_hierarchy() -> None:
    scan = ArrayScan(np.zeros((1, 64, 64, 64), dtype=np.float32))
    batch = one_batch(nano(intensity_gain=0.2, intensity_bias=0.1), scan, samples=1)
    values = torch.cat([volume.unique() for volume in objective_of(nano()).level_volumes(batch)])
    assert values.max() - values.min() < 1e-6
    assert abs(values[0] - 0.5) > 1e-4


def test_slices_are_taken_from_their_own_volume() -> None:
    volumes = torch.arange(2 * 4**3, dtype=torch.float32).reshape(2, 1, 4, 4, 4)
    corners = torch.tensor([[0, 1, 2], [2, 2, 2], [1, 0, 0], [0, 0, 0]])
    sliced = slice_volumes(volumes, corners, (2, 1, 2))
    for index, (x, y, z) in enumerate(corners.tolist()):
        assert torch.equal(sliced[index], volumes[index // 2, :, x : x + 2, y : y + 1, z : z + 2])


def test_every_term_is_logged_by_name_and_the_loss_is_their_weighted_sum() -> None:
    method = nano()
    output = objective_of(method)(one_batch(method, random_scan((80, 80, 80))), 0.0)
    logs = {name: float(value) for name, value in output.logs.items()}
    reconstruction = sum(logs[f"loss/{name}"] for name in ("coarse", "middle", "fine"))
    alignment = logs["loss/align_middle"] + logs["loss/align_fine"]
    assert output.loss.item() == pytest.approx(reconstruction + 0.1 * alignment, rel=1e-5)
    assert logs["chance/align_middle"] == pytest.approx(1 / 4)
    assert logs["chance/align_fine"] == pytest.approx(1 / 38)
    assert 0 <= logs["accuracy/align_fine"] <= 1
    assert logs["air"] == 0


def test_the_share_of_air_is_logged_as_the_mean_over_the_batch() -> None:
    batch = one_batch(nano(), random_scan((80, 80, 80)))
    objective = objective_of(nano())
    batch["air"] = torch.tensor([[0.25], [0.5]])
    assert float(objective(batch, 0.0).logs["air"]) == pytest.approx(0.375)
    del batch["air"]
    assert "air" not in objective(batch, 0.0).logs


def test_more_negatives_from_the_batch_lower_the_chance_level() -> None:
    method = nano(negatives="batch")
    output = objective_of(method)(one_batch(method, random_scan((80, 80, 80))), 0.0)
    assert float(output.logs["chance/align_middle"]) == pytest.approx(1 / 8)


@pytest.mark.parametrize("alignment", ["contrastive", "cosine"])
def test_every_parameter_gets_a_gradient(alignment: str) -> None:
    method = nano(alignment=alignment)
    objective = objective_of(method)
    objective(one_batch(method, random_scan((80, 80, 80))), 0.0).loss.backward()
    silent = [
        name for name, parameter in objective.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def test_alignment_reads_the_parents_own_place() -> None:
    """The published loss never reads the parent; here changing only the own place's tokens changes the loss."""
    method = nano()
    objective = objective_of(method)
    batch = one_batch(method, random_scan((80, 80, 80)), samples=1)
    coarse = objective.levels(batch)[0]
    torch.manual_seed(1)
    parent, child = torch.randn(1, 64, 24), torch.randn(4, 64, 24)

    def loss(features: torch.Tensor) -> float:
        return objective.alignment(batch, coarse, 1, features, child)[0].item()

    hidden = batch["hidden/coarse"][0, 0]
    outside = parent.clone()
    outside[0, ~hidden] += 1.0
    inside = parent.clone()
    inside[0, hidden] += torch.randn(int(hidden.sum()), 24)
    assert loss(outside) == loss(parent)
    assert loss(inside) != loss(parent)


def test_constant_child_vectors_align_at_chance() -> None:
    method = nano()
    objective = objective_of(method)
    batch = one_batch(method, random_scan((80, 80, 80)), samples=1)
    constant_parent, child = torch.ones(1, 64, 24), torch.randn(4, 64, 24)
    loss, named = objective.alignment(batch, objective.levels(batch)[0], 1, constant_parent, child)
    assert float(loss) == pytest.approx(math.log(4), rel=1e-4)
    assert float(named["spread/align_middle"]) > 0


def test_one_level_alone_is_a_masked_autoencoder() -> None:
    level = Level(name="middle", footprint=(32, 32, 32), size=(32, 32, 32), mask_ratio=0.6)
    method = nano(levels=(level,))
    objective = objective_of(method)
    batch = one_batch(method, random_scan((80, 80, 80)))
    output = objective(batch, 0.0)
    (only,) = objective.levels(batch)
    encoded = objective.encoder.encode_visible(only.volume_MCXYZ, only.visible_MV)
    features = objective.decoder([(encoded, only.visible_MV)], (4, 4, 4))
    target = take_tokens(patchify(only.volume_MCXYZ, (8, 8, 8)), only.hidden_MH)
    expected = SQUARED_ERROR(objective.decoder.predict(features, only.hidden_MH), reconstruction_target(target))
    assert output.loss.item() == pytest.approx(float(expected), rel=1e-6)


def test_chunks_change_nothing() -> None:
    batch = one_batch(nano(), random_scan((80, 80, 80)))
    whole, chunked = (objective_of(nano(chunk_size=size))(batch, 0.0).loss for size in (None, 3))
    torch.testing.assert_close(whole, chunked)


def test_pictures_show_hidden_tokens_as_hidden_and_visible_ones_as_they_are() -> None:
    method = nano()
    objective = objective_of(method)
    pictures = objective.pictures(one_batch(method, random_scan((80, 80, 80))))
    assert set(pictures) == {
        f"{a}/{b}" for a in ("coarse", "middle", "fine") for b in ("original", "masked", "reconstructed")
    }
    shown = pictures["middle/masked"] != 0
    assert torch.equal(pictures["middle/reconstructed"][shown], pictures["middle/original"][shown])
    assert not torch.equal(pictures["middle/reconstructed"], pictures["middle/original"])


def test_samples_are_the_same_under_any_number_of_workers_and_resumable_anywhere() -> None:
    method = nano()
    scans = [random_scan((70, 70, 70), seed, f"scan{seed}") for seed in range(3)]
    plain = Loader(scans, method.sampler(BACKBONE), INTENSITY, batch_size=2, seed=3)
    workers = Loader(scans, method.sampler(BACKBONE), INTENSITY, batch_size=2, seed=3, num_workers=2)
    first, again = on_cpu(plain.batches(0), 3), on_cpu(workers.batches(0), 3)
    (resumed,) = on_cpu(plain.batches(4), 1)
    ranks = [on_cpu(plain.batches(0, rank=rank, world_size=2), 1)[0] for rank in range(2)]
    for key in first[0]:
        assert all(torch.equal(one[key], other[key]) for one, other in zip(first, again, strict=True))
        assert torch.equal(first[2][key], resumed[key])
        assert torch.equal(first[1][key], ranks[1][key])
    assert not torch.equal(first[0]["coarse"], first[1]["coarse"])


def test_an_epoch_visits_every_scan_once() -> None:
    scans = [random_scan((64, 64, 64), seed, f"scan{seed}") for seed in range(5)]
    dataset = SampleDataset(scans, nano().sampler(BACKBONE), INTENSITY, 0, None)
    epochs = [[dataset._scan_of(epoch * 5 + index).case.id for index in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_crops_stay_in_the_body_and_small_scans_are_padded() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y, z = draw_origin((100, 100, 20), ((20, 40, 0), (90, 60, 20)), (32, 32, 32), rng)
        assert 20 <= x <= 58
        assert 28 <= y <= 40
        assert -12 <= z <= 0


def test_an_idle_level_is_reported_by_name() -> None:
    guesses = {f"guess/{name}": 0.998 for name in ("coarse", "middle", "fine")}
    sentences = nano().idle_parts({"loss/coarse": 0.7, "loss/middle": 0.995, "loss/fine": 0.9, **guesses})
    assert len(sentences) == 1
    assert "middle is idle" in sentences[0] and "alignment_weight" not in sentences[0]


def test_an_idle_level_is_known_where_much_is_air() -> None:
    # Half of what is hidden is constant: who predicts 0 everywhere has half of the loss.
    image = 300 * torch.randn(1, 64, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    image[:, :32] = -1000
    level = Level(name="middle", footprint=(64, 64, 64), size=(64, 64, 64), mask_ratio=0.6)
    method = nano(levels=(level,), flip_prob=0.0)
    batch = one_batch(method, ArrayScan(image))
    hidden = batch["hidden/middle"].reshape(2, 8, 8, 8).float()
    expected = float(hidden[:, 4:].sum() / hidden.sum()) * 511 / 512
    assert float(objective_of(method)(batch, 0.0).logs["guess/middle"]) == pytest.approx(expected, rel=1e-3)
    (sentence,) = method.idle_parts({"loss/middle": 0.499, "guess/middle": 0.5})
    assert sentence.startswith("level middle is idle: its loss ended at 0.499, and that of a constant guess is 0.500")


def test_alignment_that_finds_no_places_is_reported_and_one_that_does_is_not() -> None:
    method = nano()
    healthy = {"loss/align_middle": 0.7, "guess/align_middle": math.log(4), "spread/align_middle": 0.4}
    assert method.idle_parts(healthy) == []
    (idle,) = method.idle_parts({**healthy, "loss/align_middle": 1.38})
    assert idle.startswith(
        "the alignment of level middle is idle: its loss ended at 1.380, and that of a guess is 1.386"
    )
    (collapsed,) = method.idle_parts({**healthy, "loss/align_middle": 1.38, "spread/align_middle": 0.001})
    assert collapsed.startswith("the alignment of level middle has collapsed")
    (alone,) = method.idle_parts({**healthy, "loss/align_middle": 0.0, "guess/align_middle": 0.0})
    assert "no other hidden place" in alone


def test_nothing_is_said_of_what_has_no_weight() -> None:
    method = nano()
    silent = replace(
        method, alignment_weight=0.0, levels=tuple(replace(level, loss_weight=0.0) for level in method.levels or ())
    )
    names = [level.name for level in method.levels or ()]
    logs = {f"{kind}/{name}": 1.0 for kind in ("loss", "guess") for name in (*names, "align_middle")}
    assert len(method.idle_parts(logs)) == len(names) + 1
    assert silent.idle_parts(logs) == []
    # An alignment without a weight cannot be what keeps a level from learning.
    found = {"accuracy/align_middle": 0.9, "chance/align_middle": 0.25}
    sentences = replace(method, alignment_weight=0.0).idle_parts({**logs, **found})
    assert sentences and not any("alignment_weight" in sentence for sentence in sentences)


@pytest.mark.parametrize(("accuracy", "is_blamed"), [(0.77, True), (0.3, False)])
def test_an_idle_level_beside_an_alignment_that_learns_names_its_weight(accuracy: float, is_blamed: bool) -> None:
    logs = {"loss/coarse": 0.99, "guess/coarse": 1.0, "accuracy/align_middle": accuracy, "chance/align_middle": 0.25}
    (sentence,) = nano().idle_parts(logs)
    assert ("lower alignment_weight" in sentence) == is_blamed
    # A network that learned nothing finds places by what its first weights show of them.
    unlearned = {**logs, "loss/align_middle": 1.4, "guess/align_middle": math.log(4)}
    assert not any("alignment_weight" in each for each in nano().idle_parts(unlearned))


def test_the_summary_prints_tokens_alignment_terms_and_padding() -> None:
    text = "\n".join([*nano().summary(BACKBONE, [(80, 80, 80)]), *nano().details(BACKBONE, [(80, 80, 80)])])
    assert "4x4x4 tokens" in text
    assert "alignment terms: 2; padding: 0%" in text


def test_unknown_settings_and_methods_offer_the_nearest() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        create_method({"name": "MiM", "temperatur": 0.2})
    with pytest.raises(ConfigError, match="MiM"):
        create_method("MiN")


def test_the_published_base_network_has_its_parameter_count() -> None:
    with torch.device("meta"):
        objective = MiM().build(create_recipe("hybrid_base"))
    heads = sum(p.numel() for p in objective.project.parameters())
    total = sum(p.numel() for p in objective.parameters()) - heads
    assert total == pytest.approx(68.8e6, rel=0.02)
