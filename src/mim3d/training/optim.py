"""AdamW with weight decay only where it belongs, and a learning rate for every layer of the encoder."""

import re
from collections.abc import Iterable

import lightning_fabric
import torch
from torch import Tensor, nn

from mim3d.backbones.contract import Encoder
from mim3d.training.optimisation import Schedule

_TOKEN_OR_POSITION = re.compile(r"(^|[._])(mask_token|cls_token|pos_embed|positions?|positional)([._]|$)")


def decay_groups(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split the trainable parameters into those with and those without weight decay, by name.

    Without it: biases, norms and every other one-dimensional tensor, mask and class tokens, positions.
    """
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim <= 1 or name.endswith("bias") or _TOKEN_OR_POSITION.search(name)
            (plain if spared else decayed)[name] = parameter
    return decayed, plain


def layer_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factor on the learning rate of every parameter of ``module.encoder``, by name; all others have 1.

    ``layer_decay ** (num_layers - layer)`` as in BEiT (Bao et al. 2022, appendix) and MAE (He et al. 2022, table 9):
    the output of the encoder and what is built on it learn at the full rate, the stem slowest.
    """
    encoder = getattr(module, "encoder", None)
    if layer_decay == 1 or not isinstance(encoder, Encoder):
        return {}
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    return {f"encoder.{name}": layer_decay ** (encoder.num_layers - layer) for name, layer in layers.items()}


def layer_lines(module: nn.Module, schedule: Schedule) -> list[str]:
    """What layer-wise learning rates come to, in a sentence; nothing where all layers learn alike."""
    scales = layer_scales(module, schedule.layer_decay)
    if not scales:
        return []
    low, high = min(scales.values()), max(scales.values())
    return [
        f"the encoder's layers learn at {low:.3g} (lowest) to {high:.3g} (highest) times the learning rate = "
        f"{schedule.layer_decay:g} ^ layers above, {low * schedule.learning_rate:.3g} to "
        f"{high * schedule.learning_rate:.3g}; everything built on it at all of it"
    ]


def build_optimizer(module: nn.Module, schedule: Schedule, precision: str = "32-true") -> torch.optim.AdamW:
    """AdamW over the trainable parameters of ``module``; empty groups are left out.

    Fused into one pass over each parameter, three times as fast on a CPU; not with float16, whose loss scaling must see
    the gradients before the step.
    """
    scales = layer_scales(module, schedule.layer_decay)
    groups = []
    for parameters, weight_decay in zip(decay_groups(module), (schedule.weight_decay, 0.0), strict=True):
        by_scale: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            by_scale.setdefault(scales.get(name, 1.0), []).append(parameter)
        groups += [
            {"params": members, "weight_decay": weight_decay, "lr_scale": scale} for scale, members in by_scale.items()
        ]
    fused = precision != "16-mixed"
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=schedule.betas, fused=fused)


def clip_gradients(
    fabric: lightning_fabric.Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float
) -> Tensor:
    """Clip the whole gradient to ``max_norm`` (infinite: leave it); returns the norm it had, unread."""
    norm = fabric.clip_gradients(model, optimizer, max_norm=max_norm, error_if_nonfinite=False)
    assert norm is not None
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group the learning rate of the coming step, times its own scale."""
    for group in optimizer.param_groups:
        # Checkpoints from before there were scales have none.
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def num_values(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers held by ``parameters``."""
    return sum(parameter.numel() for parameter in parameters)
