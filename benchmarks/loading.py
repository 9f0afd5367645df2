"""Peak memory and time of loading a checkpoint, over the size of its weights.

python benchmarks/loading.py                    # 500 million parameters; each line is a fresh process
python benchmarks/loading.py --device cuda
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness import Worker, record, table, three

# 500 million parameters, half of them the embedding
SIZES = dict(num_tokens=256000, dim=1024, depth=21, heads=8, kv_heads=2, dim_head=128, ff_mult=3)
TINY = dict(num_tokens=8, dim=8, depth=1, heads=1, dim_head=8)
# what is on disk, in which dtype and shards, and which dtype it is loaded as
LINES = (
    ("Cohere, one file", "huggingface", "float32", "100GB", None),
    ("Cohere, shards", "huggingface", "float32", "500MB", None),
    ("Cohere, one file", "huggingface", "bfloat16", "100GB", None),
    ("Cohere, shards", "huggingface", "bfloat16", "500MB", None),
    ("Cohere, one file", "huggingface", "float32", "100GB", "bfloat16"),
    ("Cohere, one file", "huggingface", "bfloat16", "100GB", "float32"),
    ("ours", "palm", "float32", "100GB", None),
    ("a state dict (.pt)", "reference", "float32", "100GB", None),
)


def options_of() -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"{name} of the PaLM")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the weights go")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU")
    parser.add_argument("--repeats", type=int, default=1, help="loads of each checkpoint, of which the quickest counts")
    parser.add_argument("--record", action="store_true", help="also write the result into benchmarks/RESULTS.md")
    return parser.parse_args()


def measured(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    sizes = {name: getattr(options, name) for name in SIZES}
    for what, format, stored, shard, dtype in LINES:
        with tempfile.TemporaryDirectory() as folder:
            path, tiny = Path(folder) / "model", Path(folder) / "tiny"
            how = dict(dtype=stored, format=format, max_shard_size=shard)
            with Worker("loading", threads=options.threads) as maker:
                maker("make", directory=str(path), **how, **sizes)
                maker("make", directory=str(tiny), **how, **TINY)
            suffix = ".pt" if format == "reference" else ""
            with Worker("loading", threads=options.threads) as worker:
                worker("load", path=f"{tiny}{suffix}", dtype=dtype, device=options.device)  # all that is imported late
                runs = [
                    worker("load", path=f"{path}{suffix}", dtype=dtype, device=options.device)
                    for _ in range(options.repeats)
                ]
            first = runs[0]
            print(f"{what}: {first}", file=sys.stderr, flush=True)
            yield {
                "on disk": f"{what}, {stored}",
                "loaded as": dtype or stored,
                "weights MiB": three(first["mib"]),
                "imports MiB": three(first["imports_mib"]),
                "before MiB": three(first["base_mib"]),
                "peak MiB": three(first["peak_mib"]),
                "(peak - before) / weights": f"{(first['peak_mib'] - first['base_mib']) / first['mib']:.3f}",
                "(peak - imports) / weights": f"{(first['peak_mib'] - first['imports_mib']) / first['mib']:.3f}",
                "s": three(min(run["seconds"] for run in runs)),
            }


def main() -> None:
    options = options_of()
    shown = table(list(measured(options)))
    print(shown, end="\n\n")
    where = (
        "what torch allocated on the GPU" if options.device == "cuda" else "resident memory (VmHWM, file maps included)"
    )
    notes = (
        f"Each line is a fresh process: {where}, after the imports, before loading (a tiny model of the same kind was "
        f"loaded first), and at its peak. Random weights, vocabulary {options.num_tokens:,}, dim {options.dim}, depth "
        f"{options.depth}."
    )
    print(notes)
    if options.record:
        record(f"loading, {options.device}", shown, notes)


if __name__ == "__main__":
    main()
