"""Weights kept as numpy arrays, and networks in several safetensors files: read, or refused in one true sentence."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mim3d
from mim3d.backbones import BACKBONES, create_model
from mim3d.core.errors import CheckpointError
from mim3d.core.settings import to_named
from mim3d.weights import load_encoder, load_into, read_card, save_network, weights_digest
from mim3d.weights.folders import CARD_NAME
from mim3d.weights.plain import INDEX_NAME, TORCH_INDEX_NAME
from mim3d.weights.states import read_state


def encoder_of(seed: int = 0) -> mim3d.backbones.Encoder:
    torch.manual_seed(seed)
    return create_model("hybrid", widths=(6, 12, 24), depths=(1, 1, 2), num_heads=2)


STATE = encoder_of().state_dict()
ARRAYS = {key: value.numpy() for key, value in STATE.items()}

PROTOCOLS: list[dict[str, Any]] = [
    {},
    {"pickle_protocol": 4},
    {"pickle_protocol": 5},
    {"_use_new_zipfile_serialization": False},
]

#: Layouts in memory and types that numpy has.
KINDS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "first_fastest": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "turned": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
    "part": np.arange(24.0).reshape(4, 6)[1:3, ::2],
    "number": np.array(3),
    "empty": np.zeros((0, 3)),
    "half": np.ones(2, np.float16),
    "truth": np.array([True, False]),
}


@pytest.mark.parametrize("options", PROTOCOLS)
def test_numpy_arrays_in_a_torch_file_are_read_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    for content in (KINDS, {"epoch": np.float64(3), "model": KINDS, "optimizer": {"m": np.ones((2, 2))}}):
        torch.save(content, tmp_path / "w.pt", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state = read_state(tmp_path / "w.pt")
        assert state.keys() == KINDS.keys()
        for name, array in KINDS.items():
            assert state[name].numpy().dtype == array.dtype
            np.testing.assert_array_equal(state[name].numpy(), array)


@pytest.mark.parametrize("options", PROTOCOLS)
def test_a_network_kept_as_arrays_loads_as_one_kept_as_tensors(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.save({"state_dict": {f"module.{key}": value for key, value in ARRAYS.items()}}, tmp_path / "w.pt", **options)
    encoder = encoder_of(1)
    assert load_into(encoder, tmp_path / "w.pt").coverage == 1
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in STATE.items())


def test_arrays_beside_tensors_are_no_part_of_the_weights(tmp_path: Path) -> None:
    history = {f"epoch{number}": np.ones((2, 2)) for number in range(200)}
    torch.save({**STATE, "losses": np.arange(5.0), "history": history}, tmp_path / "w.pt")
    assert read_state(tmp_path / "w.pt").keys() == STATE.keys()


class Attack:
    def __init__(self, run: Any, *arguments: Any) -> None:
        self.call = (run, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_arrays_that_are_no_plain_numbers_run_nothing_and_are_named(tmp_path: Path) -> None:
    attack = Attack(os.mkdir, str(tmp_path / "made"))
    for name, array in (
        ("objects", np.array([attack, None], dtype=object)),
        ("big_endian", np.ones((2, 2), ">f4")),
        ("text", np.array(["a", "b"])),
        ("records", np.ones(2, [("a", "f4"), ("b", "f4")])),
        ("complex", np.ones((2, 2), np.complex64)),
        ("dates", np.array(["2020-01-01"], "M8[D]")),
    ):
        for options in PROTOCOLS:
            torch.save({"w": array}, tmp_path / f"{name}.pt", **options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(CheckpointError, match=r"w \(numpy array of no plain numbers\)"):
                    read_state(tmp_path / f"{name}.pt")
    assert not (tmp_path / "made").exists()


class Lying:
    """Pickles as an array of a shape that its bytes do not fill."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape

    def __reduce__(self) -> Any:
        rebuild, arguments, state = np.ones((2, 2), np.float32).__reduce__()
        return rebuild, arguments, (state[0], self.shape, *state[2:])


@pytest.mark.parametrize("shape", [(2, 3), (2**40, 2**40), (-2, -2), (1,) * 100 + (4,), "4", (2.0, 2.0), (None,)])
def test_shapes_that_the_bytes_do_not_fill_are_refused(tmp_path: Path, shape: Any) -> None:
    torch.save({"w": Lying(shape)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt.*(cut off|no plain numbers)"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_of_arrays_by_name_is_read_without_its_texts(tmp_path: Path, save: Any) -> None:
    swapped = {key: value.astype(value.dtype.newbyteorder(">")) for key, value in ARRAYS.items()}
    save(tmp_path / "w.npz", **swapped, author=np.array("somebody"))
    encoder = encoder_of(1)
    assert load_into(encoder, tmp_path / "w.npz").coverage == 1
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in STATE.items())


def test_files_of_arrays_that_cannot_be_read_say_why_and_give_no_dangerous_advice(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", state_dict=np.array({"a": Attack(os.mkdir, str(tmp_path / "made"))}))
    np.savez_compressed(tmp_path / "zeros.npz", w=np.zeros(2**26, np.float64))
    np.savez(tmp_path / "text.npz", a=np.array("b"))
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "cut.npz", **ARRAYS)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:3000])
    for name, said in (
        ("objects", r"state_dict: Python objects"),
        ("zeros", "would take 536,"),
        ("text", "holds no tensors by name"),
        ("one", "no archive"),
        ("empty", "no archive"),
        ("cut", "end is missing"),
    ):
        with pytest.raises(CheckpointError, match=said) as refused:
            read_state(tmp_path / f"{name}.npz")
        assert f"{name}.npz" in str(refused.value)
        assert not re.search("allow_pickle|trust", str(refused.value))
    assert not (tmp_path / "made").exists()


def sharded(folder: Path, num: int = 3) -> Path:
    """A network in several files with an index, as Hugging Face writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(STATE)
    places = {name: f"model-{place % num + 1:05}-of-{num:05}.safetensors" for place, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: STATE[name] for name in names if places[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(one.nbytes for one in STATE.values())}, "weight_map": places}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder / INDEX_NAME


def test_a_network_in_several_files_is_read_by_its_index_or_its_folder(tmp_path: Path) -> None:
    index = sharded(tmp_path / "several")
    for given in (index, index.parent):
        state = read_state(given)
        assert state.keys() == STATE.keys()
        assert all(torch.equal(state[key], value) for key, value in STATE.items())


def test_a_card_beside_an_index_is_that_of_the_network(tmp_path: Path) -> None:
    encoder = encoder_of()
    save_network(tmp_path / "whole", encoder, {"backbone": to_named(encoder.recipe, BACKBONES)})
    index = sharded(tmp_path / "several")
    (index.parent / CARD_NAME).write_bytes((tmp_path / "whole" / CARD_NAME).read_bytes())
    assert read_card(index.parent) == read_card(tmp_path / "whole")
    assert load_encoder(index.parent).recipe == encoder.recipe


def test_the_digest_of_several_files_is_of_their_tensors(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    before = weights_digest(tmp_path)
    assert before == weights_digest(index)
    shard = sorted(tmp_path.glob("model-*"))[1]
    save_file({key: value + 1 for key, value in load_file(shard).items()}, shard)
    assert weights_digest(tmp_path) != before


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "..",
        "sub/model.safetensors",
        "ABSOLUTE",
        "..\\secret.safetensors",
        "",
        "index.json",
        "a\0.safetensors",
    ],
)
def test_an_index_reads_nothing_but_safetensors_files_beside_it(tmp_path: Path, name: str) -> None:
    index = sharded(tmp_path / "in" / "several")
    for place in (tmp_path / "in", index.parent / "sub"):
        place.mkdir(exist_ok=True)
        save_file(STATE, place / "secret.safetensors")
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = str(tmp_path / "in" / "secret.safetensors") if name == "ABSOLUTE" else name
    index.write_text(json.dumps(content))
    for read in (read_state, weights_digest):
        with pytest.raises(CheckpointError, match=r"no safetensors file beside it|not beside it"):
            read(index.parent)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    for changed, said in (
        (
            {"weight_map": {**content["weight_map"], "extra.weight": next(iter(content["weight_map"].values()))}},
            "extra",
        ),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ({"weight_map": {"a": 1}}, "no weight_map"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=said):
            read_state(tmp_path)
    index.write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match="no readable index"):
        read_state(tmp_path)
    index.write_text(json.dumps(content))
    shards = sorted(tmp_path.glob("model-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.safetensors cannot be read"):
        read_state(tmp_path)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=r"names 3 files, of which 1 are not beside it: model-00002"):
        read_state(tmp_path)


def test_arrays_of_bfloat16_in_a_torch_file_are_read(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {key: value.astype(ml_dtypes.bfloat16) for key, value in ARRAYS.items()}
    torch.save({"params": arrays}, tmp_path / "w.pt")
    state = read_state(tmp_path / "w.pt")
    assert all(torch.equal(state[key], value.bfloat16()) for key, value in STATE.items())


def torch_shards(folder: Path) -> None:
    """A network in two files of torch.save, as Hugging Face wrote it before safetensors."""
    names = sorted(STATE)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, keys in parts.items():
        torch.save({key: STATE[key] for key in keys}, folder / file)
    places = {key: file for file, keys in parts.items() for key in keys}
    (folder / TORCH_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_a_network_in_several_files_of_torch_is_read_by_its_index_or_its_folder(tmp_path: Path) -> None:
    torch_shards(tmp_path)
    for given in (tmp_path, tmp_path / TORCH_INDEX_NAME):
        state = read_state(given)
        assert state.keys() == STATE.keys() and all(torch.equal(state[key], STATE[key]) for key in STATE)
    assert len(weights_digest(tmp_path)) == 64
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"00002-of-00002.bin holds no .*, as pytorch_model.bin.index.json says"):
        read_state(tmp_path)
    (tmp_path / TORCH_INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"add their pytorch_model\.bin\.index\.json"):
        read_state(tmp_path)
