"""An iteration of PPO or GRPO: answers to a batch of prompts, their scores, all optimiser steps on them.

    python benchmarks/peers.py                                  # once: the peers' environments
    python benchmarks/rl_iteration.py                           # all on the CPU; the long prompt takes minutes
    python benchmarks/rl_iteration.py --work trl-ppo trl-grpo
    python benchmarks/rl_iteration.py --device cuda             # a billion parameters with LoRA, bfloat16

Models are untrained and nothing ends an answer early, so all sides draw the same number of tokens. That is checked, as
are the numbers of parameters and of optimiser steps.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

from harness import Limits, Runs, Worker, in_turn_with_limits, record, table, three
from peers import python_of, ready


@dataclass(frozen=True)
class Work:
    """One iteration, as a worker is told it. kind: 'ppo', 'grpo', or 'defaults' (the reference's README)."""

    kind: str
    vocab: int
    dim: int
    depth: int
    heads: int
    prompt: int  # tokens
    response: int  # tokens
    batch: int  # sequences
    dim_head: int = 64
    minibatch: int = 16
    epochs: int = 1
    kl: float = 0.05
    samples: int = 1  # of one prompt
    lora: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def minibatches(self) -> int:
        return self.epochs * math.ceil(self.batch / self.minibatch)

    def operations(self, parameters: int) -> float:
        """What the algorithm needs: 2 N a token read; 6 N a token trained on, 4 N where the weights are frozen.

        PPO reads to sample, for the reference, the values and the reward, and trains two models. GRPO reads to sample
        and for the old log-probs, and trains one. Samples of one prompt need it read once.
        """
        reads, models = (2, 1) if self.kind == "grpo" else (4, 2)
        per_token = 2 * reads + (4 if self.lora else 6) * models * self.epochs
        return per_token * parameters * self.batch * (self.prompt / self.samples + self.response)


@dataclass(frozen=True)
class Side:
    """Who does the work: a worker file, and the environment it runs in (None: the driver's)."""

    worker: str
    environment: str | None
    work: Work
    steps: int = 1  # of the optimiser in a minibatch: the reference and ours step actor and critic apart
    once: bool = False  # timed once, after a warm-up with 8 tokens, before the others take turns


@dataclass(frozen=True)
class Comparison:
    """A table; the first side is what the others are measured by. per_prompt: seconds are divided by the batch."""

    title: str
    sides: dict[str, Side]
    notes: str
    per_prompt: bool = False


SMALL = Work("ppo", vocab=512, dim=256, depth=4, heads=4, prompt=16, response=64, batch=64)
BILLION = dict(vocab=50304, dim=2048, depth=16, heads=8, dim_head=128)
LARGE = replace(SMALL, **BILLION, prompt=128, response=256, lora=True, dtype="bfloat16")
README = replace(SMALL, kind="defaults", vocab=20000, heads=8, prompt=128, response=128, batch=1, lora=True)

ABOUT_PPO = (
    "TRL 1.12, the last release with PPO, on transformers' Cohere, which is PaLM without xpos; so ours is without it "
    "here. Policy, frozen copy, values and reward are models of one size. TRL's gradient checkpointing and its printed "
    "samples are off."
)
ABOUT_GRPO = (
    "TRL's GRPO with its defaults (no KL term) but for gradient checkpointing and bf16, 8 answers to a prompt, and a "
    "reward that costs nothing; ours likewise. All answers have one length, the best case for "
    "sharing prompts."
)
ABOUT_README = (
    "The reference, PaLM-rlhf-pytorch 0.8.0, with its defaults but for flash_attn=True, which is faster: LoRA, six "
    "value bins, a reward model on the same PaLM. It answers one prompt at a time."
)


def ppo(work: Work) -> Comparison:
    """TRL's PPO and ours, in full and with LoRA; with LoRA alone where the work asks for it."""
    lora = replace(work, lora=True)
    sides = {
        "TRL": Side("trl_ppo", "trl_ppo", work),
        "TRL, LoRA": Side("trl_ppo", "trl_ppo", lora),
        "ours": Side("ours_rl", None, work, steps=2),
        "ours, LoRA, one trunk": Side("ours_rl", None, lora, steps=2),
    }
    kept = {label: side for label, side in sides.items() if "LoRA" in label or not work.lora}
    return Comparison(f"PPO iteration on TRL's work, dim {work.dim}", kept, ABOUT_PPO)


def grpo(work: Work) -> Comparison:
    sides = {"TRL": Side("trl_grpo", "trl_grpo", work), "ours": Side("ours_rl", None, work)}
    title = f"GRPO iteration on TRL's work, dim {work.dim}, {work.prompt} + {work.response} tokens"
    return Comparison(title, sides, ABOUT_GRPO)


def readme(work: Work, once: bool) -> Comparison:
    sides = {
        "reference": Side("reference_ppo", "reference", work, steps=2, once=once),
        "ours, 16 prompts": Side("ours_rl", None, replace(work, batch=16), steps=2),
        "ours, 1 prompt": Side("ours_rl", None, work, steps=2),
    }
    notes = ABOUT_README + (" It was timed once." if once else "")
    return Comparison(f"PPO iteration of the reference, {work.prompt} + {work.response} tokens", sides, notes, True)


COMPARISONS = {
    "trl-ppo": ppo(SMALL),
    "trl-grpo": grpo(replace(SMALL, kind="grpo", samples=8)),
    "trl-grpo-long": grpo(replace(SMALL, kind="grpo", samples=8, prompt=256)),
    "reference": readme(README, once=False),
    "reference-long": readme(replace(README, prompt=512, response=1536), once=True),
    "trl-ppo-1b": ppo(LARGE),
}
BY_DEFAULT = {"cpu": ["trl-ppo", "trl-grpo", "trl-grpo-long", "reference", "reference-long"], "cuda": ["trl-ppo-1b"]}


def check(sides: Mapping[str, Side], sizes: Mapping[str, Mapping[str, int]], runs: Mapping[str, Runs]) -> None:
    """Refuse unequal work: parameters (heads may differ, by 0.1 %), tokens drawn, optimiser steps."""
    first = next(iter(sizes.values()))
    for label, side in sides.items():
        for role, size in sizes[label].items():
            if abs(size - first[role]) > (0 if role == "policy" else first[role] / 1000):
                raise SystemExit(f"{label}: its {role} has {size:,} parameters, the first side's {first[role]:,}")
        wanted = (side.work.batch * side.work.response, side.work.minibatches * side.steps)
        for reply in runs[label].replies:
            done = (reply["tokens"], reply["optimizer_steps"])
            if done != wanted:
                raise SystemExit(f"{label}: (tokens, optimiser steps) were {done} instead of {wanted}")


def measure(sides: Mapping[str, Side], repeats: int, threads: int) -> tuple[dict[str, Runs], int, Limits]:
    """Build each side in a process of its own and let them take turns. Runs by label, the policy's parameters, and what
    the machine could do.
    """
    work = next(iter(sides.values())).work
    with ExitStack() as stack:
        workers, sizes, runs = {}, {}, {}
        for label, side in sides.items():
            python = python_of(side.environment) if side.environment else sys.executable
            workers[label] = stack.enter_context(Worker(side.worker, python, threads))
            sizes[label] = workers[label]("build", **asdict(side.work))["parameters"]
            if side.once:
                runs[label] = Runs(workers[label]("iterate", response=8), [workers[label]("iterate")])
        requests = {label: {"do": "iterate"} for label in sides if label not in runs}
        timed, limit = in_turn_with_limits(workers, requests, repeats, work.device, work.dtype, threads)
    runs |= timed
    check(sides, sizes, runs)
    return {label: runs[label] for label in sides}, next(iter(sizes.values()))["policy"], limit


def rows_of(comparison: Comparison, runs: Mapping[str, Runs], parameters: int, limit: Limits) -> list[dict[str, str]]:
    """One row a side; 'models built' is the memory before the first iteration."""

    def seconds(label: str, value: float) -> float:
        return value / (comparison.sides[label].work.batch if comparison.per_prompt else 1)

    first = next(iter(runs))
    slowest, largest = seconds(first, runs[first].median()), max(runs[first].values("peak_mib"))
    rows = []
    for label, run in runs.items():
        median, peak = seconds(label, run.median()), max(run.values("peak_mib"))
        low, high = (three(seconds(label, value)) for value in run.quartiles())
        split = [three(seconds(label, run.median(part))) for part in ("generation", "scoring", "learning")]
        operations = comparison.sides[label].work.operations(parameters)
        rows.append(
            {
                "side": label,
                "s a prompt" if comparison.per_prompt else "s an iteration": three(median),
                "quartiles": f"{low} to {high}",
                "times as fast": three(slowest / median),
                "generation + scoring + learning": " + ".join(split),
                "share of matmul peak": f"{operations / run.median() / limit.matmul:.0%}",
                "peak MiB": f"{peak:,.0f} ({peak / largest:.0%})",
                "models built": f"{run.first['base_mib']:,.0f}",
            }
        )
    return rows


def compare(comparison: Comparison, repeats: int, threads: int, recorded: bool) -> None:
    """Measure one comparison, print its table, and record it if asked to."""
    for environment in {side.environment for side in comparison.sides.values()} - {None}:
        if not ready(environment):
            raise SystemExit(f"{environment} is not there: run python benchmarks/peers.py --only {environment}")
    work = next(iter(comparison.sides.values())).work
    runs, parameters, limit = measure(comparison.sides, repeats, threads)
    shown = table(rows_of(comparison, runs, parameters, limit))
    full, lora = (replace(work, lora=lora).operations(parameters) / 1e9 for lora in (False, True))
    notes = (
        f"{parameters / 1e6:,.2f} M parameters, {work.dtype}, on {work.device} with {threads} threads; {work.batch} x "
        f"({work.prompt} + {work.response}) tokens, minibatches of {work.minibatch} at most. Medians of {repeats} "
        f"after a warm-up, in turn. Counted: {full:,.0f} GFLOP, 2 N a token read and 6 N a token trained on, or with "
        f"LoRA 4 N: {lora:,.0f} GFLOP. {limit} Peak: all of the process's resident memory, on a GPU its tensors. "
        + comparison.notes
    )
    print(f"\n{comparison.title}\n\n{shown}\n\n{notes}", flush=True)
    if recorded:
        record(comparison.title, shown, notes)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--work", nargs="+", choices=COMPARISONS, help="what to compare (default: all of the device)")
    parser.add_argument("--device", choices=BY_DEFAULT, default="cpu", help="(default: cpu)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side on the CPU (default: cores)")
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations after a warm-up (default: 5)")
    parser.add_argument("--skip-long", action="store_true", help="leave out reference-long")
    parser.add_argument("--record", action="store_true", help="also write the results into benchmarks/RESULTS.md")
    options = parser.parse_args()
    for name in options.work or BY_DEFAULT[options.device]:
        if name == "reference-long" and options.skip_long:
            continue
        chosen = COMPARISONS[name]
        sides = {n: replace(s, work=replace(s.work, device=options.device)) for n, s in chosen.sides.items()}
        compare(replace(chosen, sides=sides), options.repeats, options.threads, options.record)


if __name__ == "__main__":
    main()
