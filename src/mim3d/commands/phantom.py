"""The command that makes the data that come with mim3d: a labelled set of synthetic CT scans."""

from mim3d.core.command import typed
from mim3d.core.names import number_of
from mim3d.phantoms.dataset import PhantomSettings, make_set


@typed
def phantom(
    out: str,
    *,
    num_cases: int = 12,
    size: tuple[int, int, int] = (224, 224, 160),
    seed: int = 0,
    num_test: int = 0,
) -> str:
    """Make a labelled set of synthetic CT scans of chest and belly, laid out as the Medical Segmentation Decathlon.

    Patients differ in build, pose, contrast phase, lesions and clutter; scans in size, spacing, noise and stored
    orientation. The same settings make the same voxels. May be stopped and run again: finished cases are kept.

    Args:
        out: Folder for imagesTr, labelsTr and dataset.json.
        num_cases: Number of cases to train on.
        size: Largest number of voxels along X, Y, Z; the first case has it, the others are up to a third smaller.
        seed: Whole number that names the set; case n of a seed is the same in sets of any length.
        num_test: Number of further cases, kept apart in imagesTs and labelsTs.

    Returns:
        The path of the set.

    Raises:
        ConfigError: A setting cannot work, or the folder holds other things.
        DataError: The folder cannot be written to.
    """
    settings = PhantomSettings(num_cases=num_cases, size=size, seed=seed, num_test=num_test)
    num_all, num_made = make_set(out, settings)
    kept = f", {num_all - num_made} of them kept" if num_made < num_all else ""
    print(f"{out}: {number_of(num_all, 'phantom')}{kept}, listed in dataset.json")
    return out
