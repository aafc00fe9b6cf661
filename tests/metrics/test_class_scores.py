"""Scores of classes against loops over pairs and cases, and against values by hand."""

import itertools
import json

import numpy as np
import pytest

from mim3d.core.errors import ConfigError, DataError
from mim3d.metrics import Bootstrap, classification_scores
from mim3d.metrics.class_statistics import weighted_auc

NO_INTERVALS = Bootstrap(num_bootstrap=0)


def brute_auc(scores, positive):
    pairs = list(itertools.product(scores[positive], scores[~positive]))
    return np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])


def binary(positive_probabilities):
    p = np.asarray(positive_probabilities, dtype=float)
    return np.stack([1 - p, p], axis=1)


def random_cases(seed, num_cases=60, num_classes=3):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(num_classes), size=num_cases).round(2)
    probabilities[:, -1] = 1 - probabilities[:, :-1].sum(1)
    return np.clip(probabilities, 0, 1), rng.integers(0, num_classes, num_cases)


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_the_share_of_pairs_in_the_right_order(seed):
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 8, 40) / 8, rng.random(40) > 0.6
    weights = rng.integers(0, 4, (5, 40)).astype(float)
    found = weighted_auc(scores, positive, np.vstack([np.ones(40), weights]))
    drawn = [np.repeat(np.arange(40), row.astype(int)) for row in weights]
    expected = [brute_auc(scores, positive), *(brute_auc(scores[rows], positive[rows]) for rows in drawn)]
    assert found == pytest.approx(expected)


def test_auc_of_one_class_alone_is_not_defined():
    found = classification_scores(binary([0.2, 0.9]), [1, 1], bootstrap=NO_INTERVALS)
    assert found["mean"]["auc"] is None
    assert found["mean"]["specificity"] is None
    assert found["mean"]["sensitivity"] == 0.5


def test_two_classes_score_as_by_hand():
    found = classification_scores(binary([0.1, 0.4, 0.35, 0.8]), [0, 0, 1, 1], bootstrap=NO_INTERVALS)
    mean = found["mean"]
    assert mean["auc"] == 0.75
    assert (mean["accuracy"], mean["sensitivity"], mean["specificity"], mean["balanced_accuracy"]) == (
        0.75, 0.5, 1.0, 0.75,
    )  # fmt: skip
    assert mean["f1_macro"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert mean["brier"] == pytest.approx((0.01 + 0.16 + 0.65**2 + 0.04) / 4)
    assert found["confusion"] == [[2, 0], [1, 1]]


@pytest.mark.parametrize("seed", range(3))
def test_several_classes_score_as_loops_say(seed):
    probabilities, classes = random_cases(seed)
    found = classification_scores(probabilities, classes, bootstrap=NO_INTERVALS)
    predicted = probabilities.argmax(1)
    aucs = [brute_auc(probabilities[:, k], classes == k) for k in range(3)]
    recalls = [np.mean(predicted[classes == k] == k) for k in range(3)]
    f1s = []
    for k in range(3):
        true = np.sum((classes == k) & (predicted == k))
        f1s.append(2 * true / (np.sum(classes == k) + np.sum(predicted == k)))
    truth = np.array([[float(c == k) for k in range(3)] for c in classes])
    assert found["mean"]["auc"] == pytest.approx(np.mean(aucs))
    assert found["mean"]["accuracy"] == pytest.approx(np.mean(predicted == classes))
    assert found["mean"]["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["mean"]["f1_macro"] == pytest.approx(np.mean(f1s))
    assert found["mean"]["brier"] == pytest.approx(np.mean(((probabilities - truth) ** 2).sum(1)))
    assert [row["recall"] for row in found["per_class"].values()] == pytest.approx(recalls)
    assert "sensitivity" not in found["mean"]


def test_calibration_error_is_the_gap_of_the_bins_by_hand():
    probabilities = [0.05, 0.1, 0.62, 0.68, 0.95]
    found = classification_scores(binary(probabilities), [0, 1, 1, 0, 1], num_bins=10, bootstrap=NO_INTERVALS)
    # Bins (0, 0.1]: 2 cases, 0.075 against 0.5; (0.6, 0.7]: 2, 0.65 against 0.5; (0.9, 1]: 1, 0.95 against 1.
    assert found["mean"]["ece"] == pytest.approx((2 * 0.425 + 2 * 0.15 + 0.05) / 5)
    held = [row for row in found["reliability"] if row["num_cases"]]
    assert [(row["num_cases"], row["frequency"]) for row in held] == [(2, 0.5), (2, 0.5), (1, 1.0)]


def test_a_forecast_that_is_right_as_often_as_it_says_is_calibrated():
    found = classification_scores(binary([0.25] * 8), [1, 0, 0, 0] * 2, bootstrap=NO_INTERVALS)
    assert found["mean"]["ece"] == pytest.approx(0.0)


def test_probabilities_of_zero_and_one_fall_into_the_outer_bins():
    found = classification_scores(binary([0.0, 1.0]), [0, 1], num_bins=4, bootstrap=NO_INTERVALS)
    assert [row["num_cases"] for row in found["reliability"]] == [1, 0, 0, 1]


def test_intervals_are_those_of_a_loop_over_resampled_patients():
    probabilities, classes = random_cases(5, 30, 2)
    patients = [str(number // 3) for number in range(30)]
    found = classification_scores(
        probabilities, classes, patients=patients, bootstrap=Bootstrap(num_bootstrap=150, seed=3)
    )
    rng, accuracies, aucs = np.random.default_rng(3), [], []
    for counts in rng.multinomial(10, [0.1] * 10, size=150):
        rows = np.concatenate([np.arange(3 * p, 3 * p + 3) for p, count in enumerate(counts) for _ in range(count)])
        accuracies.append(np.mean(probabilities[rows].argmax(1) == classes[rows]))
        aucs.append(brute_auc(probabilities[rows, 1], classes[rows] == 1))
    assert found["mean_ci95"]["accuracy"] == pytest.approx(np.percentile(accuracies, [2.5, 97.5]))
    assert found["mean_ci95"]["auc"] == pytest.approx(np.percentile(aucs, [2.5, 97.5]))
    assert found["num_patients"] == 10


def test_patients_are_scored_by_the_mean_of_their_scans():
    found = classification_scores(
        binary([0.9, 0.3, 0.2, 0.4]), [1, 1, 0, 0], patients=list("xxyy"), by_patient=True, bootstrap=NO_INTERVALS
    )
    assert found["num_cases"] == 2
    assert found["mean"]["brier"] == pytest.approx((0.4**2 + 0.3**2) / 2)
    assert found["mean"]["accuracy"] == 1.0


def test_a_patient_of_two_classes_cannot_be_one_case():
    with pytest.raises(DataError, match=r"Patient x.*by_patient"):
        classification_scores(binary([0.9, 0.3]), [1, 0], patients=["x", "x"], by_patient=True)


def test_predicted_classes_may_come_from_another_threshold():
    found = classification_scores(binary([0.3, 0.1]), [1, 0], predicted=[1, 0], bootstrap=NO_INTERVALS)
    assert found["mean"]["accuracy"] == 1.0


def test_the_positive_class_may_be_the_first():
    found = classification_scores(binary([0.2, 0.7, 0.9]), [0, 1, 1], positive=0, bootstrap=NO_INTERVALS)
    assert (found["mean"]["auc"], found["mean"]["sensitivity"], found["mean"]["specificity"]) == (1.0, 1.0, 1.0)


def test_a_baseline_that_orders_like_the_classifier_differs_in_nothing():
    p = np.random.default_rng(0).random(30)
    classes = np.random.default_rng(1).random(30) < p
    found = classification_scores(binary(p), classes, baseline=10 * p + 3)["baseline"]
    assert found["predictions"] == found["baseline"]
    assert found["difference"] == {"auc": 0.0, "ci95": [0.0, 0.0]}
    reversed_one = classification_scores(binary(p), classes, baseline=-p, bootstrap=NO_INTERVALS)["baseline"]
    assert reversed_one["baseline"]["auc"] == pytest.approx(1 - found["predictions"]["auc"])


def test_scores_are_valid_json():
    probabilities, classes = random_cases(1)
    json.dumps(classification_scores(probabilities, classes, bootstrap=Bootstrap(num_bootstrap=100)), allow_nan=False)


@pytest.mark.parametrize(
    ("probabilities", "classes", "message"),
    [
        ([[0.5, 0.6]], [0], "sum to 1"),
        ([[1.2, -0.2]], [0], "from 0 to 1"),
        ([[np.nan, 0.5]], [0], "nan"),
        ([[0.5, 0.5]], [2], "from 0 to 1, but 2"),
        ([[0.5, 0.5]], [0, 1], "give each case one"),
        ([[1.0]], [0], "two or more classes"),
        ([0.5, 0.5], [0, 1], "shape"),
    ],
)
def test_numbers_that_are_no_probabilities_are_refused(probabilities, classes, message):
    with pytest.raises(DataError, match=message):
        classification_scores(probabilities, classes)


def test_no_bins_are_refused():
    with pytest.raises(ConfigError, match="num_bins is 0"):
        classification_scores(binary([0.5, 0.2]), [0, 1], num_bins=0)
