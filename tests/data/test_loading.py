"""Reading processes end when the program does, and outlive the signal of a scheduler for a while."""

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import os, signal, sys, time
    from mim3d.data.loading import Loader, Read, Sample
    from mim3d.data.transforms import Intensity
    from tests.scans import random_scan

    class Corner:
        def draw(self, scan, rng):
            return Sample(images={"image": (Read((0, 0, 0), (4, 4, 4), (4, 4, 4)),)})

    if __name__ == "__main__":
        loader = Loader([random_scan((8, 8, 8))], Corner(), Intensity(), batch_size=1, seed=0, num_workers=1)
        batches = loader.batches(0)
        next(batches)
        import multiprocessing
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.5)
        print(worker.is_alive(), next(batches)["image"].shape[0], flush=True)
"""


@pytest.mark.slow
def test_workers_outlive_a_schedulers_signal_and_never_keep_a_finished_program_waiting() -> None:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.stdout.strip() == "True 1", done.stderr
