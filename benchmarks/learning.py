"""Does it learn? Small tasks with a known answer, for every algorithm, over seeds, beside shuffled rewards.

    python benchmarks/learning.py forced modes --seeds 4 --plot curves.png
    python benchmarks/learning.py reversal7 --algorithms tpo ppo grpo
    python benchmarks/learning.py pairs

forced: one prompt, one rewarded next token. reversal5 to 7: tokens of two kinds are to be reversed, and only the whole
answer is rewarded (TPO, 2604.06159, section 3.6: 2 layers, width 64). modes: four answers are equally right; how many
are left at the end? pairs: a quarter of the labels is wrong (`preferences.py`). The control pays the same rewards to
other answers. Every run is a line of --out as soon as it ends; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import preferences
import torch
from learning_tasks import TASKS, for_algorithm, learn
from tqdm import tqdm

from palm_rlhf_pytorch.algorithms import ALGORITHMS

PAIRS = "pairs"
Row = dict[str, Any]


class Run(NamedTuple):
    """What one process does."""

    task: str
    algorithm: str
    seed: int
    shuffled: bool

    @classmethod
    def of(cls, row: Row) -> Run:
        return cls(*(row[name] for name in cls._fields))

    def go(self, changes: dict[str, Any]) -> Row:
        torch.set_num_threads(1)
        started = time.perf_counter()
        if self.task == PAIRS:
            accuracies, points = preferences.run(self.seed, 0.5 if self.shuffled else preferences.FLIPS)
            found = {**accuracies, "points": [asdict(point) for point in points]}
        else:
            task, changed = for_algorithm(TASKS[self.task](), self.algorithm), dict(changes)
            own = changed.pop("options", {})
            found = learn(replace(task, **changed), self.algorithm, self.seed, self.shuffled, own)
        return {**self._asdict(), "changes": changes, **found, "seconds": round(time.perf_counter() - started)}


def wanted(options: argparse.Namespace) -> list[Run]:
    controls = (False,) if options.no_control else (False, True)
    return [
        Run(task, algorithm, seed, shuffled)
        for task in options.tasks
        for algorithm in ([PAIRS] if task == PAIRS else options.algorithms)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for shuffled in controls
    ]


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run_all(runs: list[Run], changes: dict[str, Any], options: argparse.Namespace) -> None:
    """Each on one core, each a line of the file."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs) as pool, options.out.open("a") as file:
        futures = [pool.submit(run.go, changes) for run in runs]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", disable=None):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[row["task"], row["algorithm"]].append(row)
    return found


def mean_of(values: Iterable[float]) -> str:
    values = sorted(values)
    return f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})" if values else ""


def print_tasks(rows: list[Row]) -> None:
    print("| task | algorithm | right before | right after: mean (of seeds) | with shuffled rewards |")
    print("| --- | --- | --- | --- | --- |")
    for (task, algorithm), some in grouped(rows).items():
        before = statistics.mean(row["before"] for row in some)
        after, control = (mean_of(r["after"] for r in some if r["shuffled"] is shuffled) for shuffled in (False, True))
        print(f"| {task} | {algorithm} | {before:.3f} | {after} | {control} |")
    with_modes = [row for row in rows if row.get("modes", (None, None))[1] is not None]
    if with_modes:
        print("\n| task | algorithm | modes before | modes after: mean (of seeds) | with shuffled rewards |")
        print("| --- | --- | --- | --- | --- |")
    for (task, algorithm), some in grouped(with_modes).items():
        before = statistics.mean(row["modes"][0] for row in some)
        after, control = (
            mean_of(r["modes"][1] for r in some if r["shuffled"] is shuffled) for shuffled in (False, True)
        )
        print(f"| {task} | {algorithm} | {before:.2f} | {after} | {control} |")


def print_pairs(rows: list[Row]) -> None:
    for shuffled, labels in ((False, "a quarter of the labels turned"), (True, "labels by chance")):
        some = [row for row in rows if row["shuffled"] is shuffled]
        if not some:
            continue
        print(f"\nReward model on held-out pairs, {labels}: right on labels of that kind", end=" ")
        print(f"{mean_of(row['noisy'] for row in some)}, on true ones {mean_of(row['clean'] for row in some)}\n")
        print("| policy | KL to the reference | true reward: mean (of seeds) | reward by the model |")
        print("| --- | --- | --- | --- |")
        for points in zip(*(row["points"] for row in some), strict=True):
            kl, proxy = (statistics.mean(point[name] for point in points) for name in ("kl", "proxy"))
            name = f"{points[0]['method']} {points[0]['strength']}".strip()
            print(f"| {name} | {kl:.2f} | {mean_of(point['true'] for point in points)} | {proxy:.2f} |")


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each task: mean reward over seeds, the control dotted; or true reward against KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 5), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        some = [row for row in rows if row["task"] == task]
        axis.set_title(task)
        (draw_points if task == PAIRS else draw_curves)(axis, some)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def draw_curves(axis: Any, rows: list[Row]) -> None:
    for number, ((_, algorithm), some) in enumerate(grouped(rows).items()):
        for shuffled, style in ((False, "-"), (True, ":")):
            curves = [row["rewards"] for row in some if row["shuffled"] is shuffled]
            if curves:
                mean = torch.tensor([curve[: min(map(len, curves))] for curve in curves]).mean(dim=0)
                label = None if shuffled else algorithm
                colour = f"C{number % 10}" if number < 10 else ("black", "gold", "navy", "teal")[number % 4]
                axis.plot(mean, style, label=label, color=colour, linewidth=1)
    axis.set_xlabel("update")
    axis.set_ylabel("mean reward (dotted: shuffled)")


def draw_points(axis: Any, rows: list[Row]) -> None:
    for shuffled, style in ((False, "o-"), (True, "x:")):
        by_method = defaultdict(list)
        for row in rows:
            if row["shuffled"] is shuffled:
                for point in row["points"]:
                    by_method[point["method"], point["strength"]].append((point["kl"], point["true"]))
        methods = list(dict.fromkeys(method for method, _ in by_method if method != "reference"))
        for number, method in enumerate(methods):
            means = [torch.tensor(v).mean(dim=0).tolist() for (name, _), v in by_method.items() if name == method]
            kl, true = zip(*[(0.0, 0.0), *sorted(means)], strict=True)
            label = method + ", labels by chance" * shuffled
            axis.plot([max(k, 0.0) ** 0.5 for k in kl], true, style, label=label, color=f"C{number}", linewidth=1)
    axis.set_xlabel("square root of the KL to the reference")
    axis.set_ylabel("mean true reward, in the reference's standard deviations")


def name_and_value(text: str) -> tuple[str, float | str]:
    """NAME=VALUE, a number where it is one."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"an option is NAME=VALUE, got {text!r}")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=(*TASKS, PAIRS))
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=4, help="(default: 4)")
    parser.add_argument("--first-seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--updates", type=int, help="instead of each task's own number")
    parser.add_argument("--lr", type=float, help="learning rate, instead of each task's own")
    parser.add_argument("--batch", type=int, help="prompts an update, instead of each task's own number")
    parser.add_argument("--epochs", type=int, help="passes over a batch, instead of each task's own number")
    parser.add_argument(
        "--options",
        nargs="+",
        type=name_and_value,
        metavar="NAME=VALUE",
        help="the algorithm's own, instead of the task's: kl=0.2, say",
    )
    parser.add_argument("--no-control", action="store_true", help="without shuffled rewards")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one core (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/learning.jsonl"), help="(default: runs/learning.jsonl)")
    parser.add_argument("--plot", type=Path, help="where to draw the curves (.png)")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("updates", "lr", "batch", "epochs")}
    given["options"] = None if options.options is None else dict(options.options)
    changes = {name: value for name, value in given.items() if value is not None}
    asked = wanted(options)

    def done() -> dict[Run, Row]:
        return {Run.of(row): row for row in rows_of(options.out) if row["changes"] == changes}

    there = done()
    run_all([run for run in asked if run not in there], changes, options)
    there = done()
    rows = [there[run] for run in asked]
    by_task = [row for row in rows if row["task"] != PAIRS]
    if by_task:
        print_tasks(by_task)
    print_pairs([row for row in rows if row["task"] == PAIRS])
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
