"""Time to generate: ours, Hugging Face's Cohere with our weights, the reference; and how near to the machine's limit.

python benchmarks/decode.py                               # batch 1, 4, 16, 64, on the CPU
python benchmarks/decode.py --device cuda --preset 1b     # a billion parameters in bfloat16, batch 1
python benchmarks/decode.py --peers none --batches 4
"""

import argparse
from collections.abc import Mapping

from harness import Limits, Runs, Worker, in_turn, in_turn_with_limits, record, table, three
from sides import add_peers, all_opened, labels_for, parse, parser_of, percent, timing

BIG = dict(batches=[1], dtype="bfloat16", peers=["transformers"])
STATIC = "transformers, static cache"


def options_of() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_peers(parser, "transformers", "reference")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="sequences generated at once")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of each prompt")
    parser.add_argument("--length", type=int, default=256, help="tokens of prompt and answer")
    parser.add_argument("--positions", type=int, nargs="*", default=[100, 2000], help="compared for time a token")
    parser.add_argument("--position-batch", type=int, default=4, help="sequences while positions are compared")
    parser.add_argument("--reference-batch", type=int, default=4, help="the one batch that the reference is timed at")
    parser.add_argument("--reference-repeats", type=int, default=5, help="runs of the reference, a minute each")
    parser.add_argument("--static-cache", action=argparse.BooleanOptionalAction, default=True, help=STATIC + " too")
    parser.add_argument("--decoder", help="of PaLM.generate, where it is not to choose: plain, packed or compiled")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    return parse(parser, {"1b": BIG})


def cache_bytes(options: argparse.Namespace, built: Mapping, batch: int, length: float) -> float:
    """Keys and values of `batch` rows of so many tokens, one head of each, in the weights' dtype."""
    width = built["weight_bytes"] / built["parameters"]
    return 2 * options.depth * options.dim_head * batch * width * length


def roofline(options: argparse.Namespace, built: Mapping, limit: Limits, batch: int) -> float:
    """The least seconds a step could take: weights and cache read once at the copy's pace, or 2 N operations a row.

    The cache is as long as in the middle of the answer.
    """
    cache = cache_bytes(options, built, batch, (options.prompt + options.length) / 2)
    return max((built["weight_bytes"] + cache) / limit.copy, 2 * built["parameters"] * batch / limit.matmul)


def run_batch(options: argparse.Namespace, workers: Mapping[str, Worker], batch: int) -> tuple[dict[str, Runs], Limits]:
    """All sides that are timed at this batch, in turn with the limits; transformers with each of its caches."""
    sides = {label: worker for label, worker in workers.items() if "reference" not in label and "xpos" not in label}
    if batch == options.reference_batch:
        sides = dict(workers)
    request = dict(do="sample", batch=batch, prompt=options.prompt, length=options.length)
    requests = dict.fromkeys(sides, request)
    if options.decoder:
        requests |= {label: {**request, "decoder": options.decoder} for label in sides if label.startswith("ours")}
    if options.static_cache and "transformers" in sides:
        requests[STATIC], sides[STATIC] = {**request, "static": True}, sides["transformers"]
    repeats = {
        label: options.reference_repeats if label.startswith("reference") else options.repeats for label in requests
    }
    machine = options.device, options.dtype, options.threads, options.copy_mib
    return in_turn_with_limits(sides, requests, repeats, *machine)


def batch_rows(options: argparse.Namespace, runs: Mapping[str, Runs], least: float, batch: int) -> list[dict[str, str]]:
    """One row a side, per new token."""
    tokens = options.length - options.prompt
    rows = []
    for label, run in runs.items():
        ours = runs["ours, xpos" if label.startswith("reference") else "ours"]
        rows.append(
            {
                "batch": str(batch),
                "side": label,
                **timing(run, "ms a token", 1e3 / tokens),
                "time over ours": f"{run.median() / ours.median():.2f}",
                "share of limit": percent(least * tokens / run.median()),
            }
        )
    return rows


def position_rows(
    options: argparse.Namespace, workers: Mapping[str, Worker], built: Mapping[str, Mapping]
) -> list[dict[str, str]]:
    """Time a token at each position, in turn, and the last position's over the first's, beside that of what is read."""
    batch, positions = options.position_batch, options.positions
    timed = [label for label in workers if label in ("ours", "transformers")]
    requests = {
        f"{label} at {position}": dict(do="at_position", batch=batch, position=position)
        for position in positions
        for label in timed
    }
    runs = in_turn({name: workers[name.split()[0]] for name in requests}, requests, options.repeats)
    rows = []
    for label in timed:
        row = {"batch": str(batch), "side": label, "runs": str(options.repeats)}
        at = [runs[f"{label} at {position}"] for position in positions]
        read = [
            built[label]["weight_bytes"]
            - run.first["known_bytes"]
            + cache_bytes(options, built[label], batch, position)
            for position, run in zip(positions, at, strict=True)
        ]
        for position, run in zip(positions, at, strict=True):
            low, high = (three(1e3 * value) for value in run.quartiles())
            row[f"ms a token at {position:,}"] = f"{three(1e3 * run.median())} ({low} to {high})"
        row["ratio"] = f"{at[-1].median() / at[0].median():.2f}"
        rows.append({**row, "of bytes, at least": f"{read[-1] / read[0]:.2f}"})
    return rows


def main() -> None:
    options = options_of()
    labels = [label for label in labels_for(options.peers) if label != "reference, plain"]  # no faster, seen here
    rows: list[dict[str, str]] = []
    limits: list[str] = []
    with all_opened(labels, options, dtype=options.dtype) as (workers, built):
        for batch in options.batches:
            runs, limit = run_batch(options, workers, batch)
            limits.append(f"batch {batch} {limit.numbers}")
            some = batch_rows(options, runs, roofline(options, built["ours"], limit, batch), batch)
            print(table(some), end="\n\n", flush=True)
            rows += some
        shown = table(rows)
        if options.positions:
            positions = table(position_rows(options, workers, built))
            print(positions, end="\n\n")
            shown += "\n\n" + positions
    model = built["ours"]
    notes = (
        f"A PaLM of {model['parameters'] / 1e6:,.1f} M parameters ({model['weight_bytes'] / 2**20:,.0f} MiB, "
        f"{options.dtype}), {options.length - options.prompt} tokens drawn after prompts of {options.prompt}, on "
        f"{options.device}, threads a side: {options.threads}. A time is of one token in every sequence, the prompt's "
        "share included; quartiles of the runs. Limits in this run, in turn with the sides: "
        f"{'; '.join(limits)}. A step's limit: the larger of weights and cache read once, at "
        "the pace at which the copy reads and writes, and 2 operations a parameter and sequence. Weights that fit into "
        "the last cache may be read faster than that. Of bytes: weights and cache at the last position over those at "
        "the first, each read once, and no weights whose products are made beforehand, our first layer's on a CPU. "
        "Logits differ from ours by at most "
        f"{max(b['difference'] for b in built.values()):.0e}."
    )
    print(notes)
    if options.record:
        record(f"decode, {options.preset}, {options.device}", shown, notes)


if __name__ == "__main__":
    main()
