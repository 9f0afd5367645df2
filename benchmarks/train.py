"""Time of an optimiser's step: ours, Hugging Face's Cohere with our weights, both paths of the reference.

python benchmarks/train.py                                # 4 x 512 tokens, on the CPU
python benchmarks/train.py --vocab 256000 --dim 256 --depth 2 --batch 1 --length 1024
python benchmarks/train.py --device cuda --preset 1b      # a billion parameters, autocast to bfloat16
"""

import argparse
from collections.abc import Mapping

from harness import Limits, Runs, in_turn_with_limits, record, table, three
from sides import add_peers, all_opened, labels_for, parse, parser_of, peak_mib, percent, timing

BIG = dict(batch=8, length=2048, bf16=True, peers=["transformers"])


def options_of() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_peers(parser, "transformers", "reference")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile of every side's model")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in ours and in transformers")
    return parse(parser, {"1b": BIG})


def rows_of(
    options: argparse.Namespace, runs: Mapping[str, Runs], built: Mapping[str, Mapping], limit: Limits
) -> list[dict[str, str]]:
    """One row a side. Operations are 6 for each parameter and token; the attention's own are left out."""
    rows = []
    for label, run in runs.items():
        ours = runs["ours, xpos" if label.startswith("reference") else "ours"]
        operations = 6 * built[label]["parameters"] * options.batch * options.length
        rows.append(
            {
                "side": label,
                **timing(run),
                "time over ours": f"{run.median() / ours.median():.2f}",
                "share of matmul peak": percent(operations / run.median() / limit.matmul),
                "peak MiB": three(peak_mib(run)),
            }
        )
    return rows


def main() -> None:
    options = options_of()
    switches = {"autocast": options.bf16, "compile": options.compile}
    switches["gradient_checkpointing"] = options.gradient_checkpointing
    with all_opened(labels_for(options.peers), options, **switches) as (workers, built):
        request = dict(do="step", batch=options.batch, length=options.length)
        machine = options.device, "bfloat16" if options.bf16 else "float32", options.threads, options.copy_mib
        runs, limit = in_turn_with_limits(workers, dict.fromkeys(workers, request), options.repeats, *machine)
    losses = [run.first["loss"] for run in runs.values()]
    if max(losses) - min(losses) > (0.05 if options.bf16 else 1e-3):
        raise SystemExit(f"the sides' first losses differ, so they do not train the same model: {losses}")
    shown = table(rows_of(options, runs, built, limit))
    print(shown, end="\n\n")
    on = [name for name in ("bf16", "compile", "gradient_checkpointing") if getattr(options, name)]
    notes = (
        f"A PaLM of {built['ours']['parameters'] / 1e6:,.1f} M parameters, vocabulary {options.vocab:,}, steps of "
        f"{options.batch} x {options.length:,} tokens: forward, backward, fused AdamW. {', '.join(on) or 'float32'}, "
        f"on {options.device}, threads a side: {options.threads}. {limit} Peak: above what the imports take. "
        f"First losses from {min(losses):.4f} to {max(losses):.4f}."
    )
    print(notes)
    if options.record:
        record(f"train, {options.preset}, {options.device}, vocabulary {options.vocab:,}", shown, notes)


if __name__ == "__main__":
    main()
