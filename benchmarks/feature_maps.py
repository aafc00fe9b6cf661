"""The dense path of fine-tuning and prediction against a straightforward PyTorch version of the same encoder.

Run: ``python benchmarks/feature_maps.py`` (or ``make bench``). The base encoder on one 96^3 volume with nothing hidden,
without gradients and with them, one thread on a CPU. Writes benchmarks/results/feature_maps_*.json.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from yardstick.batches import hybrid
from yardstick.dense_mim import DenseEncoder
from yardstick.machine import Row, best_seconds, describe, options, prepare, write_results

NUM_STEPS = 3


def seconds(
    network: nn.Module, compute: Callable[[], Tensor], dtype: torch.dtype, train: bool, device: torch.device
) -> float:
    """Best of several passes after a first."""

    def one_pass() -> None:
        with torch.set_grad_enabled(train), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            total = compute()
        if train:
            torch.autograd.backward(total)
            network.zero_grad(set_to_none=True)

    one_pass()
    return best_seconds(one_pass, device, NUM_STEPS)


def measure(device: torch.device, edge: int) -> list[Row]:
    """One row per precision, with and without gradients."""
    torch.manual_seed(0)
    recipe = hybrid("base")
    ours = recipe.build().to(device)
    plain = DenseEncoder(recipe).to(device)
    plain.load_state_dict(ours.state_dict())
    volume = torch.rand(1, 1, edge, edge, edge, device=device)
    hidden = torch.zeros(1, (edge // plain.edge) ** 3, dtype=torch.bool, device=device)

    def of_ours() -> Tensor:
        return ours.feature_maps(volume)[-1].float().square().sum()

    def of_plain() -> Tensor:
        return plain(volume, hidden).float().square().sum()

    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        for train in (False, True):
            ours_s = seconds(ours, of_ours, dtype, train, device)
            plain_s = seconds(plain, of_plain, dtype, train, device)
            row: Row = {"dtype": str(dtype).removeprefix("torch."), "gradients": train, "mim3d_s": round(ours_s, 3)}
            rows.append(row | {"plain_s": round(plain_s, 3), "plain_over_mim3d": round(plain_s / ours_s, 2)})
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    arguments = options(__doc__).parse_args()
    device = torch.device(arguments.device)
    prepare(device)
    rows = measure(device, 32 if arguments.quick else 96)
    if not arguments.quick:
        write_results(f"feature_maps_{device.type}", describe(device), rows)
