"""What shapes and names show of a residual encoder in the layout of nnU-Net's package, which nnssl shares."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mim3d.scans.intensity import Intensity
from mim3d.weights.families.family import ExpectedInput, Tensors
from mim3d.weights.states import HeldWeights

ANCHORS = ("stem.convs.0.conv.weight", "stages.0.blocks.0.conv1.conv.weight")
ENCODER = r"stem\.|stages\."

#: Layers under a second name, and the encoder once more inside of nnU-Net's decoder.
DROPS = (r"\.all_modules\.", r"\bdecoder\.encoder\.")

#: How nnU-Net reads scans.
ORIENTATION = "axes as stored, arrays along Z, Y, X (kernels are taken as they are)"

#: Convolutions of the first stages of anisotropic plans, and bottlenecks.
_KERNEL = re.compile(r"(stem\.convs\.0|stages\.\d+\.blocks\.\d+\.conv\d)\.conv\.weight")


def settings_of_resenc(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of our ResEnc, by the tensors of an encoder by our names."""
    widths: list[int] = []
    depths: list[int] = []
    while (weight := tensors.get(f"stages.{len(widths)}.blocks.0.conv1.conv.weight")) is not None and weight.ndim == 5:
        blocks = re.compile(rf"stages\.{len(widths)}\.blocks\.(\d{{1,4}})\.")
        depths.append(1 + max(int(found[1]) for name in tensors if (found := blocks.match(name))))
        widths.append(weight.shape[0])
    return {"widths": widths, "depths": depths, "in_channels": tensors["stem.convs.0.conv.weight"].shape[1]}


def unfit_resenc(_: Mapping[str, Any], tensors: Mapping[str, Tensor], held: HeldWeights) -> str:
    """What is in the way of our ResEnc, whose kernels have three voxels and whose stages halve each axis."""
    kernels = {tuple(value.shape[2:]) for name, value in tensors.items() if _KERNEL.fullmatch(name)} - {(3, 3, 3)}
    if kernels:
        shown = " and ".join(map(str, sorted(kernels)))
        return (
            f": its convolutions have kernels of {shown}, mim3d's (3, 3, 3) alone, so its weights cannot be used here"
        )
    if any(".conv3." in name for name in tensors):
        return ": its blocks are bottlenecks, which mim3d's are not, so its weights cannot be used here"
    strides = architecture_of(held).get("strides", ())
    steps = [tuple(step) for step in strides if isinstance(step, list)]
    if any(step != ((1, 1, 1) if stage == 0 else (2, 2, 2)) for stage, step in enumerate(steps)):
        return f": its plan has strides {strides}, mim3d's halve each axis, so its weights cannot be used here"
    return ""


def turned_back(tensors: Tensors, held: HeldWeights) -> Tensors:
    """Kernels along X, Y, Z, where mim3d itself exported them along Z, Y, X."""
    if within(held.beside, "mim3d").get("axes") != "ZYX":
        return tensors
    return {name: value.transpose(2, 4) if value.ndim == 5 else value for name, value in tensors.items()}


def expected_by_plan(held: HeldWeights) -> ExpectedInput | None:
    """What the plan beside the weights says of the input; None without one."""
    plan, configuration = plan_of(held)
    spacing, schemes = configuration.get("spacing"), configuration.get("normalization_schemes")
    edges = [float(one) for one in spacing if type(one) in (int, float)] if isinstance(spacing, list) else []
    if not isinstance(schemes, list) or not schemes:
        return None
    back = plan.get("transpose_backward")
    order = back if isinstance(back, list) and sorted(map(str, back)) == ["0", "1", "2"] else [0, 1, 2]
    z, y, x = (edges[axis] for axis in order) if len(edges) == 3 else (0.0, 0.0, 0.0)
    zscore = set(schemes) == {"ZScoreNormalization"}
    return ExpectedInput(
        modality="CT" if "CTNormalization" in schemes else "unknown",
        spacing_mm=(x, y, z) if min(x, y, z) > 0 else None,
        orientation=ORIENTATION,
        intensity=Intensity(kind="zscore", window=None) if zscore else None,
        values="z-score of each scan" if zscore else f"nnU-Net's {', '.join(map(str, schemes[:3]))}",
    )


def plan_of(held: HeldWeights) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
    """The plan beside the weights, of nnU-Net or nnssl, and its configuration; empty without one."""
    arguments = within(held.beside, "init_args")
    plan = within(arguments, "plans") or within(within(held.beside, "nnssl_adaptation_plan"), "pretrain_plan")
    configurations = within(plan, "configurations")
    name = arguments.get("configuration")
    first = next(iter(configurations), None)
    return plan, within(configurations, name if isinstance(name, str) else first)


def architecture_of(held: HeldWeights) -> Mapping[Any, Any]:
    """Arguments of the network by the plan beside the weights; empty without one."""
    return within(within(plan_of(held)[1], "architecture"), "arch_kwargs")


def within(mapping: Any, key: Any) -> Mapping[Any, Any]:
    """The mapping under a key, of what anybody may have written; empty where there is none."""
    found = mapping.get(key) if isinstance(mapping, Mapping) else None
    return found if isinstance(found, Mapping) else {}
