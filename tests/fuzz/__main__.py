"""``python -m tests.fuzz``: thousands of damaged files, and the table of what held for docs/concepts/robustness.md."""

import argparse
import collections
import shutil
import sys
import tempfile
from pathlib import Path

from tests.fuzz.one_set import try_set
from tests.fuzz.specimens import specimens
from tests.fuzz.trials import CONSTANT_BYTES, DEADLINE_S, Trial, described, run

#: The page's table lies between these.
BEGIN, END = "<!-- made by `make fuzz` -->", "<!-- end of what `make fuzz` makes -->"


def table(trials: list[Trial], seed: int) -> str:
    """Format by outcome in Markdown, and the trials at fault."""
    lines = [
        f"{len(trials)} files, seed {seed}.",
        "",
        "| format | files | read | refused, file named | at fault | longest, s | most memory, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    groups = collections.defaultdict(list)
    for trial in trials:
        groups[trial.format].append(trial)
    for name, group in [*sorted(groups.items()), ("all", trials)]:
        sound = [trial for trial in group if not trial.fault]
        num_read = sum(trial.outcome.result == "read" for trial in sound)
        lines.append(
            f"| {name} | {len(group)} | {num_read} | {len(sound) - num_read} | {len(group) - len(sound)} | "
            f"{max(trial.outcome.time_s for trial in group):.2f} | "
            f"{max(trial.outcome.memory_bytes for trial in group) / 2**20:.0f} |"
        )
    faults = collections.Counter((trial.format, trial.fault) for trial in trials if trial.fault)
    named = [f"{number} {fault} ({name})" for (name, fault), number in sorted(faults.items())]
    lines += ["", f"At fault: {'; '.join(named) or 'none'}."]
    return "\n".join(lines)


def main() -> int:
    """Run, print the faults, and write the table into the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--num_files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_scans", type=int, default=0, help="scans of one set, one in fifty bad, that is cached")
    parser.add_argument("--formats", default="", help="only formats whose name holds this")
    parser.add_argument("--only", type=int, help="one trial alone, whose files are kept and named")
    parser.add_argument("--page", type=Path, help="page whose table is replaced")
    asked = parser.parse_args()
    known = specimens()
    names = sorted({specimen.format for specimen in known})
    numbers = [n for n in range(asked.num_files) if asked.formats in names[n % len(names)]]
    if asked.only is not None:
        numbers = [asked.only]
    scratch = Path(tempfile.mkdtemp(prefix="mim3d_fuzz_"))
    keep = asked.only is not None
    trials = sorted(run(known, numbers, seed=asked.seed, scratch=scratch, keep=keep), key=lambda trial: trial.number)
    for trial in trials:
        if trial.fault or keep:
            print(described(trial))
    if keep:
        print(trials[0].outcome.text, f"\nfiles: {scratch}")
    at_fault = any(trial.fault for trial in trials)
    text = table(trials, asked.seed)
    print(text)
    if asked.num_scans:
        tried = try_set(known, asked.num_scans, asked.num_scans // 50, seed=asked.seed, scratch=scratch / "set")
        text = f"{text}\n\n{tried}"
        print(tried, *tried.faults, sep="\n")
        at_fault |= bool(tried.faults)
    if not keep:
        shutil.rmtree(scratch, ignore_errors=True)
    if asked.page is not None:
        before, _, rest = asked.page.read_text(encoding="utf-8").partition(BEGIN)
        page = f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"
        asked.page.write_text(page, encoding="utf-8")
    print(f"bounds: {DEADLINE_S:g} s; 4 times the voxels and {CONSTANT_BYTES // 2**20} MiB")
    return int(at_fault)


if __name__ == "__main__":
    sys.exit(main())
