"""Weights files as training scripts write them: read to the same tensors, or refused in one true sentence."""

import io
import json
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mim3d
from mim3d.backbones import BACKBONES, create_model
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.settings import to_named
from mim3d.nn.tokens import sincos_positions
from mim3d.weights import load_encoder, load_into, read_card, save_network
from mim3d.weights.families.mim import MIM
from mim3d.weights.states import HeldWeights, read_state
from mim3d.workflows.shared.initialisation import initialise

SETTINGS = {"widths": (6, 12, 24), "depths": (1, 1, 2), "num_heads": 2}


def encoder_of(seed: int = 0, **changes: Any) -> mim3d.backbones.Encoder:
    torch.manual_seed(seed)
    return create_model("hybrid", **{**SETTINGS, **changes})


STATE = encoder_of().state_dict()


class Logger:
    """A class of somebody's script."""

    def __init__(self) -> None:
        self.values = deque([1.0, 2.0])


class Lines(list):
    """A list of somebody's script."""


class Settings(dict):
    """A mapping of somebody's script."""


def under(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def rest() -> dict[str, Any]:
    """What scripts keep beside the weights."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "best": np.float64(0.8),
        "losses": np.arange(5.0),
        "rng": np.random.default_rng(0),
        "generator": torch.get_rng_state(),
        "optimizer": optimizer.state_dict(),
        "args": Namespace(lr=1.0),
        "logger": Logger(),
        "recent": deque([1, 2], maxlen=3),
        "names": {"a", "b"},
        "lines": Lines([1, 2]),
        "path": Path("somewhere"),
        "best_loss": torch.tensor(0.3),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
    }


WITHIN_ITSELF: dict[str, Any] = {"model": STATE}
WITHIN_ITSELF["self"] = WITHIN_ITSELF

WRAPPED: dict[str, Any] = {
    "plain": STATE,
    "state_dict": {"state_dict": STATE},
    "nested": {"model": {"state_dict": STATE}},
    "deep": {"checkpoint": {"model": {"net": STATE}}},
    "unknown_name": {"my_network": STATE},
    "model_state_dict": {"model_state_dict": STATE, "optimizer_state_dict": rest()["optimizer"]},
    "encoder": {"encoder": STATE, "decoder": {"weight": torch.zeros(1000)}},
    "average_alone": {"model_ema": STATE},
    "average_beside": {"state_dict_ema": encoder_of(1).state_dict(), "state_dict": STATE},
    "compiled_ddp": {"model": under("_orig_mod.module.")},
    "ddp_compiled": {"model": under("module._orig_mod.")},
    "compiled_blocks": {key.replace("blocks3.0.", "blocks3.0._orig_mod."): value for key, value in STATE.items()},
    "lightning": {
        "state_dict": under("model.encoder.") | {"model.decoder.weight": torch.zeros(3), "loss.weight": torch.ones(2)}
    },
    "lightning_ddp": {"state_dict": under("module.model.module.net.encoder.")},
    "backbone": {"state_dict": under("module.backbone.")},
    "recomputed": {
        key.replace("blocks3.0.", "blocks3.0._checkpoint_wrapped_module."): one for key, one in STATE.items()
    },
    "sharded": {"model": under("_fsdp_wrapped_module.")},
    "default_mapping": defaultdict(dict, {"model": STATE}),
    "own_mapping": {"checkpoint": Settings({"state_dict": STATE})},
    "list": [STATE],
    "weights_and_optimizer": (STATE, {"param_groups": [{"lr": 1.0}]}),
    "temperature_beside": {"model": {"temperature": torch.ones(1)}, "state_dict": STATE},
    "within_itself": WITHIN_ITSELF,
    "unknown_prefix": under("my.own.network."),
    "student_and_teacher": under("teacher.") | under("student.", encoder_of(1).state_dict()),
    "half": {"state_dict": {key: value.half() for key, value in STATE.items()}},
    "double": {key: value.double() for key, value in STATE.items()},
    "parameters": OrderedDict((key, nn.Parameter(value)) for key, value in STATE.items()),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_and_prefixes_of_any_order_are_taken_off(tmp_path: Path, name: str) -> None:
    torch.save(WRAPPED[name], tmp_path / "w.pt")
    encoder = encoder_of(2)
    report = load_into(encoder, tmp_path / "w.pt")
    assert report.coverage == 1
    tolerance = 2e-3 if name == "half" else 0
    assert all(torch.allclose(encoder.state_dict()[key], value, atol=tolerance, rtol=0) for key, value in STATE.items())


OLD = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}, OLD])
def test_what_lies_beside_the_weights_is_passed_over(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.save({**rest(), "state_dict": STATE}, tmp_path / "w.pt", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = read_state(tmp_path / "w.pt")
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], value) for key, value in STATE.items())


def test_a_network_that_was_pickled_as_a_whole_is_read_by_its_parameters(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Sequential(nn.Linear(2, 3)))
    for content, options in ((network, {}), ({"model": network, "epoch": 1}, {}), (network, OLD)):
        torch.save(content, tmp_path / "whole.pt", **options)
        state = read_state(tmp_path / "whole.pt")
        assert state.keys() == network.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_tensors_of_a_subclass_are_read_as_plain_tensors(tmp_path: Path) -> None:
    class Meta(Tensor): ...

    globals()["Meta"] = Meta
    Meta.__qualname__ = "Meta"
    torch.save({key: value.as_subclass(Meta) for key, value in STATE.items()}, tmp_path / "w.pt")
    state = read_state(tmp_path / "w.pt")
    assert all(type(state[key]) is Tensor and torch.equal(state[key], value) for key, value in STATE.items())


class Attack:
    def __init__(self, run: Any, *arguments: Any) -> None:
        self.call = (run, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_code_in_a_file_is_named_and_not_run_and_the_weights_are_read(tmp_path: Path) -> None:
    attacks = [Attack(os.mkdir, str(tmp_path / "a")), Attack(exec, f"open({str(tmp_path / 'b')!r}, 'w')")]
    for place, content in enumerate(({"state_dict": STATE, "x": attacks}, {**STATE, "x": attacks[0]})):
        file = tmp_path / f"{place}.pt"
        torch.save(content, file)
        with pytest.warns(UserWarning, match=r"\.pt names posix\.mkdir.*did not run it"):
            assert read_state(file).keys() == STATE.keys()
        torch.save(content, file, **OLD)
        with pytest.warns(UserWarning, match=r"\.pt names posix\.mkdir.*did not run it"):
            assert read_state(file).keys() == STATE.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]


def test_a_pickle_cannot_change_functions_that_reading_needs(tmp_path: Path) -> None:
    class Change:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (), {"changed": 1}

    # BUILD on a function by its name alone: GLOBAL, then a state, then BUILD.
    attack = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x07\x00\x00\x00changedK\x01sb."
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "w.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, attack if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(CheckpointError, match="no part of weights"):
        read_state(tmp_path / "w.pt")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "changed")


def test_files_of_another_kind_say_what_they_are(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    (tmp_path / "a.txt").write_text("a")
    with tarfile.open(tmp_path / "tar.pt", "w") as tar:
        tar.add(tmp_path / "a.txt", "storages")
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"accuracy": 1.0, "names": ["a"]}, tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"one": STATE, "other": encoder_of(1).state_dict()}, tmp_path / "two.pt")
    for name, said in (
        ("script", "TorchScript"),
        ("zip", "ZIP archive of something else"),
        ("tar", "TAR archive"),
        ("text", "cannot be read as weights"),
        ("pickle", "cannot be read as weights"),
        ("none", r"holds no tensors by name, but accuracy \(float\), names \(list\)"),
        ("list", "holds no tensors by name, but a list"),
        ("two", r"several sets of tensors \(one, other\)"),
    ):
        with pytest.raises(CheckpointError, match=said) as refused:
            read_state(tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(refused.value)


@pytest.mark.parametrize("row", [0, 1])
def test_a_table_of_positions_may_have_a_row_for_a_class_token(row: int) -> None:
    table = sincos_positions((2, 2, 2), 24)
    state = under("module.") | {"module.pos_embed": torch.cat([torch.zeros(row, 24), table])[None]}
    assert MIM.own_tensors(HeldWeights(state)).keys() == under("encoder.").keys()
    learned = {**state, "module.pos_embed": torch.randn(1, 8 + row, 24)}
    with pytest.raises(CheckpointError, match="learned its positions"):
        MIM.own_tensors(HeldWeights(learned))


def test_weights_that_are_not_finite_are_refused_and_change_nothing(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        broken = {key: one.clone() for key, one in STATE.items()}
        broken["norm.weight"][3] = value
        torch.save(broken, tmp_path / "w.pt")
        encoder = encoder_of(1)
        before = {key: one.clone() for key, one in encoder.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"not finite, in 1 of .* tensors \(first: norm\.weight\)"):
            load_into(encoder, tmp_path / "w.pt")
        assert all(torch.equal(one, before[key]) for key, one in encoder.state_dict().items())


def saved(folder: Path, **changes: Any) -> mim3d.backbones.Encoder:
    encoder = encoder_of(**changes)
    save_network(folder / "encoder", encoder, {"backbone": to_named(encoder.recipe, BACKBONES)})
    return encoder


def test_a_file_that_was_copied_alone_still_says_which_encoder_it_is_of(tmp_path: Path) -> None:
    encoder = saved(tmp_path, num_heads=3)
    alone = tmp_path / "renamed.safetensors"
    alone.write_bytes((tmp_path / "encoder" / "model.safetensors").read_bytes())
    assert read_card(alone) == read_card(tmp_path)
    assert load_encoder(alone).recipe == encoder.recipe
    (tmp_path / "encoder" / "card.json").unlink()
    assert load_encoder(tmp_path).recipe == encoder.recipe


def test_heads_that_nothing_shows_are_never_guessed(tmp_path: Path) -> None:
    for name, flag in (("hybrid_nano", "--backbone hybrid_nano"), ("hybrid_tiny", "--backbone hybrid_tiny")):
        network = create_model(name)
        for suffix in (".pt", ".safetensors"):
            file = tmp_path / f"{name}{suffix}"
            torch.save(network.state_dict(), file) if suffix == ".pt" else save_file(network.state_dict(), file)
            with pytest.raises(CheckpointError, match=rf"do not show the number of attention heads.*{flag}"):
                load_encoder(file)
            assert load_encoder(file, name).recipe == network.recipe
    torch.save(STATE, tmp_path / "own.pt")
    with pytest.raises(CheckpointError, match=r"--backbone\.num_heads"):
        initialise(None, str(tmp_path / "own.pt"), 1)
    with pytest.warns(UserWarning, match=r"show widths \[6, 12, 24\], depths \[1, 1, 2\]"):
        loaded = load_encoder(tmp_path / "own.pt", {"num_heads": 2})
    assert loaded.recipe == encoder_of().recipe
    with pytest.warns(UserWarning, match="blocks that the file may have lost"):
        initial = initialise({"num_heads": 2}, str(tmp_path / "own.pt"), 1)
    assert initial.recipe == encoder_of().recipe


def test_a_file_that_lacks_tensors_is_named_and_one_that_was_cut_off_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path)
    file = tmp_path / "encoder" / "model.safetensors"
    whole = load_file(file)
    assert load_encoder(tmp_path) is not None
    assert "100.0% of the values" in capsys.readouterr().out
    lacking = {key: value for key, value in whole.items() if key not in ("norm.weight", "norm.bias")}
    save_file(lacking, file)
    with pytest.warns(
        UserWarning, match=r"fills 99\.\d% of the encoder; 2 of its \d+ tensors start anew: norm\.bias, norm"
    ):
        load_encoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"must fill, now 1"):
        load_encoder(tmp_path, min_coverage=1)
    save_file({key: value for key, value in whole.items() if not key.startswith("blocks3.1.")}, file)
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_encoder(tmp_path)
    (tmp_path / "encoder" / "card.json").unlink()
    with pytest.raises(CheckpointError, match=r"fills only .* of the encoder"):
        load_encoder(file, {"name": "hybrid", **SETTINGS})
    with pytest.warns(UserWarning, match="start anew"):
        loaded = load_encoder(file, {"name": "hybrid", **SETTINGS}, min_coverage=0.1)
    assert loaded.recipe.depths == (1, 1, 2)
    with pytest.raises(ConfigError, match="min_coverage is 2"):
        load_encoder(file, {"name": "hybrid", **SETTINGS}, min_coverage=2)


ODD = {
    "of type float8_e4m3fn": lambda one: one.to(torch.float8_e4m3fn),
    "of type int32": lambda one: one.to(torch.int32),
    "of type complex64": lambda one: one.to(torch.complex64),
    "quantised": lambda one: torch.quantize_per_tensor(one, 0.1, 0, torch.qint8),
    "sparse": lambda one: one.to_sparse(),
    "no values but shapes alone": lambda one: one.to("meta"),
    "not finite": lambda one: one.double() * 1e300,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*[Qq]uantiz", "ignore:TypedStorage")
@pytest.mark.parametrize("said", ODD)
def test_tensors_that_are_no_plain_numbers_are_refused_and_change_nothing(tmp_path: Path, said: str) -> None:
    torch.save({**STATE, "norm.weight": ODD[said](STATE["norm.weight"])}, tmp_path / "w.pt")
    encoder = encoder_of(1)
    before = {key: one.clone() for key, one in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{said}.* in 1 of 72 tensors \(first: norm\.weight\)"):
        load_into(encoder, tmp_path / "w.pt")
    assert all(torch.equal(one, before[key]) for key, one in encoder.state_dict().items())


def test_two_networks_in_a_file_are_named_with_the_one_that_was_taken(tmp_path: Path) -> None:
    torch.save(under("encoder_q.") | under("encoder_k.", encoder_of(1).state_dict()), tmp_path / "w.pt")
    encoder = encoder_of(2)
    with pytest.warns(UserWarning, match=r"the one named encoder_q\. was taken, not encoder_k\."):
        load_into(encoder, tmp_path / "w.pt")
    assert torch.equal(encoder.state_dict()["norm.weight"], STATE["norm.weight"])


def test_files_that_would_take_memory_or_time_are_refused_at_once(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "w.pt", "w") as new:
        for name in old.namelist():
            deep = name.endswith("data.pkl")
            content = b"\x80\x02" + b"]0" * 2**20 + b"N." if deep else old.read(name)
            new.writestr(name, content, zipfile.ZIP_DEFLATED if deep else zipfile.ZIP_STORED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_state(tmp_path / "w.pt")
    many: dict[str, Any] = {"a": 1}
    for _ in range(8):
        many = {str(number): many for number in range(20)}
    torch.save(many, tmp_path / "many.pt")
    with pytest.raises(CheckpointError, match="more than"):
        read_state(tmp_path / "many.pt")


def test_no_advice_of_other_packages_to_trust_a_file_is_passed_on(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("cut", b"PK\x03\x04" + bytes(99)), ("text", b"text")):
        (tmp_path / f"{name}.pt").write_bytes(content)
    torch.save({"a": np.array([1, "x"], dtype=object)}, tmp_path / "numpy.pt", **OLD)
    for name, said in (
        ("empty", "it is empty"),
        ("cut", "end is missing"),
        ("text", "kind"),
        ("numpy", "numpy array of no plain numbers"),
    ):
        with pytest.raises(CheckpointError, match=said) as refused:
            read_state(tmp_path / f"{name}.pt")
        assert not re.search("safe_globals|weights_only|miniz", str(refused.value))


def test_a_folder_of_a_published_model_names_the_file_to_give(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"give the file itself: .*pytorch_model\.bin"):
        read_state(tmp_path)
    save_file(STATE, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="2 files of weights; where they are pieces of one network, add"):
        read_state(tmp_path)


def test_a_card_within_a_file_is_named_by_that_file_and_bounded(tmp_path: Path) -> None:
    for card, said in (
        ({"backbone": {"name": "hybrid", **SETTINGS, "num_heads": 5}}, "not a multiple of num_heads"),
        ({"backbone": {"name": "hybrid", "widths": [60, 1200], "depths": [1, 1]}}, "describes a network of"),
        ({"backbone": "hybrid", "other": "a" * 17 * 2**20}, "more than any card has"),
    ):
        save_file(STATE, tmp_path / "w.safetensors", metadata={"mim3d_card": json.dumps({"format": 1, **card})})
        with pytest.raises(CheckpointError, match=rf"w\.safetensors.*{said}"):
            load_encoder(tmp_path / "w.safetensors")
