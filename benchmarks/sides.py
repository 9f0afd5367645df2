"""The sides of a comparison: which worker in which Python, built from one set of weights, outputs seen to agree."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import Runs, Worker, in_turn, three
from peers import python_of, ready

SMALL = dict(dim=512, depth=6, heads=8, dim_head=64, vocab=256)
PRESETS = {"small": SMALL, "1b": dict(dim=2048, depth=16, heads=8, dim_head=128, vocab=50304)}
AGREEMENT = 1e-4  # of logits, in float32


@dataclass(frozen=True)
class Side:
    """A worker file, the environment it runs in (None: the driver's), and how its model is built."""

    worker: str
    environment: str | None = None
    xpos: bool = False
    switches: dict[str, Any] = field(default_factory=dict)


SIDES = {
    "ours": Side("ours"),
    "transformers": Side("cohere", "transformers"),
    "ours, xpos": Side("ours", xpos=True),  # the reference's positions; Cohere has plain rotary ones
    "reference, plain": Side("reference", "reference", True, {"flash_attn": False}),
    "reference, flash": Side("reference", "reference", True, {"flash_attn": True}),
}


def parser_of(doc: str, repeats: int = 7) -> argparse.ArgumentParser:
    """The options that all benchmarks of a model have."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=formatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--preset", choices=PRESETS, default="small", help="sizes that the next options change")
    for name, size in SMALL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"{name} of the PaLM")
    parser.add_argument("--ff-mult", type=int, default=4, help="width of the feedforward, in dims")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all sides compute")
    parser.add_argument("--threads", type=int, default=cores, help="threads of each side on the CPU")
    parser.add_argument("--repeats", type=int, default=repeats, help="runs of each side that count, after a warm-up")
    parser.add_argument("--copy-mib", type=int, default=1024, help="array that the copy limit is measured with")
    parser.add_argument("--record", action="store_true", help="also write the result into benchmarks/RESULTS.md")
    return parser


def add_peers(parser: argparse.ArgumentParser, *peers: str) -> None:
    """Options for what ours is compared with."""
    parser.add_argument("--peers", nargs="*", choices=[*peers, "none"], default=list(peers), help="compared with these")
    parser.add_argument("--peer-python", help="run the peers in this Python instead of their own environments")


def parse(parser: argparse.ArgumentParser, presets: dict[str, dict] | None = None, args: Sequence[str] | None = None):
    """Options, where a preset's sizes (and a benchmark's own settings for it) are defaults."""
    chosen = parser.parse_known_args(args)[0].preset
    parser.set_defaults(**PRESETS[chosen], **(presets or {}).get(chosen, {}))
    return parser.parse_args(args)


def palm_config(options: argparse.Namespace, **other: Any) -> dict[str, Any]:
    """PaLM's keywords."""
    names = ("dim", "depth", "heads", "dim_head", "ff_mult")
    return {name: getattr(options, name) for name in names} | {"num_tokens": options.vocab} | other


def labels_for(peers: Sequence[str]) -> list[str]:
    """Ours and the sides of the peers; ours once more with xpos where the reference is one."""
    chosen = [] if "none" in peers else peers
    wanted = {None, *chosen}
    labels = [label for label, side in SIDES.items() if side.environment in wanted]
    return [label for label in labels if label != "ours, xpos" or "reference" in wanted]


def interpreter(environment: str | None, instead: str | None = None) -> Path:
    """The Python of a side, or a sentence on how to get one."""
    if environment is None or instead:
        return Path(instead if environment else sys.executable)
    if not ready(environment):
        way = f"python benchmarks/peers.py --only {environment}"
        raise SystemExit(f"the environment of {environment} is not there: run {way}, or leave it out with --peers")
    return python_of(environment)


class Weights:
    """Files with the weights of new PaLMs, each made once, by a process that is none of the sides."""

    def __init__(self, threads: int):
        self.folder = tempfile.TemporaryDirectory()
        self.worker = Worker("maker", threads=threads)
        self.paths: dict[str, str] = {}

    def __call__(self, config: dict[str, Any]) -> str:
        """The file of a PaLM with these keywords."""
        key = repr(sorted(config.items()))
        if key not in self.paths:
            path = str(Path(self.folder.name) / f"{len(self.paths)}.safetensors")
            self.worker("create", path=path, config=config)
            self.paths[key] = path
        return self.paths[key]

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()
        self.folder.cleanup()


@contextmanager
def opened(
    label: str, options: argparse.Namespace, weights: Weights, config: dict[str, Any], **switches: Any
) -> Iterator[tuple[Worker, dict[str, Any]]]:
    """One side in a fresh process with its model built, and what it said of it; refused if its logits are not ours."""
    side = SIDES[label]
    python = interpreter(side.environment, getattr(options, "peer_python", None))
    if side.worker == "reference":
        switches.pop("gradient_checkpointing", None)  # it has none
    with Worker(side.worker, python, options.threads) as worker:
        path = weights({**config, "use_xpos": side.xpos})
        sizes = dict(path=path, vocabulary=config["num_tokens"], device=options.device)
        built = worker("build", **sizes, **side.switches, **switches)
        if not built["difference"] <= AGREEMENT:
            raise SystemExit(f"logits of {label} differ from ours by {built['difference']:.1e}: not the same model")
        yield worker, built


@contextmanager
def all_opened(labels: Sequence[str], options: argparse.Namespace, **switches: Any) -> Iterator[tuple[dict, dict]]:
    """Workers by label, each with the model that the options describe, and what they said of it."""
    for label in labels:  # before anything is started
        interpreter(SIDES[label].environment, options.peer_python)
    with ExitStack() as stack:
        weights = stack.enter_context(Weights(options.threads))
        each = {
            label: stack.enter_context(opened(label, options, weights, palm_config(options), **switches))
            for label in labels
        }
        yield {label: worker for label, (worker, _) in each.items()}, {label: b for label, (_, b) in each.items()}


def alone(
    options: argparse.Namespace,
    weights: Weights,
    config: dict[str, Any],
    request: dict[str, Any],
    label: str = "ours",
    repeats: int | None = None,
) -> tuple[Runs, dict[str, Any]]:
    """The runs of one request in a process that has done nothing else, and what that said of its model."""
    with opened(label, options, weights, config) as (worker, built):
        return in_turn({label: worker}, {label: request}, repeats or options.repeats)[label], built


def peak_mib(run: Runs) -> float:
    """The most memory over all runs, above what the imports take."""
    return max(run.first["peak_mib"], *run.values("peak_mib")) - run.first["imports_mib"]


def timing(runs: Runs, name: str = "ms", scale: float = 1e3) -> dict[str, str]:
    """The columns of times in every table, milliseconds unless scaled otherwise."""
    low, high = (three(scale * value) for value in runs.quartiles())
    return {
        "runs": str(len(runs.replies)),
        name: three(scale * runs.median()),
        "quartiles": f"{low} to {high}",
        "first / median": f"{runs.first_over_median():.2f}",
    }


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
