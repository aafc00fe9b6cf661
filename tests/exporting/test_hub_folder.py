"""The folder for Hugging Face: read back as it was, a README that says what it is, nothing that must stay private."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
import yaml

import mim3d
from mim3d.caching.fingerprints import ScanIdentity, fingerprint_of
from mim3d.caching.marks import Marks, marks_of
from mim3d.commands.export import export
from mim3d.core.errors import CheckpointError, ConfigError, DataError
from mim3d.core.warned import LeakWarning
from mim3d.tasks.trained import load_trained
from mim3d.weights import describe, read_card
from mim3d.workflows.export import WRITERS
from mim3d.workflows.shared.leakage import check_pretraining, read_seen, seen_from, write_seen

LOADERS = {"encoder": mim3d.load_encoder, "segmenter": load_trained, "classifier": load_trained}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_network_comes_back_as_it_was(make, kind, tmp_path):
    run = make(kind)
    out = export(str(run), str(tmp_path / "out"))
    assert read_card(out) == read_card(run)
    before, after = (LOADERS[kind](path) for path in (run, out))
    states = [getattr(loaded, "module", loaded).state_dict() for loaded in (before, after)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    # Exported again, it is the same folder.
    again = export(out, str(tmp_path / "again"))
    assert read_card(again) == read_card(out)


def test_the_encoder_can_be_taken_out_of_a_segmenter(make, tmp_path):
    run = make("segmenter")
    out = export(str(run), str(tmp_path / "out"), network="encoder")
    assert not {"task", "labels", "scores", "step"} & read_card(out).keys()
    maps = [mim3d.load_encoder(path).feature_maps(torch.ones(1, 1, 8, 8, 8)) for path in (run, out)]
    assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True))


def test_the_readme_has_front_matter_and_says_what_the_network_takes(make, tmp_path):
    run = make("segmenter", spacing_mm=[1.5, 1.5, 2.0])
    out = tmp_path / "out"
    export(str(run), str(out), license="cc-by-4.0", modality="CT")
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    content = yaml.safe_load(front)
    assert content["library_name"] == "mim3d" and content["license"] == "cc-by-4.0" and "mim3d" in content["tags"]
    for text in ("1.5 x 1.5 x 2 mm", "clip(v, -160, 240)", "| modality | CT |", "ab" * 32, "| dice | 0.5000 |"):
        assert text in body
    # A bar in a label's name is no new column.
    assert "| 1 | liver \\| left |" in body
    assert json.loads((out / "config.json").read_text())["library_name"] == "mim3d"


def test_the_readme_of_a_classifier_tells_the_box_that_it_sees(make, tmp_path):
    export(str(make("classifier")), str(tmp_path / "out"))
    assert (
        "| box | 8 x 8 x 8 voxels of 2 x 2 x 2 mm around the middle of the scan |"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_a_readme_tells_the_window_of_training_and_none_where_there_was_none(make, tmp_path):
    run = make("segmenter")
    both = {"format": ["safetensors", "torch-export"], "patch_size": (8, 8, 8)}
    export(str(run), str(tmp_path / "both"), **both)
    export(str(run), str(tmp_path / "encoder"), network="encoder")
    folder = tmp_path / "both" / "safetensors"
    # `mim3d predict` goes by the card: a program's own size says nothing of it.
    assert "| window | 8 x 8 x 12 voxels |" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["input_size"] == [8, 8, 12]
    export(str(tmp_path / "encoder"), str(tmp_path / "again"))
    assert "| window |" not in (tmp_path / "again" / "README.md").read_text()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["input_size"] is None


def test_an_earlier_export_is_put_back_where_the_new_one_cannot_take_its_place(make, tmp_path, monkeypatch):
    run, out = make("encoder"), tmp_path / "out"
    export(str(run), str(out))
    replace = os.replace

    def failing(source, target):
        if os.path.basename(source) == "new" and str(target) == str(out):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(DataError, match="nothing was changed"):
        export(str(run), str(out), license="mit", overwrite=True)
    assert "license" not in (out / "README.md").read_text().split("---\n")[1]


def test_nothing_private_goes_along(make, tmp_path):
    out = tmp_path / "out"
    export(str(make("segmenter")), str(out))
    names = {"model.safetensors", "card.json", "config.json", "README.md", "seen.json"}
    assert {path.name for path in out.iterdir()} == names
    for name in ("card.json", "config.json", "README.md"):
        assert str(tmp_path) not in (out / name).read_text() and "mueller" not in (out / name).read_text()
    assert "license" not in (out / "README.md").read_text().split("---\n")[1]


def write_list(run, folder="encoder"):
    """A list of two scans, one of them of an earlier version, without marks; their voxels."""
    rng = np.random.default_rng(0)
    scans = [rng.normal(size=(24, 24, 24)).astype(np.float32) for _ in range(2)]
    rows = [
        {
            "digest": f"{number:064x}",
            "fingerprint": fingerprint_of(scan, (1.0, 1.0, 1.0), np.eye(4)).to_text(),
            **({} if number else {"marks": marks_of(scan, (1.0, 1.0, 1.0), np.eye(4)).to_text()}),
        }
        for number, scan in enumerate(scans)
    ]
    path = run / folder / "seen.json"
    path.unlink()
    path.write_text(json.dumps({"format": 1, "complete": True, "scans": rows}))
    return scans


def test_the_list_of_scans_goes_along_as_salted_hashes(make, tmp_path):
    run = make("encoder")
    scans = write_list(run)
    lists = []
    for name in ("one", "two"):
        export(str(run), str(tmp_path / name))
        lists.append(json.loads((tmp_path / name / "seen.json").read_text())["scans"])
    given = json.loads((run / "encoder" / "seen.json").read_text())["scans"]
    # Nothing of the list at home, no images, and nothing by which two published lists could be compared.
    told = [{str(value) for row in rows for value in row.values()} for rows in (*lists, given)]
    assert not (told[0] & told[1] or told[0] & told[2]) and "fingerprint" not in lists[0][0]
    text = (tmp_path / "one" / "README.md").read_text()
    assert "`seen.json` lists the 2 scans it learned from by salted hashes" in text
    assert "Of 1 of them the same file alone is found" in text
    again = ScanIdentity(
        id="mine",
        digest="f" * 64,
        fingerprint=fingerprint_of(scans[0], (1.0, 1.0, 1.0), np.eye(4)),
        marks=marks_of(scans[0] * 7 + 3, (1.0, 1.0, 1.0), np.eye(4)),
    )
    same_file = replace(again, id="file", digest=given[1]["digest"], marks=Marks())
    other = replace(again, id="other", marks=Marks())
    with pytest.warns(LeakWarning, match=r"2 of 3 held-out cases are .*: mine \(the same scan.*, file \(identical\)"):
        check_pretraining(str(tmp_path / "one"), [again, same_file, other], strict=False)
    # Exported again, it is the same list.
    export(str(tmp_path / "one"), str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "seen.json").read_text())["scans"] == lists[0]


def test_a_run_that_goes_on_from_a_published_list_keeps_it(make, tmp_path):
    run = make("encoder")
    scans = write_list(run)
    export(str(run), str(tmp_path / "out"))
    own = ScanIdentity(id="own", digest="a" * 64, fingerprint=fingerprint_of(scans[1], (1.0, 1.0, 1.0), np.eye(4)))
    seen = seen_from([own], str(tmp_path / "out"))
    write_seen(tmp_path, seen)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "out" / "model.safetensors").read_bytes())
    assert {(scan.digest, scan.salt) for scan in read_seen(tmp_path).scans} == {
        (scan.digest, scan.salt) for scan in seen.scans
    }
    assert len(seen.scans) == 3


def test_the_list_of_scans_is_published_with_images_when_asked_for(make, tmp_path):
    run = make("encoder")
    write_list(run)
    export(str(run), str(tmp_path / "out"), include_seen=True)
    lists = [json.loads((folder / "seen.json").read_text()) for folder in (tmp_path / "out", run / "encoder")]
    assert lists[0] == lists[1]
    assert "`seen.json` lists digests and coarse fingerprints" in (tmp_path / "out" / "README.md").read_text()
    export(str(run), str(tmp_path / "bare"), include_seen=False)
    assert not (tmp_path / "bare" / "seen.json").exists()
    assert "No list of the scans" in (tmp_path / "bare" / "README.md").read_text()
    (run / "encoder" / "seen.json").unlink()
    with pytest.raises(ConfigError, match=r"without seen\.json; leave out --include_seen"):
        export(str(run), str(tmp_path / "other"), include_seen=True)


def test_the_readme_says_what_was_learned_and_at_what_cost(make, tmp_path):
    run = make("segmenter")
    cohort = {"num_scans": 30, "num_patients": 28, "modalities": [{"CT": 30}]}
    derived = {"cohort": {"train": cohort}, "effective_batch": 4, "world_size": 2, "device": "cuda"}
    derived |= {"split": f"named in {tmp_path}/mueller/held_out.txt"}
    manifest = {"command": "finetune", "settings": {"task": {"name": "segmentation"}}, "inputs": {}, "derived": derived}
    (run / "manifest.json").write_text(json.dumps(manifest))
    lines = [{"step": 10, "time_s": 1800.0}, {"step": 20, "time_s": 1800.0}, {"step": 30, "time_s": 900.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"dice": 0.9, "num_cases": 7, "ci95": {"dice": [0.85, 0.94]}}
    scores = {"labels": {"2": "liver"}, "mean": {"dice": 0.9}, "mean_ci95": {"dice": [0.85, 0.94]}}
    scores |= {"per_label": {"liver": row}, "cases": [{"id": "a", "labels": {}}]}
    (run / "scores.json").write_text(json.dumps(scores))
    out = tmp_path / "out"
    export(str(run), str(out))
    text = (out / "README.md").read_text()
    # A session that was resumed counts from its beginning: 1800 s, then 900 s, on two devices.
    for said in ("30 scans of 28 patients", "CT (30)", "1.5 device hours (2 x cuda)", "120 samples in 30 steps"):
        assert said in text
    assert "0.900 (0.850 to 0.940)" in text and "named in a list" in text and "mueller" not in text
    # It travels on with the card.
    export(str(out), str(tmp_path / "again"))
    assert "1.5 device hours" in (tmp_path / "again" / "README.md").read_text()
    export(str(run), str(tmp_path / "encoder"), network="encoder")
    assert "0.900" not in (tmp_path / "encoder" / "README.md").read_text()


def test_the_readme_names_the_family_that_came_before_what_is_recorded(make, tmp_path):
    run = make("encoder", weights_origin={"family": "MiM (Zhuang et al. 2025)", "licence": "unknown"})
    settings = {"method": {"name": "MAE"}, "weights": str(tmp_path / "gone.pth")}
    (run / "manifest.json").write_text(json.dumps({"command": "pretrain", "settings": settings, "inputs": {}}))
    export(str(run), str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "weights of MiM (Zhuang et al. 2025), of whose training nothing is recorded here" in text


@pytest.mark.parametrize("kind", ["encoder", "segmenter"])
def test_the_lines_of_the_readme_run(make, tmp_path, monkeypatch, kind):
    export(str(make(kind)), str(tmp_path / "out"))
    (tmp_path / "SCANS").mkdir()
    scan = np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32) * 100
    for name in ("SCAN.nii.gz", "SCANS/one.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(scan, np.eye(4)), tmp_path / name)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("PATH_OR_OWNER/NAME", "out"), names)
    assert (tmp_path / "PREDICTIONS" / "one.nii.gz").is_file() if kind == "segmenter" else len(names["maps"]) == 2


def test_foreign_weights_without_a_card_get_one(tmp_path):
    encoder = mim3d.create_model("hybrid_tiny")
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"model": state}, tmp_path / "published.pt")
    with pytest.raises(CheckpointError, match="--backbone hybrid_tiny"):
        export(str(tmp_path / "published.pt"), str(tmp_path / "out"))
    out = export(str(tmp_path / "published.pt"), str(tmp_path / "out"), backbone="hybrid_tiny")
    assert mim3d.load_encoder(out).recipe.widths == encoder.recipe.widths
    assert "not recorded" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "onxx"}, r"no format 'onxx'.*onnx"),
        ({"network": "segmentor"}, r"network is 'segmentor'.*segmenter"),
        ({"license": "CC BY 4.0"}, r"license is 'CC BY 4.0'; give an id"),
        ({"format": "torch-export", "patch_size": (8, 8, 10)}, r"patch_size axis Z \(10\).* use 8 or 12"),
        ({"format": []}, r"format is empty"),
        ({"patch_size": (8, 8, 8)}, r"patch_size is \[8, 8, 8\], but safetensors takes windows as in training"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        export(str(make("segmenter")), str(tmp_path / "out"), **changes)
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_exported_are_refused_with_one_sentence(make, tmp_path):
    run = make("encoder")
    with pytest.raises(CheckpointError, match="does not exist"):
        export(str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"without model\.safetensors \(its own or in segmenter"):
        export(str(run), str(tmp_path / "out"), network="segmenter")
    with pytest.raises(CheckpointError, match="exported as encoder, but a MONAI bundle is made of a segmenter"):
        export(str(run), str(tmp_path / "out"), format=["monai", "safetensors"])
    file = run / "encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        export(str(run), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_what_is_in_the_way_is_spared(make, tmp_path):
    run, out = make("segmenter"), tmp_path / "out"
    with pytest.raises(ConfigError, match="holds other things than an export"):
        export(str(run), str(run))
    export(str(run), str(out))
    with pytest.raises(ConfigError, match="--overwrite true"):
        export(str(run), str(out))
    export(str(run), str(out), license="mit", overwrite=True)
    assert "license: mit" in (out / "README.md").read_text()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is no folder"):
        export(str(run), str(tmp_path / "file"), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out", "file"}


def test_several_formats_get_a_folder_each(make, tmp_path):
    export(str(make("encoder")), str(tmp_path / "out"), format=["safetensors", "torch-export"], patch_size=(8, 8, 8))
    assert (tmp_path / "out" / "safetensors" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "torch-export" / "model.pt2").is_file()


@pytest.mark.parametrize("network", [None, "encoder"])
def test_a_card_may_name_task_and_backbone_without_settings(make, tmp_path, network):
    run = make("segmenter")
    path = run / "segmenter" / "card.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "task": "segmentation"}))
    assert read_card(run, ("segmenter",))["task"] == {"name": "segmentation"}
    if network is None:
        # What training fills in is missing, which is said of the card.
        with pytest.raises(CheckpointError, match=r"card\.json"):
            export(str(run), str(tmp_path / "out"))
    else:
        export(str(run), str(tmp_path / "out"), network=network)
        assert "--task" not in (tmp_path / "out" / "README.md").read_text()


def test_names_from_a_card_break_no_line_of_the_readme(make, tmp_path):
    run = make("segmenter")
    path = run / "segmenter" / "card.json"
    card = json.loads(path.read_text())
    card["labels"] = {"0": "background", "2": "a\n\n# heading <script>", "5": "b\x1b[2J"}
    path.write_text(json.dumps(card))
    export(str(run), str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\n# heading" not in text and "\x1b" not in text and "<script>" not in text.replace("\\<", "")


def test_an_export_of_several_formats_that_was_stopped_leaves_none_and_can_be_run_again(make, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    run, out, formats = str(make("segmenter")), tmp_path / "out", ["safetensors", "torch-export"]
    with monkeypatch.context() as patched:
        patched.setitem(WRITERS, "torch-export", stop)
        with pytest.raises(KeyboardInterrupt):
            export(run, str(out), format=formats)
    assert not out.exists()
    export(run, str(out), format=formats)
    assert sorted(path.name for path in out.iterdir()) == sorted(formats)


FULL = """
import resource, signal, sys
from mim3d.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
sys.exit(main(["export", "--weights", sys.argv[1], "--out", sys.argv[2], "--format", sys.argv[3]]))
"""


def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(make, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/out cannot be written: .*file is no folder, or read-only"):
        export("nowhere", str(tmp_path / "file" / "out"))


@pytest.mark.parametrize("kind", ["safetensors", "torch-export"])
def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_nothing(make, tmp_path, kind):
    pytest.importorskip("resource")
    words = [sys.executable, "-c", FULL, str(make("segmenter")), str(tmp_path / "out"), kind]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("mim3d: ") and "warning" not in line]
    assert f"{tmp_path}/out" in said and "could not be written" in said and "choose another" in said
    assert "(File too large)" in said and ".partial" not in said
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "crops"),
    [
        ("segmenter", {}, "8 x 8 x 12"),
        ("classifier", {"scores": {"auc": 0.123456789}}, "8 x 8 x 8"),
        ("encoder", {"input_size": [16, 8, 8]}, "16 x 8 x 8"),
    ],
)
def test_what_a_file_is_counts_the_encoder_alone_and_says_the_crops(make, kind, changes, crops):
    rows = describe(make(kind, **changes)).rows
    assert rows["encoder"].endswith("tensors of other parts") == (kind != "encoder")
    assert "0 left over" in rows["encoder"] and rows["learned from crops"] == f"{crops} voxels"
    assert kind != "classifier" or rows["scores"] == "auc 0.1235"
