"""Loading holds little beside the model: measured as `benchmarks/loading.py` does."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from harness import Worker  # noqa: E402
from loading import TINY  # noqa: E402

SIZES = dict(
    num_tokens=48000, dim=1024, depth=5, heads=8, kv_heads=2, dim_head=128, ff_mult=3
)  # 109 million parameters


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak of memory")
def test_peak_memory_of_loading_is_that_of_the_weights(tmp_path):
    kinds = {"float32": ("huggingface", "100GB"), "bfloat16": ("huggingface", "50MB"), "own": ("palm", "100GB")}
    with Worker("loading") as maker, Worker("loading") as worker:
        for name, (format, shard) in kinds.items():
            how = dict(dtype="bfloat16" if name == "bfloat16" else "float32", format=format, max_shard_size=shard)
            maker("make", directory=f"{tmp_path}/tiny-{name}", **how, **TINY)
            maker("make", directory=f"{tmp_path}/{name}", **how, **SIZES)
            worker("load", path=f"{tmp_path}/tiny-{name}", dtype=None, device="cpu")  # all that is imported late
            run = worker("load", path=f"{tmp_path}/{name}", dtype=None, device="cpu")
            assert run["mib"] == pytest.approx(209 if name == "bfloat16" else 418, rel=0.01)
            assert run["peak_mib"] - run["base_mib"] < 1.1 * run["mib"], name
