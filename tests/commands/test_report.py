"""``mim3d report``: one page of everything there is, and remarks for what is not."""

import json
import re

import matplotlib
import nibabel as nib
import numpy as np
import pytest

from mim3d.commands.evaluate import evaluate
from mim3d.commands.report import report
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import Run
from mim3d.core.warned import ComparisonWarning


def make_run(folder, command="finetune", **settings):
    settings = {"task": "segmentation", "seed": 0, **settings, "out": str(folder)}
    run = Run.create(folder, command=command, settings=settings, inputs={"data": "ab" * 8})
    run.note({"effective_batch": 4})
    for step in range(10, 101, 10):
        run.log(step, {"loss": 1 / step, "loss/dice": 0.5, "learning_rate": 1e-3, "time_s": step / 2})
    run.log(100, {"val/dice": 0.81, "val/dice/liver": 0.8})
    return run


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def make_scores(folder, out, shift=0, cases="abcd"):
    label = np.zeros((20, 18, 8), dtype=np.uint8)
    label[5:10, 5:12, 2:6], label[10:14, 5:12, 2:6] = 1, 2
    rng = np.random.default_rng(0)
    listing = []
    for position, name in enumerate(cases):
        write(folder / "ref" / f"{name}.nii.gz", label)
        write(folder / "images" / f"{name}.nii.gz", rng.normal(size=label.shape).astype(np.float32))
        write(out.parent / "pred" / f"{name}.nii.gz", np.roll(label, shift + position, axis=1))
        image = str(folder / "images" / f"{name}.nii.gz")
        listing.append({"id": name, "images": [image], "prediction": f"{name}.nii.gz"})
    content = {"labels": {"0": "background", "1": "liver", "2": "<b>spleen"}, "cases": listing, "failed": []}
    (out.parent / "pred" / "predictions.json").write_text(json.dumps(content))
    evaluate(str(out.parent / "pred"), str(folder / "ref"), str(out))
    return out


def write_report(folder, *runs, **settings):
    out = folder / "report.html"
    report([str(run) for run in runs], str(out), **settings)
    return out.read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch):
    """No charts and images, for what they do not matter to."""
    for name in ("scores.dice_chart", "page.curves_chart", "segmentations.overlays.overlay_image"):
        monkeypatch.setattr(f"mim3d.reporting.{name}", lambda *given: "")


@pytest.mark.usefixtures("undrawn")
def test_what_was_said_when_cases_were_scored_is_shown(tmp_path):
    make_run(tmp_path / "run")
    path = make_scores(tmp_path, tmp_path / "run" / "scores.json")
    content = json.loads(path.read_text())
    rows = [{"kind": "other", "text": "a with <b>a_seg</b>\x1b[2J"}, {"kind": "leak", "text": "a was learned from"}]
    path.write_text(json.dumps({**content, "warnings": [*rows, "no row"]}))
    page = write_report(tmp_path, tmp_path / "run")
    assert "<dt>other</dt><dd>a with &lt;b&gt;a_seg&lt;/b&gt;\\x1b[2J</dd>" in page
    # They come first, and scores on what was learned from carry a mark.
    assert page.index("<h2>Warnings</h2>") < page.index("<h2>Runs</h2>")
    assert "see Warnings" in page
    path.write_text(json.dumps(content))
    page = write_report(tmp_path, tmp_path / "run")
    assert "<h2>Warnings</h2>" not in page and "see Warnings" not in page


def test_a_report_replaces_neither_other_files_nor_reports_on_other_runs(tmp_path):
    for name in "ab":
        make_run(tmp_path / name)
    page = write_report(tmp_path, tmp_path / "a")
    write_report(tmp_path, tmp_path / "a", tmp_path / "b")
    write_report(tmp_path, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"report\.html is a report on other runs"):
        write_report(tmp_path, tmp_path / "b")
    assert str(tmp_path / "a") not in page.partition("</head>")[0]
    write_report(tmp_path, tmp_path / "b", overwrite=True)
    (tmp_path / "report.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match="is no report of mim3d"):
        write_report(tmp_path, tmp_path / "b", overwrite=True)


def test_a_file_of_settings_of_matplotlib_decides_nothing(tmp_path):
    make_run(tmp_path / "run")
    with matplotlib.rc_context({"text.usetex": True, "font.family": "nonsense", "figure.dpi": 1e9}):
        assert "<img" in write_report(tmp_path, tmp_path / "run")
        assert matplotlib.rcParams["text.usetex"]


def images_of(step_noise=0.0):
    rng = np.random.default_rng(0)
    original = rng.random((8, 8, 4)).astype(np.float32)
    hidden = np.arange(8)[:, None, None] >= 4
    return {
        f"{level}/{kind}": volume
        for level in ("coarse", "middle", "fine")
        for kind, volume in (
            ("original", original),
            ("masked", np.where(hidden, 0, original)),
            ("reconstructed", np.where(hidden, 0.5 + step_noise, original)),
        )
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page with everything: a pre-training with images and two fine-tunings with scores."""
    folder = tmp_path_factory.mktemp("report")
    pretrained = make_run(folder / "pretrained", "pretrain", method={"name": "MiM", "temperature": 0.2}, task=None)
    for step in (50, 100):
        pretrained.save_pictures(step, images_of(step / 1000))
    for name, shift, rate in (("scratch", 1, 1e-3), ("tuned", 0, 5e-4)):
        make_run(folder / name, learning_rate=rate)
        make_scores(folder, folder / name / "scores.json", shift)
    return write_report(folder, folder / "pretrained", folder / "scratch", folder / "tuned")


def section(page, anchor):
    return re.search(rf'<section id="{anchor}">(.*?)</section>', page, re.DOTALL)[1]


def test_the_page_needs_nothing_but_itself(whole):
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', whole)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"<script[^>]", whole) and "@import" not in whole and "url(" not in whole


def test_every_section_is_there_and_linked(whole):
    for anchor in ("runs", "scores", "segmentations", "curves", "images", "settings"):
        assert f'href="#{anchor}"' in whole
        assert section(whole, anchor)


def test_scores_are_compared_with_the_first(whole):
    scores = section(whole, "scores")
    assert "Differences are to scratch" in scores
    assert 'class="better"' in scores
    assert "What the numbers mean" in scores


def test_worst_median_and_best_case_are_shown_for_both_runs(whole):
    segmentations = section(whole, "segmentations")
    assert re.findall(r"<h3>(.*?)</h3>", segmentations) == [
        "Worst case: d",
        "Median case: c",
        "Case 3 of 4: b",
        "Best case: a",
    ]
    assert segmentations.count('class="film"') == 8
    assert "Radiological convention" in segmentations


def test_reference_and_prediction_have_lines_of_their_own_in_a_legend(whole):
    legend = re.search(r'<div class="film-legend">(.*?)</div>', section(whole, "segmentations"), re.DOTALL)[1]
    for name in ("liver", "&lt;b&gt;spleen"):
        lines = re.search(rf"<b>{name}</b> (.*?) prediction", legend)[1]
        (one, solid), (other, dashed) = re.findall(r"border-top-style:(\w+);border-color:(#\w+)", lines)
        assert (one, other) == ("solid", "dashed") and solid != dashed
    assert "background" not in legend


def test_the_window_is_said_and_the_case_can_be_chosen(whole):
    segmentations = section(whole, "segmentations")
    assert re.search(r"Grey values from .* \(black\) to .* \(white\)", segmentations)
    assert re.findall(r"<option.*?>(.*?)</option>", segmentations)[:2] == ["all", "Worst case: d"]
    # Without scripts nothing is hidden but the choice.
    assert re.findall(r"<(\w+)[^>]* hidden", segmentations) == ["p"]


@pytest.mark.usefixtures("undrawn")
def test_cases_can_be_named(tmp_path):
    make_run(tmp_path / "run")
    make_scores(tmp_path, tmp_path / "run" / "scores.json")
    page = write_report(tmp_path, tmp_path / "run", cases=["b", "a"])
    assert re.findall(r"<h3>(.*?)</h3>", section(page, "segmentations")) == ["Case 3 of 4: b", "Best case: a"]
    with pytest.raises(ConfigError, match=r"cases names 'e', which no file of scores has: they have a, b, c, d"):
        write_report(tmp_path, tmp_path / "run", cases=["e"])


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_stopped_says_where(tmp_path):
    run = make_run(tmp_path / "run")
    run.note({"max_steps": 300})
    assert "<td>100 of 300</td>" in write_report(tmp_path, tmp_path / "run")
    # It logs every so many steps, and keeps a checkpoint of the last one.
    (run.checkpoints_dir / "step_00000107.pt").write_bytes(b"")
    run.keep_warnings([{"kind": "unfinished", "text": "stopped after step 107 of 300"}])
    assert "<td>stopped at 107 of 300</td>" in write_report(tmp_path, tmp_path / "run")
    run.note({"max_steps": 107})
    assert "<td>107</td>" in write_report(tmp_path, tmp_path / "run")


@pytest.mark.usefixtures("undrawn")
def test_the_cohort_is_told_from_what_the_run_noted(tmp_path):
    run = make_run(tmp_path / "run")
    part = {
        "num_scans": 12,
        "num_patients": 9,
        "modalities": [{"CT": 11, "unknown": 1}],
        "spacing_mm": [[0.7, 0.7, 1.0], [0.8, 0.8, 3.0], [0.9, 0.9, 5.0]],
        "labels": {"liver": 12, "<i>tumour": 4},
        "classes": {},
    }
    run.note(
        {
            "split": "fold 1 of 5, from 0",
            "cohort": {"train": part, "held out": {**part, "num_scans": 3, "labels": {"liver": 3}}},
        }
    )
    make_scores(tmp_path, tmp_path / "run" / "scores.json", cases="ab")
    shown = section(write_report(tmp_path, tmp_path / "run"), "cohort")
    assert "<td>train</td><td>fold 1 of 5, from 0</td><td>12</td><td>9</td><td>11 CT, 1 unknown</td>" in shown
    assert "<td>0.8 × 0.8 × 3 (0.7 × 0.7 × 1 to 0.9 × 0.9 × 5)</td>" in shown
    assert "&lt;i&gt;tumour</th><td>4</td><td>0</td>" in shown and "Scans with each label of run" in shown
    assert "<td>scored</td><td>–</td><td>2</td>" in shown
    assert "Scanners" not in shown
    run.note({"cohort": {"train": {**part, "scanners": {"GE <b>, 1.5 T": 5, "SIEMENS": 7}}, "held out": part}})
    shown = section(write_report(tmp_path, tmp_path / "run"), "cohort")
    assert "<th>Scanners</th>" in shown and "<td>7 SIEMENS; 5 GE &lt;b&gt;, 1.5 T</td>" in shown
    # A note of another form is passed over.
    for other in (
        "x",
        {"train": {**part, "scanners": ["GE"]}},
        {"train": 1},
        {"train": {**part, "spacing_mm": "x"}},
        [part],
    ):
        run.note({"cohort": other})
        assert "<td>train</td>" not in write_report(tmp_path, tmp_path / "run")


def make_class_scores(path, names=("benign", "malign"), num_cases=24, **settings):
    rng = np.random.default_rng(0)
    rows = [["id", "patient", "class", "predicted", *(f"probability_{name}" for name in names)]]
    for number in range(num_cases):
        probabilities = rng.dirichlet(np.ones(len(names)))
        rows.append([f"c{number}", f"p{number // 2}", names[number // 2 % len(names)], names[0], *probabilities])
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, columns in (("p.csv", (0, *range(3, len(rows[0])))), ("r.csv", (0, 1, 2))):
        lines = [",".join(str(row[column]) for column in columns) for row in rows]
        (path.parent / name).write_text("\n".join(lines))
    evaluate(str(path.parent / "p.csv"), str(path.parent / "r.csv"), str(path), **settings)
    return path


def test_classifiers_have_roc_and_calibration_curves_and_no_section_of_segmentations(tmp_path):
    make_run(tmp_path / "run")
    path = make_class_scores(tmp_path / "run" / "scores.json")
    page = write_report(tmp_path, tmp_path / "run")
    assert 'alt="Receiver operating characteristic: malign"' in page
    assert 'alt="Predicted probability against observed frequency"' in page
    assert 'id="segmentations"' not in page
    # What somebody else wrote and holds no probabilities has no ROC.
    content = json.loads(path.read_text())
    for value in (None, [], [2.0, 3.0], [0.5]):
        for case in content["cases"]:
            case["probabilities"] = value
        path.write_text(json.dumps(content))
        assert "Receiver operating" not in write_report(tmp_path, tmp_path / "run")


def test_scores_of_unrelated_data_sets_stand_in_tables_of_their_own(tmp_path, monkeypatch):
    for name, cases in (("one", "ab"), ("two", "cd")):
        make_run(tmp_path / name, data=f"data/{name}")
        make_scores(tmp_path / name, tmp_path / name / "scores.json", cases=cases)
    monkeypatch.setattr("mim3d.reporting.segmentations.overlays.overlay_image", lambda *given: "")
    page = write_report(tmp_path, tmp_path / "one", tmp_path / "two")
    assert "not the same cases" not in page and "Differences are to" not in page
    assert section(page, "segmentations").count("Case 1 of 2") == 4
    assert section(page, "scores").count('alt="Dice of every case by label"') == 2
    # Their curves are apart too.
    titles = re.findall(r"<h3>(.*?)</h3>", section(page, "curves"))
    assert titles == ["finetune segmentation, one", "finetune segmentation, two"]


def test_every_level_is_reconstructed_and_its_history_folded_in(whole):
    reconstructions = section(whole, "images")
    assert re.findall(r"<figcaption>(.*?)</figcaption>", reconstructions)[:3] == ["coarse", "middle", "fine"]
    assert "pretrained, step 100" in reconstructions
    assert reconstructions.count('class="film"') == 4


def test_runs_of_one_kind_share_their_curves(whole):
    assert re.findall(r"<h3>(.*?)</h3>", section(whole, "curves")) == ["pretrain MiM", "finetune segmentation"]


def test_settings_show_what_differs_and_what_it_ran_on(whole):
    settings = section(whole, "settings")
    assert "What differs between the finetune runs" in settings
    assert re.search(r"learning_rate</th><td>0.001</td><td>0.0005</td>", settings)
    assert "versions.torch" in settings and "derived.effective_batch" in settings
    assert "temperature: 0.2" in settings


def test_names_from_files_are_text_and_never_markup(whole):
    assert "<b>spleen" not in whole
    assert "&lt;b&gt;spleen" in whole


def test_a_bare_run_has_remarks_and_no_empty_sections(tmp_path):
    Run.create(tmp_path / "run", command="pretrain", settings={"method": "MiM"}, inputs={})
    page = write_report(tmp_path, tmp_path / "run")
    assert "run has logged no metrics yet." in page
    assert "No scores: " in page
    assert "run has saved no images." in page
    assert re.findall(r'<section id="(.*?)">', page) == ["runs", "settings"]
    assert re.findall(r'<a href="#(.*?)">', page) == ["runs", "settings"]


def test_scores_from_elsewhere_are_named_after_their_file(tmp_path):
    make_run(tmp_path / "run")
    path = make_scores(tmp_path, tmp_path / "elsewhere" / "test_fold.json")
    assert "test_fold" in section(write_report(tmp_path, tmp_path / "run", scores=[str(path)]), "scores")


def test_the_scores_of_a_run_are_shown_once_even_when_given_again(tmp_path):
    make_run(tmp_path / "run")
    path = make_scores(tmp_path, tmp_path / "run" / "scores.json", cases="a")
    page = write_report(tmp_path, tmp_path / "run", scores=[str(path)])
    assert "Differences are to" not in page


def test_scores_of_other_cases_are_said_not_to_compare(tmp_path):
    paths = []
    for name, cases in (("one", "ab"), ("two", "bc")):
        make_run(tmp_path / name)
        paths.append(make_scores(tmp_path / name, tmp_path / name / "scores.json", cases=cases))
    page = write_report(tmp_path, tmp_path / "one", tmp_path / "two")
    assert "not the same cases" in section(page, "scores")
    assert re.findall(r"<h3>(.*?)</h3>", section(page, "segmentations")) == ["Case 1 of 1: b"]


def test_scans_and_predictions_that_have_gone_are_said(tmp_path):
    make_run(tmp_path / "run")
    make_scores(tmp_path, tmp_path / "run" / "scores.json", cases="ab")
    (tmp_path / "images" / "a.nii.gz").unlink()
    (tmp_path / "run" / "pred" / "b.nii.gz").unlink()
    segmentations = section(write_report(tmp_path, tmp_path / "run"), "segmentations")
    assert "The scan of a is not known or no longer there" in segmentations
    assert "b cannot be shown: " in segmentations
    assert segmentations.count('class="film"') == 1 and "film-legend" in segmentations
    # With nothing to see there is no legend either.
    (tmp_path / "run" / "pred" / "a.nii.gz").unlink()
    assert "film-legend" not in section(write_report(tmp_path, tmp_path / "run"), "segmentations")


def test_training_crops_of_a_fine_tuning_are_shown(tmp_path):
    labels = np.zeros((8, 8, 4), dtype=np.int64)
    labels[2:5, 2:5, 1:3] = 2
    crop = {"image": np.random.default_rng(0).random((8, 8, 4)), "reference": labels, "prediction": labels}
    run = make_run(tmp_path / "run")
    run.save_pictures(20, {f"segmentation/{kind}": volume for kind, volume in crop.items()})
    images = section(write_report(tmp_path, tmp_path / "run"), "images")
    assert "run, step 20" in images
    assert images.count('class="film"') == 1


def test_a_crop_of_a_classifier_is_shown_and_volumes_of_no_known_kind_make_no_section(tmp_path):
    volume = np.random.default_rng(0).random((8, 8, 4))
    run = make_run(tmp_path / "run", task="classification")
    run.save_pictures(20, {"classification/image": volume})
    images = section(write_report(tmp_path, tmp_path / "run"), "images")
    assert "classification: middle slices of one training crop." in images and images.count('class="film"') == 1
    other = make_run(tmp_path / "other")
    other.save_pictures(20, {"mine/something": volume})
    assert 'id="images"' not in write_report(tmp_path, tmp_path / "other", overwrite=True)


def test_damaged_images_are_said(tmp_path):
    run = make_run(tmp_path / "run", "pretrain")
    run.save_pictures(10, images_of())
    (tmp_path / "run" / "pictures" / "step_00000010.npz").write_bytes(b"PK\x03\x04 not a zip")
    assert "these images cannot be read" in section(write_report(tmp_path, tmp_path / "run"), "images")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"labels": {}}', '{"labels": {}, "mean": {}, "per_label": {}, "cases": [1]}']
)
def test_a_file_that_is_no_scores_is_refused(tmp_path, content):
    make_run(tmp_path / "run")
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ConfigError, match=r"s\.json"):
        write_report(tmp_path, tmp_path / "run", scores=[str(tmp_path / "s.json")])


def _with(content, path, value):
    """Scores with another value at a path of keys; ``...`` takes the key away."""
    content = json.loads(json.dumps(content))
    held = content
    for key in path[:-1]:
        held = held[key]
    held[path[-1]] = value
    if value is ...:
        del held[path[-1]]
    return content


#: Places in scores whose values a report reads.
PLACES = [
    ("settings",),
    ("settings", "nsd_tolerance_mm"),
    ("not_scored",),
    ("not_scored", "failed"),
    ("labels",),
    ("mean", "dice"),
    ("mean_ci95",),
    ("mean_ci95", "dice"),
    ("per_label", "liver"),
    ("per_label", "liver", "std"),
    ("per_label", "liver", "ci95", "dice"),
    ("per_label", "liver", "ci95", "dice", 1),
    ("per_label", "liver", "num_cases"),
    ("per_label", "liver", "num_missed"),
    ("cases", 0),
    ("cases", 0, "id"),
    ("cases", 0, "images"),
    ("cases", 0, "reference"),
    ("cases", 0, "prediction"),
    ("cases", 0, "labels", "liver"),
    ("cases", 0, "labels", "liver", "dice"),
]


@pytest.mark.usefixtures("undrawn")
def test_every_value_of_scores_may_be_anything(tmp_path):
    make_run(tmp_path / "run")
    row = {"dice": 0.5, "hd95_mm": 3.0, "nsd": None}
    content = {
        "labels": {"1": "liver"},
        "settings": {"nsd_tolerance_mm": 1.0},
        "not_scored": {"failed": []},
        "mean": row,
        "mean_ci95": {"dice": [0.4, 0.6], "hd95_mm": None},
        "per_label": {"liver": {**row, "std": row, "ci95": {"dice": [0.4, 0.6]}, "num_cases": 2, "num_missed": 0}},
        "cases": [{"id": "a", "images": ["a.nii"], "reference": "r", "prediction": "p", "labels": {"liver": row}}],
    }
    scores = tmp_path / "s.json"
    scores.write_text(json.dumps(content))
    write_report(tmp_path, tmp_path / "run", scores=[str(scores)])
    num_refused = 0
    for path in PLACES:
        for value in ("x", [], [[]], {}, {"a": 1}, True, 10**400, None, ...):
            scores.write_text(json.dumps(_with(content, path, value)))
            try:
                write_report(tmp_path, tmp_path / "run", scores=[str(scores)])
            except ConfigError as error:
                num_refused += 1
                assert str(scores) in str(error) and len(str(error)) < 700
    assert num_refused > 100


@pytest.mark.parametrize("step", ["1", None, -1, 1.5, [1], 10**400])
def test_a_line_of_metrics_without_a_step_ends_them(tmp_path, step):
    run = make_run(tmp_path / "run")
    with open(run.metrics_path, "a") as file:
        file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
        file.write(json.dumps({"step": 77, "loss": 10**400}) + "\n")
    assert "77" not in section(write_report(tmp_path, tmp_path / "run"), "runs")


@pytest.mark.usefixtures("undrawn")
def test_the_folder_of_all_folds_stands_for_its_runs(tmp_path):
    for number in (0, 2, 10):
        make_run(tmp_path / "all" / f"fold_{number}", fold=number)
    (tmp_path / "all" / "fold_mine").mkdir()
    page = write_report(tmp_path, tmp_path / "all")
    assert re.findall(r'<th scope="row">(fold_\d+)</th>', section(page, "runs")) == ["fold_0", "fold_2", "fold_10"]
    # It may be replaced by a report on one of them.
    write_report(tmp_path, tmp_path / "all" / "fold_2")


def test_folded_parts_of_a_page_are_open_on_paper(tmp_path):
    make_run(tmp_path / "run")
    style = re.search(r"@media print .*</style>", write_report(tmp_path, tmp_path / "run"), re.DOTALL)
    assert "section:not(#settings) details::details-content { content-visibility: visible;" in style[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        write_report(tmp_path, tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("runs", "out", "message"), [([], "r.html", "runs is empty"), (["x"], "r.pdf", r"use r\.pdf\.html")]
)
def test_settings_that_cannot_work_are_refused(tmp_path, runs, out, message):
    with pytest.raises(ConfigError, match=message):
        report(runs, out)


@pytest.mark.usefixtures("undrawn")
def test_runs_that_differ_in_more_than_weights_are_said_on_the_page_and_on_the_screen(tmp_path):
    one, other = make_run(tmp_path / "one", max_steps=100), make_run(tmp_path / "other", max_steps=200, weights="pre")
    with pytest.warns(ComparisonWarning, match="one and other differ in more than weights: max_steps 100 and 200;"):
        page = write_report(tmp_path, one.path, other.path)
    assert "<dt>comparison</dt><dd>one and other differ in more than weights: max_steps 100 and 200;" in page
