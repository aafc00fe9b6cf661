"""Connected components: what hangs together, which are kept, and that nothing else changes."""

import numpy as np
import pytest

from mim3d.scans.components import remove_components

CUBE = (1.0, 1.0, 1.0)


def scene() -> np.ndarray:
    """Label 2 in parts of 27, 8 and 1 voxels, label 5 in parts of 8 and 8, the parts apart from each other."""
    labels = np.zeros((20, 12, 8), dtype=np.uint8)
    labels[1:4, 1:4, 1:4] = 2
    labels[6:8, 1:3, 1:3] = 2
    labels[10, 1, 1] = 2
    labels[1:3, 7:9, 1:3] = 5
    labels[6:8, 7:9, 1:3] = 5
    return labels


def test_the_largest_component_of_the_named_labels_alone_is_kept():
    labels = scene()
    remove_components(labels, spacing_mm=CUBE, largest=[2])
    assert (labels == 2).sum() == 27 and (labels == 5).sum() == 16
    remove_components(labels, spacing_mm=CUBE, largest=[2, 5])
    assert (labels == 5).sum() == 8 and (labels[1:3, 7:9, 1:3] == 5).all()


@pytest.mark.parametrize(
    ("min_ml", "left"), [(0.0, 36), (0.001, 36), (0.0015, 35), (0.008, 35), (0.0081, 27), (1.0, 0)]
)
def test_components_smaller_than_a_volume_are_removed(min_ml, left):
    labels = scene()
    remove_components(labels, spacing_mm=CUBE, min_ml=min_ml)
    assert (labels == 2).sum() == left


def test_volumes_are_millilitres_whatever_the_voxels():
    labels = scene()
    remove_components(labels, spacing_mm=(2.0, 2.0, 2.5), min_ml=0.08)
    assert (labels == 2).sum() == 35
    remove_components(labels, spacing_mm=(2.0, 2.0, 2.5), min_ml=0.081)
    assert (labels == 2).sum() == 27


def test_corners_connect_and_another_label_does_not():
    labels = np.zeros((6, 6, 6), dtype=np.uint16)
    labels[0, 0, 0] = labels[1, 1, 1] = 300
    labels[1, 1, 2], labels[1, 1, 3] = 4, 300
    remove_components(labels, spacing_mm=CUBE, largest=[300])
    assert np.argwhere(labels == 300).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert labels[1, 1, 2] == 4


def test_both_rules_hold_at_once_and_none_changes_nothing():
    labels = scene()
    remove_components(labels, spacing_mm=CUBE)
    assert np.array_equal(labels, scene())
    remove_components(labels, spacing_mm=CUBE, largest=[5], min_ml=0.009)
    assert (labels == 2).sum() == 27 and not (labels == 5).any()
    remove_components(np.zeros((3, 3, 3), np.uint8), spacing_mm=CUBE, largest=[1], min_ml=1.0)
