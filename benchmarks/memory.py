"""Peak memory of a training step with a big vocabulary, of generation by batch, of a PPO iteration.

python benchmarks/memory.py                     # on the CPU; each line is a fresh process
python benchmarks/memory.py --peers none --work ppo
python benchmarks/memory.py --work fits         # PPO on an 8-billion-parameter model, computed; measured on a GPU
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict

import what_fits
from harness import Runs, record, table, three
from sides import Weights, add_peers, alone, labels_for, palm_config, parse, parser_of, peak_mib

WORK = ("train", "generate", "ppo")
FITS = "fits"
Line = tuple[str, str, Runs]  # what it is one of, which one, its runs


def options_of() -> argparse.Namespace:
    parser = parser_of(__doc__, repeats=2)
    add_peers(parser, "transformers", "reference")
    parser.add_argument("--work", nargs="+", choices=(*WORK, FITS), default=list(WORK), help="what is measured")
    for name, size in dict(vocab=256000, dim=256, depth=2, batch=1, length=1024).items():
        parser.add_argument(f"--train-{name}", type=int, default=size, help=f"{name} in the training step")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64], help="of generation")
    parser.add_argument("--length", type=int, default=256, help="tokens that generation fills")
    parser.add_argument("--minibatches", type=int, nargs="*", default=[2, 4, 8, 16], help="of PPO, at one rollout")
    parser.add_argument("--rollouts", type=int, nargs="*", default=[32, 64, 128], help="of PPO, at one minibatch")
    parser.add_argument("--fixed-rollout", type=int, default=32, help="answers while the minibatch varies")
    parser.add_argument("--fixed-minibatch", type=int, default=4, help="minibatch while the rollout varies")
    parser.add_argument("--at-once", type=int, default=16, help="PPO's answers generated together")
    parser.add_argument("--ppo-prompt", type=int, default=32, help="tokens of PPO's prompts")
    parser.add_argument("--ppo-length", type=int, default=128, help="tokens of PPO's prompts and answers")
    parser.add_argument("--room", type=float, default=80.0, help="GB that it should fit into")
    for name, size in asdict(what_fits.Plan()).items():
        flag = f"--fits-{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=size, help=f"{name.replace('_', ' ')} of PPO on the big model")
    return parse(parser)


def training(options: argparse.Namespace, weights: Weights) -> Iterator[Line]:
    """One optimiser's step; of the peers too."""
    sizes = dict(num_tokens=options.train_vocab, dim=options.train_dim, depth=options.train_depth)
    request = dict(do="step", batch=options.train_batch, length=options.train_length)
    what = f"training step, vocabulary {options.train_vocab:,}, {options.train_batch} x {options.train_length:,} tokens"
    for label in labels_for(options.peers):
        if label != "ours, xpos":
            yield what, label, alone(options, weights, palm_config(options, **sizes), request, label)[0]


def generation(options: argparse.Namespace, weights: Weights) -> Iterator[Line]:
    for batch in options.batches:
        request = dict(do="sample", batch=batch, prompt=8, length=options.length)
        what = f"generation, {options.length:,} tokens"
        yield what, f"batch {batch}", alone(options, weights, palm_config(options), request)[0]


def ppo(options: argparse.Namespace, weights: Weights) -> Iterator[Line]:
    """One iteration, warm-up included in the peak: what an iteration costs must not grow with the rollout."""
    request = dict(do="ppo", at_once=options.at_once, prompt=options.ppo_prompt, length=options.ppo_length)
    for minibatch in options.minibatches:
        sizes = dict(rollout=options.fixed_rollout, minibatch=minibatch)
        what = f"PPO iteration, rollout of {options.fixed_rollout}"
        yield what, f"minibatch {minibatch}", alone(options, weights, palm_config(options), request | sizes)[0]
    for rollout in options.rollouts:
        sizes = dict(rollout=rollout, minibatch=options.fixed_minibatch)
        what = f"PPO iteration, minibatch of {options.fixed_minibatch}"
        yield what, f"rollout {rollout}", alone(options, weights, palm_config(options), request | sizes)[0]


def rows_of(lines: list[Line]) -> list[dict[str, str]]:
    """Peaks above the imports, and above the model too; and over the first line of the same kind."""
    first: dict[str, float] = {}
    rows = []
    for what, which, run in lines:
        peak = peak_mib(run)
        model = run.first["base_mib"] - run.first["imports_mib"]
        rows.append(
            {
                "work": what,
                "of": which,
                "peak MiB": three(peak),
                "above the model": three(peak - model),
                "over the first": f"{peak / first.setdefault(what, peak):.2f}",
                "s": three(run.median()),
            }
        )
    return rows


def fits(options: argparse.Namespace) -> None:
    """The parts of PPO on AYA_8B, and on a GPU its peak."""
    plan = what_fits.Plan(**{name: getattr(options, f"fits_{name}") for name in asdict(what_fits.Plan())})
    sizes = what_fits.AYA_8B
    shown = table(what_fits.rows_of(sizes, plan))
    print(shown, end="\n\n")
    tokens = what_fits.longest(sizes, plan, options.room * what_fits.GB)
    notes = (
        f"PPO with LoRA of rank {plan.rank} on actor and critic, one trunk of 8 billion parameters in bfloat16 "
        f"(aya-expanse-8b's sizes): {plan.rollout} answers of {plan.length} tokens, {plan.at_once} sampled and "
        f"{plan.micro_batch} trained at once, gradient checkpointing. Computed from shapes. Into {options.room:.0f} GB "
        f"go sequences of up to {tokens:,} tokens."
    )
    if options.device == "cuda":
        notes += f" Measured: {what_fits.measured(sizes, plan, options.device) / what_fits.GB:.1f} GB at most."
    print(notes)
    if options.record:
        record(f"what fits, {options.device}", shown, notes)


def main() -> None:
    options = options_of()
    if FITS in options.work:
        fits(options)
        options.work.remove(FITS)
        if not options.work:
            return
    lines: list[Line] = []
    with Weights(options.threads) as weights:
        for name, measure in dict(train=training, generate=generation, ppo=ppo).items():
            if name in options.work:
                lines += measure(options, weights)
    shown = table(rows_of(lines))
    print(shown, end="\n\n")
    where = "what torch allocated on the GPU" if options.device == "cuda" else "resident memory above the imports'"
    notes = (
        f"Each line is a fresh process: {where}, at its peak over a first run and {options.repeats} more; of it above "
        f"the model, which was loaded before. Generation and PPO: dim {options.dim}, depth {options.depth}, "
        f"vocabulary {options.vocab:,}; PPO on prompts of {options.ppo_prompt} tokens, answers up to "
        f"{options.ppo_length}, {options.at_once} at once, LoRA on actor and critic, a function as reward."
    )
    print(notes)
    if options.record:
        record(f"memory, {options.device}", shown, notes)


if __name__ == "__main__":
    main()
