"""AdamW with weight decay only where it belongs, a learning rate for every layer, and an average of the weights."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import lightning_fabric
import torch
from torch import Tensor, nn

from mim3d.backbones.contract import Encoder
from mim3d.core.errors import CheckpointError
from mim3d.training.schedule import Schedule, average_decay

_TOKEN_OR_POSITION = re.compile(r"(^|[._])(mask_token|cls_token|registers|pos_embed|positions?|positional)([._]|$)")


def decay_groups(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split the trainable parameters into those with and those without weight decay, by name.

    Biases, norms and every other one-dimensional tensor, mask and class tokens, registers, and positions have no weight
    decay.
    """
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim <= 1 or name.endswith("bias") or _TOKEN_OR_POSITION.search(name)
            (plain if spared else decayed)[name] = parameter
    return decayed, plain


def layer_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factor on the learning rate of every parameter of ``module.encoder``, by name. All other parameters have 1.

    ``layer_decay ** (num_layers - layer)`` as in BEiT (Bao et al. 2022, appendix) and MAE (He et al. 2022, table 9):
    the output of the encoder and what is built on it learn at the full rate, the stem slowest.
    """
    encoder = getattr(module, "encoder", None)
    if layer_decay == 1 or not isinstance(encoder, Encoder):
        return {}
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    return {f"encoder.{name}": layer_decay ** (encoder.num_layers - layer) for name, layer in layers.items()}


def layer_lines(module: nn.Module, schedule: Schedule) -> list[str]:
    """The layers' learning rates in a sentence. Nothing where all layers learn alike."""
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
    """Build AdamW over the trainable parameters of ``module``. Empty groups are left out.

    It is fused into one pass over each parameter, three times as fast on a CPU, but not with float16, whose loss
    scaling must see the gradients before the step.
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
    """Clip the whole gradient to ``max_norm``, and return the norm it had, unread. An infinite one leaves it alone."""
    norm = fabric.clip_gradients(model, optimizer, max_norm=max_norm, error_if_nonfinite=False)
    assert norm is not None
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group the learning rate of the coming step, times its own scale."""
    for group in optimizer.param_groups:
        # Checkpoints from before there were scales have none.
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


class WeightAverage:
    """An exponential moving average of every trained parameter over the steps (Polyak & Juditsky 1992).

    It is validated and exported in the place of the last weights, which are less steady. It is kept in float32 on the
    device of the parameters. Buffers are not averaged.

    Args:
        module: The module that is trained, on the device where it is trained. Its parameters must not be replaced any
            more.
        decay: Decay of the average, see ``average_decay``. 0 keeps no average and costs nothing.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad} if decay else {}
        self._names, self._weights = list(trained), list(trained.values())
        self._averages = [weight.detach().to(torch.float32, copy=True) for weight in self._weights]

    @property
    def size_bytes(self) -> int:
        """Bytes of the average."""
        return sum(average.numel() * average.element_size() for average in self._averages)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step``, from 1 on. Never waits for the device."""
        if self._averages:
            share = 1 - average_decay(self._decay, step)
            torch._foreach_lerp_(self._averages, [weight.float() for weight in self._weights], share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the weights, and afterwards, whatever happens, the same weights back."""
        if not self._averages:
            yield
            return
        kept = [weight.detach().clone() for weight in self._weights]
        try:
            self.replace_weights()
            yield
        finally:
            _fill(self._weights, kept)

    def replace_weights(self) -> None:
        """Replace the weights by the average, for good."""
        _fill(self._weights, self._averages)

    def state_dict(self) -> dict[str, Tensor]:
        """The average of every trained parameter by name."""
        return dict(zip(self._names, self._averages, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved average.

        Raises:
            CheckpointError: It is an average of other parameters.
        """
        odd = sorted(state.keys() ^ set(self._names))
        if odd:
            raise CheckpointError(
                f"The checkpoint's average of the weights and the network differ in {len(odd)} parameters, such as "
                f"{odd[0]}; resume with the ema_decay the run was started with."
            )
        _fill(self._averages, [state[name] for name in self._names])


@torch.no_grad()
def _fill(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
