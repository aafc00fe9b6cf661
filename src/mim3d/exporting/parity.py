"""Whether an exported program computes what the network computes: compared at export, on noise and on a likely scan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.core.errors import CheckpointError
from mim3d.exporting.networks import Exported
from mim3d.exporting.programs import outputs_of

#: Largest difference allowed, as a share of the largest value of an output. Rounding in float32 gives 1e-6 to 1e-4
#: (the most where a network has flat input to normalise); a wrong operator gives more than 1e-2.
TOLERANCE = 5e-4

#: Seed of the inputs that are compared.
SEED = 20


@dataclass(frozen=True)
class Parity:
    """The largest difference between a program and its network.

    Attributes:
        absolute: in units of the output.
        relative: the same as a share of the largest value of that output.
    """

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"largest difference {self.absolute:.1e} ({self.relative:.1e} of the largest value)"


def compared(network: Exported, run: Callable[[Tensor], Sequence[Tensor]], what: str) -> dict[str, Parity]:
    """Run a program and the network on the same inputs; each comparison is printed.

    Args:
        network: the network.
        run: the program: outputs, in order, of ``(B, C, X, Y, Z)`` float32.
        what: the file, for the error.
    Returns:
        The larger difference of all outputs, by the name of the input.
    Raises:
        CheckpointError: it differs by more than ``TOLERANCE``, or gives outputs of another number or shape.
    """
    results = {}
    for name, image in inputs_for(network).items():
        with torch.no_grad():
            parity = difference(outputs_of(network.form.program(image)), list(run(image)))
        if parity is None or not parity.relative <= TOLERANCE:
            shown = "outputs of other shapes" if parity is None else str(parity)
            raise CheckpointError(
                f"{what} does not compute what its network does ({name}: {shown}; allowed are {TOLERANCE:.0e}); it was "
                "deleted: try other versions of torch and of the format's packages."
            )
        print(f"{what}: {name}: {parity}")
        results[name] = parity
    return results


def difference(reference: Sequence[Tensor], given: Sequence[Tensor]) -> Parity | None:
    """The output that differs most; None where number or shapes do not agree, infinite where a value is no number."""
    if [tuple(tensor.shape) for tensor in reference] != [tuple(tensor.shape) for tensor in given]:
        return None
    worst = Parity(0.0, 0.0)
    for expected, got in zip(reference, given, strict=True):
        absolute = float((expected - got).abs().max())
        relative = absolute / max(float(expected.abs().max()), 1e-12)
        if not relative <= worst.relative:
            worst = Parity(absolute, relative)
    return worst


def inputs_for(network: Exported) -> dict[str, Tensor]:
    """What is compared: two samples of noise, and one sample of intensities such as a scan has."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (network.num_channels, *network.patch_size)
    noise = torch.randn(2, *shape, generator=generator)
    intensity = network.card.get("intensity") or {}
    return {"random input": noise, "scan-like input": _scan_like(shape, intensity.get("kind"), generator)}


def _scan_like(shape: tuple[int, ...], kind: str | None, generator: torch.Generator) -> Tensor:
    """Air, soft tissue and bone in smooth shapes with a little noise, mapped as the network's input is."""
    channels, *size = shape
    coarse = torch.randn(1, channels, *(max(2, edge // 12) for edge in size), generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
    image = torch.where(smooth < -0.2, 0.0, torch.where(smooth > 0.8, 1.0, 0.5))
    image = (image + 0.03 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    if kind == "zscore":
        return (image - image.mean()) / image.std()
    return image
