"""The dense path of fine-tuning and prediction against a straightforward PyTorch version of the same encoder.

Run: ``python benchmarks/feature_maps.py`` (or ``make bench``). The base encoder on one 96^3 volume with nothing hidden,
without gradients and with them, one thread on a CPU. Writes benchmarks/results/feature_maps_*.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from yardstick.dense_mim import DenseEncoder
from yardstick.machine import hardware_name, prepare, synchronize

from mim3d.backbones import create_model

RESULTS = Path(__file__).parent / "results"
NUM_STEPS = 3


def seconds(network: nn.Module, compute: Callable[[], Tensor], dtype: torch.dtype, train: bool, device: str) -> float:
    """Best of several passes after a first."""
    times = []
    for _ in range(NUM_STEPS + 1):
        synchronize(torch.device(device))
        start_s = time.perf_counter()
        with torch.set_grad_enabled(train), torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            total = compute()
        if train:
            total.backward()
            network.zero_grad(set_to_none=True)
        synchronize(torch.device(device))
        times.append(time.perf_counter() - start_s)
    return min(times[1:])


def measure(device: str) -> list[dict[str, object]]:
    """One row per precision, with and without gradients."""
    torch.manual_seed(0)
    ours = create_model("hybrid_base").to(device)
    plain = DenseEncoder(ours.recipe).to(device)
    plain.load_state_dict(ours.state_dict())
    volume = torch.rand(1, 1, 96, 96, 96, device=device)
    hidden = torch.zeros(1, 216, dtype=torch.bool, device=device)

    def of_ours() -> Tensor:
        return ours.feature_maps(volume)[-1].float().square().sum()

    def of_plain() -> Tensor:
        return plain(volume, hidden).float().square().sum()

    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for train in (False, True):
            ours_s = seconds(ours, of_ours, dtype, train, device)
            plain_s = seconds(plain, of_plain, dtype, train, device)
            row = {"dtype": str(dtype).removeprefix("torch."), "gradients": train, "mim3d_s": round(ours_s, 3)}
            rows.append(row | {"plain_s": round(plain_s, 3), "plain_over_mim3d": round(plain_s / ours_s, 2)})
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    prepare(torch.device(device))
    rows = measure(device)
    machine = {"hardware": hardware_name(torch.device(device)), "torch": torch.__version__, "threads": 1}
    target = RESULTS / f"feature_maps_{torch.device(device).type}.json"
    target.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(f"Results: {target}")
