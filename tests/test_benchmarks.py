"""The benchmarks' arithmetic by hand, their workers' protocol, and each command at tiny sizes."""

import argparse
import importlib.util
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sys.path.append(str(BENCHMARKS / "workers"))  # whose cohere.py is not ours

import decode  # noqa: E402
import harness  # noqa: E402
import ours  # noqa: E402
import peers  # noqa: E402
import scaling  # noqa: E402
import sides  # noqa: E402
import what_fits  # noqa: E402

from palm_rlhf_pytorch import PaLM  # noqa: E402
from palm_rlhf_pytorch.native import library  # noqa: E402
from palm_rlhf_pytorch.native_step import NativeStep  # noqa: E402

TINY = "--threads 1 --repeats 2 --dim 16 --depth 1 --heads 2 --dim-head 8 --vocab 32".split()
COMMANDS = {
    "decode": "--batches 1 2 --length 12 --prompt 4 --positions 34 40 --copy-mib 8",
    "train": "--batch 2 --length 16 --copy-mib 8",
    "memory": "--train-vocab 64 --train-dim 16 --train-length 16 --batches 2 --length 12 --minibatches "
    "--rollouts 4 --fixed-rollout 4 --fixed-minibatch 2 --ppo-prompt 4 --ppo-length 8 --peers none",
    "scaling": "--vary parameters --work step --dims 16 32 --batch 1 --length 16",
}


def runs(*seconds: float, first: float = 6.0) -> harness.Runs:
    return harness.Runs({"seconds": first}, [{"seconds": s} for s in seconds])


# numbers


def test_median_and_quartiles():
    run = runs(10, 1, 2, 4, 3)
    assert run.median() == 3
    assert run.quartiles() == (2, 4)  # of 1 2 3 4 10: places 1 and 3 of 0 to 4
    assert run.first_over_median() == 2
    assert runs(7.0).quartiles() == (7, 7)


def test_timing_columns():
    columns = sides.timing(runs(0.010, 0.001, 0.002, 0.004, 0.003, first=0.006))
    assert columns == {"runs": "5", "ms": "3", "quartiles": "2 to 4", "first / median": "2.00"}


def test_in_turn_goes_back_and_forth_and_lets_sides_sit_out():
    asked = []

    def worker(name):
        return lambda do: asked.append(name) or {"seconds": float(len(asked))}

    workers = {name: worker(name) for name in "abc"}
    requests = dict.fromkeys("abc", {"do": "x"})
    out = harness.in_turn(workers, requests, {"a": 2, "b": 2, "c": 1})
    assert "".join(asked) == "abc" + "abc" + "ba"
    assert out["a"].first == {"seconds": 1.0} and out["a"].values() == [4.0, 8.0] and out["c"].values() == [6.0]


def test_limits_take_turns_and_are_medians(monkeypatch):
    speeds = iter([9.0, 1.0, 5.0, 3.0, 4.0, 2.0, 7.0, 6.0])  # the first two are the warm-up's
    names = {"matmul": "operations_per_second", "copy": "bytes_per_second"}

    asked = []

    def machine(do, **_):
        asked.append(do)
        return {names[do]: next(speeds)}

    monkeypatch.setattr(harness, "Worker", lambda *_, **__: nullcontext(machine))
    sides = {"ours": lambda do: asked.append(do) or {"seconds": 1.0}}
    runs, limit = harness.in_turn_with_limits(sides, {"ours": {"do": "x"}}, 3, "cpu", "float32", 1)
    assert list(runs) == ["ours"] and runs["ours"].values() == [1.0] * 3
    assert limit == harness.Limits(matmul=5.0, copy=4.0)  # of 5, 2, 7 (there, back, there) and 3, 4, 6
    assert str(limit).startswith("Limits in this run: matmul 0 GFLOP/s")
    assert asked[:3] == ["matmul", "copy", "x"]  # the process of the limits has started before a side's first run


def test_table_is_markdown_and_aligned():
    shown = harness.table([{"side": "ours", "ms": 1}, {"side": "other", "ms": "12.5"}])
    assert shown.split("\n") == ["| side  | ms   |", "| ----- | ---- |", "| ours  | 1    |", "| other | 12.5 |"]


@pytest.mark.parametrize("value, text", [(0.012345, "0.0123"), (1.0, "1"), (99.96, "100"), (1234.6, "1,235")])
def test_three_digits(value, text):
    assert harness.three(value) == text


def test_roofline_is_the_larger_of_reading_and_computing():
    options = argparse.Namespace(depth=2, dim_head=4, prompt=8, length=12)
    built = {"parameters": 100, "weight_bytes": 400}
    # cache: 2 (k and v) x 2 layers x 4 features x 3 rows x 4 bytes x 10 positions = 1,920 bytes
    assert decode.roofline(options, built, harness.Limits(matmul=1e9, copy=10.0), 3) == pytest.approx(232.0)
    # 2 operations x 100 parameters x 3 rows
    assert decode.roofline(options, built, harness.Limits(matmul=2.0, copy=1e9), 3) == pytest.approx(300.0)


def test_positions_are_compared_in_time_and_in_bytes():
    options = argparse.Namespace(depth=2, dim_head=4, positions=[10, 20], position_batch=3, repeats=2)
    built = {"ours": {"parameters": 100, "weight_bytes": 400}}
    sides = {"ours": lambda do, batch, position: {"seconds": position / batch, "known_bytes": 128}}
    (row,) = decode.position_rows(options, sides, built)
    assert row["ratio"] == "2.00"
    # 272 of weights, and 1,920 of cache as above or twice that: 4,112 / 2,192
    assert row["of bytes, at least"] == "1.88"


def test_our_steps_read_all_but_what_is_known_of_the_first_layer():
    side = ours.Ours()
    side.device, side.model = "cpu", PaLM(num_tokens=8, dim=32, depth=2, heads=2, dim_head=16)
    # 32 inputs into 64 of queries, keys and values, 128 values and 128 gates; and 128 inputs into 32
    known = 4 * (32 * (64 + 2 * 128) + 128 * 32) if NativeStep.fits(side.model) else 0
    assert side.known_bytes(batch=1, steps=2) == known  # 24 rows' time for 8 tokens, 16 of which are worth it
    assert side.known_bytes(batch=1, steps=1) == 0


def test_slope_is_the_exponent():
    assert scaling.slope([1, 2, 5], [3, 12, 75]) == pytest.approx(2.0)


# RESULTS.md


def test_record_replaces_its_section_and_keeps_the_others(tmp_path):
    path = tmp_path / "RESULTS.md"
    harness.record("decode", "| old |", "notes of old", path)
    harness.record("train", "| kept |", path=path)
    kept = path.read_text().split("<!-- begin train -->")[1]
    harness.record("decode", "| new |", path=path)
    text = path.read_text()
    assert "| new |" in text and "old" not in text
    assert text.split("<!-- begin train -->")[1] == kept
    assert text.index("## decode") < text.index("## train") and text.count("<!-- end decode -->") == 1
    assert "torch" in text and "cores" in text
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / "RESULTS.md"
    harness.record("decode", "| old |", path=path)
    before = path.read_text()
    monkeypatch.setattr(harness, "machine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        harness.record("decode", "| new |", path=path)
    assert path.read_text() == before


# workers

WORKER = f"""
import os, sys
sys.path.insert(0, {str(BENCHMARKS / "workers")!r})
import torch
from serving import serve

def echo(text):
    print("not JSON")
    return {{"text": text, "threads": torch.get_num_threads()}}

def fail():
    raise ValueError("no such luck")

def take(mib):
    torch.ones(mib * 2**18)

def die():
    sys.stderr.write("some line\\nthe last line\\n")
    os._exit(3)

serve({{f.__name__: f for f in (echo, fail, take, die)}})
"""


def test_worker_replies_measures_and_names_its_errors(tmp_path):
    (tmp_path / "toy.py").write_text(WORKER)
    with harness.Worker("toy", threads=1, folder=tmp_path) as worker:
        reply = worker("echo", text="a\nb")
        assert reply["text"] == "a\nb" and reply["threads"] == 1 and 0 < reply["seconds"] < 5
        with pytest.raises(harness.WorkerError, match="toy: 'fail' failed: ValueError: no such luck"):
            worker("fail")
        big, small = worker("take", mib=64), worker("take", mib=1)  # it lives on
        assert 64 <= big["peak_mib"] - big["base_mib"] < 96
        if sys.platform == "linux":
            assert small["peak_mib"] - small["base_mib"] < 32  # the peak of a call, not of the process
        with pytest.raises(harness.WorkerError, match="toy: ended during 'die': exit status 3; the last line"):
            worker("die")


# sides and peers


def test_labels():
    assert sides.labels_for(["none"]) == sides.labels_for([]) == ["ours"]
    assert sides.labels_for(["transformers"]) == ["ours", "transformers"]
    assert sides.labels_for(["reference"]) == ["ours", "ours, xpos", "reference, plain", "reference, flash"]


def test_a_preset_gives_defaults_that_options_change():
    parser = sides.parser_of("Doc.")
    options = sides.parse(parser, {"1b": {"repeats": 3}}, ["--preset", "1b", "--dim", "64"])
    assert (options.dim, options.depth, options.vocab, options.repeats) == (64, 16, 50304, 3)


def test_an_environment_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(sides, "ready", lambda name: False)
    with pytest.raises(SystemExit, match="benchmarks/peers.py --only transformers"):
        sides.interpreter("transformers")
    assert sides.interpreter(None) == Path(sys.executable)
    assert sides.interpreter("transformers", instead="/usr/bin/python3") == Path("/usr/bin/python3")


def test_an_environment_counts_as_there_only_when_made_from_todays_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "VENVS", tmp_path)
    peers.python_of("reference").parent.mkdir(parents=True)
    peers.python_of("reference").touch()
    assert not peers.ready("reference")  # as after a build that was interrupted
    (tmp_path / "reference" / "recipe.txt").write_text(peers.recipe("reference"))
    assert peers.ready("reference")
    (tmp_path / "reference" / "recipe.txt").write_text("torch==1.0\n")
    assert not peers.ready("reference")


def test_a_failing_command_is_one_sentence():
    with pytest.raises(SystemExit, match="^pip failed: ValueError: why$"):
        peers.call([sys.executable, "-c", "raise ValueError('why')"], "pip failed")


@pytest.mark.parametrize("logits", [1e-3, float("nan")])
def test_a_side_with_other_logits_is_refused(monkeypatch, logits):
    class Stranger(harness.Worker):
        def __init__(self, *_):
            pass

        def __call__(self, do, **_):
            return {"difference": logits}

        def close(self):
            pass

    monkeypatch.setattr(sides, "Worker", Stranger)
    options = argparse.Namespace(threads=1, device="cpu")
    with pytest.raises(SystemExit, match="logits of ours differ"):
        with sides.opened("ours", options, lambda config: "path", {"num_tokens": 8}):
            pass


# the commands


@pytest.fixture(scope="module")
def finished() -> dict[str, subprocess.CompletedProcess]:
    """All commands, run side by side; transformers' Cohere from this Python, where it is."""
    there = importlib.util.find_spec("transformers") is not None
    other = ["--peers", "transformers", "--peer-python", sys.executable] if there else ["--peers", "none"]
    extra = {"decode": ["--peers", "none"], "train": other}
    started = {
        name: subprocess.Popen(
            [sys.executable, str(BENCHMARKS / f"{name}.py"), *TINY, *line.split(), *extra.get(name, [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, line in COMMANDS.items()
    }
    done = {}
    for name, process in started.items():
        stdout, stderr = process.communicate()
        done[name] = subprocess.CompletedProcess(name, process.returncode, stdout, stderr)
    return done


@pytest.mark.parametrize("name", COMMANDS)
def test_command(finished, name):
    done = finished[name]
    assert done.returncode == 0, done.stderr
    wanted = {
        "decode": ("share of limit", "| 2     | ours |", "ms a token at 40", "Limits in this run"),
        "train": ("share of matmul peak", "| ours", "Limits in this run"),
        "memory": ("training step, vocabulary 64", "batch 2", "rollout 4"),
        "scaling": ("time ^", "memory ^", "parameters"),
    }
    for text in wanted[name]:
        assert text in done.stdout
    if importlib.util.find_spec("transformers") is not None:
        assert name != "train" or "| transformers" in done.stdout


# what fits


def test_parts_are_what_the_model_really_takes():
    sizes = dict(num_tokens=32, dim=16, depth=3, heads=4, kv_heads=2, dim_head=8, ff_inner_dim=24, use_xpos=False)
    plan = what_fits.Plan(rank=2, at_once=3, rollout=6, length=9, micro_batch=2)
    trainer = what_fits.random_trainer(sizes, plan, "cpu", torch.bfloat16)
    of = what_fits.parts(sizes, plan)
    palm = trainer.palm
    assert of["weights, once"] == sum(t.numel() * t.element_size() for t in (*palm.palm_parameters(), *palm.buffers()))
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert of["adapters and heads, float32, with gradients and Adam"] == 16 * sum(p.numel() for p in trained)
    assert of["rollout: key/value cache"] == 2 * 3 * 3 * 9 * 2 * 2 * 8  # bytes, layers, rows, tokens, k and v, heads, d
    qkv, out = (4 + 2 + 2) * 8 * 16, 4 * 8 * 16
    assert of["rollout: weights that merged adapters replace"] == 2 * 3 * (qkv + out)
    trainer.train(1, plan.rollout, plan.rollout, plan.at_once, plan.length)
    assert len(trainer.history) == 1


def test_the_longest_sequence_that_fits():
    sizes = dict(num_tokens=32, dim=16, depth=3, heads=4, dim_head=8)
    plan = what_fits.Plan(length=100)
    most = what_fits.peak(what_fits.parts(sizes, plan))
    assert what_fits.longest(sizes, plan, most) == 100
    assert what_fits.longest(sizes, plan, most - 1) == 99


def against_torch(name: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(library("draw") is None, reason="there is no C++ compiler to be found")
def test_ours_against_torchs_operations():
    done = against_torch("drawing", "--repeats", "2")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert (
        len(rows) == 2 + 5 * 4 and "times as fast" in rows[0] and "1 threads; medians and quartiles of 2" in done.stdout
    )


@pytest.mark.parametrize("name", ["attention", "drawing", "products"])
def test_one_run_has_no_quartiles(name):
    done = against_torch(name, "--repeats", "1")
    assert done.returncode == 2 and "quartiles need 2 repeats or more" in done.stderr
