"""How time and memory of training steps and of generation grow with length, batch, vocabulary and parameters.

python benchmarks/scaling.py                              # on the CPU; each line is a fresh process
python benchmarks/scaling.py --work step --vary length --plot scaling.png
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Runs, record, table, three
from sides import Weights, alone, palm_config, parse, parser_of, peak_mib, timing

VARIED = ("length", "batch", "vocabulary", "parameters")
WORK = {"step": "training step", "sample": "generation"}


@dataclass(frozen=True)
class Point:
    """One size, and its runs."""

    work: str
    varied: str
    size: int
    runs: Runs


def options_of() -> argparse.Namespace:
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what is timed")
    parser.add_argument("--vary", nargs="+", choices=VARIED, default=list(VARIED), help="what is varied, one at a time")
    parser.add_argument("--batch", type=int, default=4, help="while others vary")
    parser.add_argument("--length", type=int, default=256, help="while others vary")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sequences")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[256, 1024, 4096, 16384, 65536], help="tokens")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 512, 1024], help="widths that vary parameters")
    parser.add_argument("--plot", type=Path, help="also draw the points, into this PNG")
    return parse(parser)


def sizes_of(options: argparse.Namespace, varied: str) -> Iterator[tuple[dict, dict]]:
    """What differs from the options in the request and in PaLM's keywords, size by size."""
    if varied == "length":
        yield from (({"length": n}, {}) for n in options.lengths)
    elif varied == "batch":
        yield from (({"batch": b}, {}) for b in options.batches)
    elif varied == "vocabulary":
        yield from (({}, {"num_tokens": v}) for v in options.vocabularies)
    else:  # the heads grow with the width, as they do in practice
        yield from (({}, {"dim": d, "heads": max(1, d // options.dim_head)}) for d in options.dims)


def measure(options: argparse.Namespace, weights: Weights, work: str, varied: str) -> Iterator[Point]:
    """One point a size."""
    for asked, keywords in sizes_of(options, varied):
        request = dict(do=work, batch=options.batch, length=options.length) | asked
        if work == "sample":
            request["prompt"] = 8
        runs, built = alone(options, weights, palm_config(options, **keywords), request)
        sizes = {**request, "vocabulary": keywords.get("num_tokens"), "parameters": built["parameters"]}
        yield Point(work, varied, sizes[varied], runs)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """p of the power law x^p that fits best, by least squares of the logarithms."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def rows_of(points: Sequence[Point]) -> list[dict[str, str]]:
    """One row a point; exponents from the point before it. `points` vary one thing."""
    rows = []
    for before, point in zip([None, *points], points, strict=False):
        xs = [p.size for p in (before, point) if p is not None]
        exponents = {"time ^": "", "memory ^": ""}
        if before is not None:
            exponents["time ^"] = f"{slope(xs, [before.runs.median(), point.runs.median()]):.2f}"
            exponents["memory ^"] = f"{slope(xs, [peak_mib(before.runs), peak_mib(point.runs)]):.2f}"
        size = {"work": WORK[point.work], "varied": point.varied, "size": f"{point.size:,}"}
        rows.append({**size, **timing(point.runs), "peak MiB": three(peak_mib(point.runs)), **exponents})
    return rows


def overall(points: Sequence[Point]) -> dict[str, str]:
    """The exponents over all sizes."""
    sizes = [point.size for point in points]
    return {
        "work": WORK[points[0].work],
        "varied": points[0].varied,
        "sizes": f"{min(sizes):,} to {max(sizes):,}",
        "time ^": f"{slope(sizes, [p.runs.median() for p in points]):.2f}",
        "memory ^": f"{slope(sizes, [peak_mib(p.runs) for p in points]):.2f}",
    }


def plot(series: Sequence[Sequence[Point]], path: Path) -> None:
    """Time above, memory below, one column a thing varied; both axes logarithmic."""
    from palm_rlhf_pytorch.extras import require
    from palm_rlhf_pytorch.files import atomic_path

    varied = list(dict.fromkeys(points[0].varied for points in series))
    ticker = require("matplotlib.ticker", "plot")
    figure = require("matplotlib.figure", "plot").Figure(figsize=(3.2 * len(varied), 5.2))
    axes = figure.subplots(2, len(varied), squeeze=False)
    for points in series:
        column, sizes = varied.index(points[0].varied), [point.size for point in points]
        heights = ([p.runs.median() for p in points], [peak_mib(p.runs) for p in points])
        for axis, height, name in zip(axes[:, column], heights, ("seconds", "peak MiB"), strict=True):
            axis.loglog(sizes, height, marker="o", label=WORK[points[0].work])
            axis.set(xlabel=points[0].varied, ylabel=name)
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,g}")
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
            axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main() -> None:
    options = options_of()
    series: list[list[Point]] = []
    with Weights(options.threads) as weights:
        for work in options.work:
            for varied in options.vary:
                series.append(list(measure(options, weights, work, varied)))
                print(table(rows_of(series[-1])), end="\n\n", flush=True)
    exponents = table([overall(points) for points in series if len(points) > 1])
    print(exponents, end="\n\n")
    notes = (
        f"Ours on {options.device}, threads: {options.threads}; float32; dim {options.dim}, depth {options.depth}, "
        f"vocabulary {options.vocab:,}, batch {options.batch}, length {options.length} where they do not vary. Each "
        "line is a fresh process; peak: above the imports, the model included. time ^, memory ^: the exponent of "
        "growth from the line before, and in the second table over all sizes (slope of the logarithms)."
    )
    print(notes)
    if options.plot:
        plot(series, options.plot)
    if options.record:
        rows = [row for points in series for row in rows_of(points)]
        record(f"scaling, {options.device}", f"{table(rows)}\n\n{exponents}", notes)


if __name__ == "__main__":
    main()
