"""What benchmarks of our C++ against torch's operations share: both in turn in one process, on the CPU."""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from harness import record, table, three


def options_of(doc: str) -> argparse.Namespace:
    """--threads, which torch has from here on, --repeats and --record."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=formatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both")
    parser.add_argument("--repeats", type=int, default=25, help="timed runs of each, in turn, after a warm-up")
    parser.add_argument("--record", action="store_true", help="also write the result into benchmarks/RESULTS.md")
    options = parser.parse_args()
    if options.repeats < 2 or options.threads < 1:
        given = f"--repeats {options.repeats} --threads {options.threads}"
        parser.error(f"quartiles need 2 repeats or more, and work a thread, got {given}")
    torch.set_num_threads(options.threads)
    return options


def in_turn(torchs: Callable[[], object], ours: Callable[[], object], repeats: int) -> tuple[dict[str, str], float]:
    """Cells of a table with medians and quartiles of both, after a warm-up; the median of ours in milliseconds."""
    spent = {run: [] for run in (torchs, ours)}
    for _ in range(repeats + 1):
        for run, found in spent.items():
            started = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - started))
    (torch_low, torch_ms, torch_high), (low, ms, high) = (statistics.quantiles(f[1:], n=4) for f in spent.values())
    cells = {
        "torch, ms": f"{three(torch_ms)} ({three(torch_low)} to {three(torch_high)})",
        "ours, ms": f"{three(ms)} ({three(low)} to {three(high)})",
        "times as fast": f"{torch_ms / ms:.2f}",
    }
    return cells, ms


def show(section: str, rows: Sequence[dict[str, str]], notes: str, options: argparse.Namespace) -> None:
    shown = table(rows)
    notes = f"float32, {options.threads} threads; medians and quartiles of {options.repeats}. {notes}"
    print(shown, notes, sep="\n\n")
    if options.record:
        record(section, shown, notes)
