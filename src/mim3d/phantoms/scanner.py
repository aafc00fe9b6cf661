"""The phantom's CT scanner: table, finite resolution, noise as reconstructed slices have it, field of view."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mim3d.phantoms.pose import Placement
from mim3d.phantoms.shapes import Array, Vector

AIR_HU = -1000.0
#: What scanners store outside their round field of view.
OUTSIDE_HU = -1024.0


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """How one scan was taken.

    Attributes:
        noise_hu: Standard deviation of the noise in the middle of the body.
        sharpness: 0 for a soft kernel, 1 for a sharp one: its noise is fine-grained.
        streak_hu: Standard deviation of streaks across the body, worst at the hips.
        cupping_hu: How much darker the middle of the body is (beam hardening).
        table_gap_mm: Between back and table.
        table_radius_mm: Radius of the table's curve.
        round_view: Whether the corners outside the round field of view are blank.
    """

    noise_hu: float
    sharpness: float
    streak_hu: float
    cupping_hu: float
    table_gap_mm: float
    table_radius_mm: float
    round_view: bool


def draw_scanner(rng: np.random.Generator) -> Scanner:
    """Draw a dose, a kernel, a table and a field of view."""
    return Scanner(
        noise_hu=rng.uniform(7, 20),
        sharpness=rng.uniform(0, 1),
        streak_hu=rng.uniform(1, 5),
        cupping_hu=rng.uniform(0, 10),
        table_gap_mm=rng.uniform(0, 6),
        table_radius_mm=rng.uniform(420, 800),
        round_view=bool(rng.random() < 0.35),
    )


def paint_table(scanner: Scanner, placement: Placement, back: Vector, hu: Array) -> None:
    """Paint table and mattress under a patient into some slices `hu` (X, Y, slices), before the patient.

    Args:
        scanner: The scanner.
        placement: The scan.
        back: The place of the scan where the table touches the patient, mm.
        hu: Changed in place.
    """
    x = placement.scan_mm(0)[:, None] - np.float32(back[0])
    y = placement.scan_mm(1)[None, :] - np.float32(back[1])
    depth = (x * x) * np.float32(0.5 / scanner.table_radius_mm) - scanner.table_gap_mm - y
    width = np.abs(x) + 0 * y
    tissues = ((0.0, 11.0, 205.0, -930.0), (11.0, 36.0, 215.0, -180.0), (14.0, 33.0, 212.0, -860.0))
    for top, bottom, half_width, value in tissues:
        hu[(depth > top) & (depth < bottom) & (width < half_width)] = value


def scan(scanner: Scanner, placement: Placement, hu: Array, rng: np.random.Generator) -> np.ndarray:
    """Blur the painted tissues, add noise, and store them as a scanner does.

    Args:
        scanner: How the scan is taken.
        placement: Position of the voxels.
        hu: (X, Y, Z) float32, used up.
        rng: Source of the noise.

    Returns:
        (X, Y, Z) int16 HU from -1024 to 3071.
    """
    for axis, sigma in enumerate((0.5, 0.5, 0.4)):
        ndimage.gaussian_filter1d(hu, sigma, axis=axis, output=hu, mode="nearest", truncate=3)
    x, y, z = (placement.scan_mm(axis) for axis in range(3))
    radius = (x / 170)[:, None] ** 2 + (y / 125)[None, :] ** 2
    middle = np.exp(-0.5 * radius.astype(np.float32)).astype(np.float32)
    hips = 1 / (1 + np.exp((z + 110) / 30)).astype(np.float32)
    hu += _grain(scanner, hu.shape, rng) * (np.float32(scanner.noise_hu) * (0.45 + 0.65 * middle))[:, :, None]
    hu += _streaks(hu.shape, rng) * (np.float32(scanner.streak_hu) * (0.5 + 1.5 * hips)) * middle[:, :, None]
    hu -= (np.float32(scanner.cupping_hu) * middle)[:, :, None]
    if scanner.round_view:
        view = max(float(np.ptp(x)), float(np.ptp(y))) / 2
        hu[x[:, None] ** 2 + y[None, :] ** 2 > view**2] = OUTSIDE_HU
    np.clip(hu, OUTSIDE_HU, 3071, out=hu)
    return np.rint(hu, out=hu).astype(np.int16)


def _grain(scanner: Scanner, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Noise of unit deviation whose coarse part is damped within slices, as filtered back-projection does."""
    fine = 0.85 - 0.35 * scanner.sharpness
    noise = rng.standard_normal(shape, dtype=np.float32)
    for axis, sigma in enumerate((fine, fine, 0.35)):
        ndimage.gaussian_filter1d(noise, sigma, axis=axis, output=noise, mode="reflect", truncate=3)
    coarse = np.empty_like(noise)
    ndimage.gaussian_filter1d(noise, 1.6, axis=0, output=coarse, mode="reflect", truncate=2)
    ndimage.gaussian_filter1d(coarse, 1.6, axis=1, output=coarse, mode="reflect", truncate=2)
    coarse *= 0.3 + 0.4 * np.float32(scanner.sharpness)
    noise -= coarse
    noise *= 1 / noise.std(dtype=np.float64)
    return noise


def _streaks(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Noise of about unit deviation that is long from side to side and new in every row of every slice."""
    num_knots = 8
    knots = rng.standard_normal((num_knots, *shape[1:]), dtype=np.float32)
    places = np.linspace(0, num_knots - 1, shape[0])
    left = np.minimum(places.astype(int), num_knots - 2)
    right_share = (places - left).astype(np.float32)[:, None, None]
    return np.asarray(knots[left] * (1 - right_share) + knots[left + 1] * right_share)
