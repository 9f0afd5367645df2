import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest
import torch

from palm_rlhf_pytorch import cli, compilation, preference, supervised
from palm_rlhf_pytorch.checkpoint import read_weights
from palm_rlhf_pytorch.cli import common, generate, main
from palm_rlhf_pytorch.cli import rejection as cli_rejection
from palm_rlhf_pytorch.cli.common import text_reward
from palm_rlhf_pytorch.metrics import read_metrics
from palm_rlhf_pytorch.rejection import read_best
from palm_rlhf_pytorch.run_directory import RunDirectory
from palm_rlhf_pytorch.state import load_state
from palm_rlhf_pytorch.tokenizer import BPETokenizer, ByteTokenizer
from palm_rlhf_pytorch.trainer import OnPolicyTrainer

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs the [hf] extra")
MODEL = "--dim 16 --depth 1 --heads 2 --dim-head 8 --ff-dropout 0.2"
PRETRAIN = f"{MODEL} --seq-len 24 --batch-size 4 --steps 6 --log-every 4 --eval-every 3 --save-every 4"
REWARD = "--steps 4 --batch-size 4 --max-len 48 --log-every 2 --save-every 2 --lora-r 2"
TUNE = "--steps 4 --batch-size 4 --max-len 48 --log-every 2 --eval-every 2 --save-every 2 --lora-r 2 --dropout 0.1"
REJECTION = "--samples 3 --rollout-batch 5 --max-seq-len 24 --held-out 0.4"
PPO = "--updates 3 --rollouts 4 --rollout-batch 4 --max-seq-len 24 --minibatch-size 2 --lora-r 2 --save-every 2"
TEXTS = [f"the {noun} was {word}." for noun in ("soup", "film", "cake") for word in ("good", "bad", "fine", "grand")]


def run(command, **paths):
    """main() on a line; {names} in it are paths, which may hold anything."""
    return main([word.format(**paths) for word in command.split()])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small data of every kind, and runs of pretrain and reward on them."""
    where = tmp_path_factory.mktemp("cli")
    (where / "text.txt").write_text("\n".join(TEXTS) + "\n")
    stars = [1 + i % 3 for i in range(len(TEXTS))]
    (where / "rated.tsv").write_text(
        "text\trating\n" + "".join(f"{t}\t{s}\n" for t, s in zip(TEXTS, stars, strict=True))
    )
    pairs = [{"prompt": t[:8], "chosen": t[8:], "rejected": " bad"} for t in TEXTS if not t.endswith(" bad.")]
    (where / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    responses = [{"prompt": t[:8], "response": t[8:], "label": "good" in t or "grand" in t} for t in TEXTS]
    (where / "responses.jsonl").write_text("".join(json.dumps(response) + "\n" for response in responses))
    (where / "prompts.txt").write_text("the soup\nthe film was\nthe\n")
    (where / "long.txt").write_text("the soup\n" + "very " * 30 + "\n")
    paths = dict(
        text=where / "text.txt", rated=where / "rated.tsv", pairs=where / "pairs.jsonl", prompts=where / "prompts.txt",
        long=where / "long.txt", responses=where / "responses.jsonl",
        model=where / "pretrain", reward=where / "reward", nowhere=where / "nowhere",
    )  # fmt: skip
    assert run("pretrain --data {text} --lines --out {model} " + PRETRAIN, **paths) == 0
    assert run("reward --data {rated} --model {model} --out {reward} --prompt-words 2 " + REWARD, **paths) == 0
    return paths


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def weights(path):
    return read_weights(path)[0]


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbers(path):
    timings = ("steps_per_second", "tokens_per_second", "rollout_seconds", "learn_seconds")
    return [{k: v for k, v in row.items() if k not in timings} for row in read_metrics(path)]


def interrupt_at(monkeypatch, step):
    """Ctrl-C while a step (counted from 1) is under way."""
    steps, learning_rate = count(1), supervised.learning_rate

    def interrupting(*arguments):
        if next(steps) == step:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(*arguments)

    monkeypatch.setattr(supervised, "learning_rate", interrupting)


# pretrain


def test_a_run_directory_holds_what_it_should(files):
    plots = ["curves.png"] if "matplotlib" in sys.modules else []
    always = ["config.json", "metrics.jsonl", "state.pt", "tokenizer_config.json", *plots]
    assert names_in(files["model"]) == sorted([*always, "model.safetensors"])
    assert names_in(files["reward"]) == sorted([*always, "reward.safetensors"])
    config = json.loads((files["model"] / "config.json").read_text())
    assert config["command"] == "pretrain" and config["model"]["dim"] == 16 and config["fit"]["steps"] == 6
    assert config["options"]["data"] == str(files["text"])
    rows = read_metrics(files["model"] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 4, 6]
    assert {"held_out_loss", "perplexity", "nats_per_character"} <= set(rows[-1])
    palm = RunDirectory(files["model"]).palm()
    assert palm.dim == 16 and palm.num_tokens == ByteTokenizer.num_tokens


def test_pretrain_learns_a_bpe(files, tmp_path):
    pytest.importorskip("tokenizers")
    assert run("pretrain --data {text} --out {out} --tokenizer bpe --vocab-size 300 --lowercase " + PRETRAIN,
               **files, out=tmp_path / "run") == 0  # fmt: skip
    source = RunDirectory(tmp_path / "run")
    tokenizer = source.tokenizer()
    assert isinstance(tokenizer, BPETokenizer) and 259 < tokenizer.num_tokens == source.palm().num_tokens
    assert tokenizer.decode(tokenizer.encode(" THE soup")) == " the soup"
    assert run("generate --model {out} --prompt the --max-new-tokens 3", out=source.path) == 0


def test_pretrain_takes_a_tokenizer_by_path(files, tmp_path):
    assert run("pretrain --data {text} --out {out} --tokenizer {model} " + PRETRAIN, **files, out=tmp_path / "a") == 0
    assert isinstance(RunDirectory(tmp_path / "a").tokenizer(), ByteTokenizer)


def test_a_resumed_pretrain_equals_an_uninterrupted_one(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        command = "pretrain --data {text} --lines --out {out} " + PRETRAIN
        assert run(command, **files, out=out) == 130
    assert re.search("stopped after step .*state.pt' holds it, --resume goes on from there\n$", capsys.readouterr().err)
    assert "model.safetensors" not in names_in(out)
    # the options are known from the first time
    assert run("pretrain --resume --out {out}", out=out) == 0
    assert " 3/6 " in capsys.readouterr().err
    assert_same_weights(out / "model.safetensors", files["model"] / "model.safetensors")
    assert numbers(out / "metrics.jsonl") == numbers(files["model"] / "metrics.jsonl")


def test_a_resumed_run_can_be_longer(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("pretrain --data {text} --out {out} " + PRETRAIN, **files, out=out) == 0
    assert run("pretrain --out {out} --resume --dim 32", out=out) == 2  # and nothing comes of it
    assert run("pretrain --out {out} --resume --steps 8", out=out) == 0
    assert "resuming with --steps 8 (was 6)" in capsys.readouterr().out
    assert read_metrics(out / "metrics.jsonl")[-1]["step"] == 8


def test_a_run_stopped_before_its_first_checkpoint_starts_again(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("pretrain --data {text} --lines --out {out} " + PRETRAIN, **files, out=out) == 0
    for name in ("state.pt", "model.safetensors"):
        (out / name).unlink()
    assert run("pretrain --out {out} --resume", out=out) == 0
    assert "holds no checkpoint yet" in capsys.readouterr().out
    assert_same_weights(out / "model.safetensors", files["model"] / "model.safetensors")


# precision and compiling


def last_loss(out):
    return next(row["loss"] for row in reversed(read_metrics(out / "metrics.jsonl")) if "loss" in row)


def test_bf16_learns_about_the_same(files, tmp_path, capsys):
    paths = {**files, "model": tmp_path / "pretrain", "reward": tmp_path / "reward", "ppo": tmp_path / "ppo"}
    assert run("pretrain --precision bf16 --data {text} --lines --out {model} " + PRETRAIN, **paths) == 0
    assert "on cpu in bf16" in capsys.readouterr().out
    command = "reward --precision bf16 --data {rated} --model {model} --out {reward} --prompt-words 2 " + REWARD
    assert run(command, **paths) == 0
    for name in ("model", "reward"):
        assert 0 < abs(last_loss(paths[name]) - last_loss(files[name])) < 0.05
        config = json.loads((paths[name] / "config.json").read_text())
        assert config["compute"] == {"precision": "bf16", "compile": None}
    command = "ppo --precision bf16 --model {model} --reward {reward} --prompts {prompts} --out {ppo} " + PPO
    assert run(command, **paths) == 0
    rows = read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    assert len(rows) == 3 and all(math.isfinite(value) for row in rows for value in row.values())
    saved = [p for name, p in weights(tmp_path / "ppo" / "model.safetensors").items() if name.endswith("weight")]
    assert all(p.dtype == torch.float32 for p in saved)


@pytest.mark.parametrize("command, out", [
    ("pretrain --compile --data {text} --lines --out {out} " + PRETRAIN, "model"),
    ("reward --compile --data {rated} --model {model} --out {out} --prompt-words 2 --dropout 0 " + REWARD, "reward"),
])  # fmt: skip
def test_compiled_learns_the_same(files, tmp_path, monkeypatch, said, command, out):
    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(common, "can_compile", lambda device: True)
    command = command.replace("--ff-dropout 0.2", "")
    assert run(command, **files, out=tmp_path / "compiled") == 0
    assert sum("compiled the training step in" in line for line in said()) == 1
    assert run(command.replace("--compile", "--no-compile"), **files, out=tmp_path / "plain") == 0
    name = "model.safetensors" if out == "model" else "reward.safetensors"
    ours, plain = weights(tmp_path / "compiled" / name), weights(tmp_path / "plain" / name)
    assert ours.keys() == plain.keys() == weights(files[out] / name).keys()
    for one, other in zip(ours.values(), plain.values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(
    not (common.can_compile(torch.device("cpu")) and Path(sysconfig.get_path("include"), "Python.h").is_file()),
    reason="needs a C++ compiler and Python's headers",
)
def test_code_is_made_for_a_cpu(files, tmp_path, said):
    torch._dynamo.reset()
    tiny = "--dim 8 --depth 1 --heads 1 --dim-head 8 --seq-len 24 --batch-size 2 --steps 2 --log-every 1"
    for flag in ("--compile", "--no-compile"):
        command = f"pretrain {flag} --data {{text}} --lines --out {{out}} {tiny}"
        assert run(command, **files, out=tmp_path / flag) == 0
    # torch 2.6 cannot divide this graph into forward and backward: it says so, and goes on plainly
    sentence = "could not be compiled" if torch.__version__.startswith("2.6.") else "compiled the training step in"
    assert sum(sentence in line for line in said()) == 1
    assert last_loss(tmp_path / "--compile") == pytest.approx(last_loss(tmp_path / "--no-compile"), rel=1e-5)


def test_without_a_compiler_it_is_refused(files, capsys, monkeypatch):
    monkeypatch.setattr(common, "can_compile", lambda device: False)
    for command in (
        "pretrain --data {text} --out {nowhere} --compile",
        "reward --data {rated} --out {nowhere} --compile",
    ):
        assert run(command, **files) == 2
        assert capsys.readouterr().err.endswith(
            "needs a C++ compiler (g++ or clang++), which is not here; leave it out\n"
        )
    assert not files["nowhere"].exists()
    options = common.ComputeOptions(compile=True)
    with pytest.raises(ValueError, match="needs triton"):
        options.keywords(torch.device("cuda"))


def test_only_a_gpu_compiles_unasked(monkeypatch):
    monkeypatch.setattr(common, "accelerator_on", lambda device, precision: None)
    monkeypatch.setattr(common, "can_compile", lambda device: True)
    unasked = common.ComputeOptions()
    assert unasked.keywords(torch.device("cpu"))["compile"] is False
    assert unasked.keywords(torch.device("cuda"))["compile"] is None
    for wanted in (True, False):
        for device in ("cpu", "cuda"):
            assert common.ComputeOptions(compile=wanted).keywords(torch.device(device))["compile"] is wanted
    monkeypatch.setattr(common, "can_compile", lambda device: False)
    assert unasked.keywords(torch.device("cuda"))["compile"] is False


def test_a_resumed_run_keeps_its_precision(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("pretrain --precision bf16 --data {text} --out {out} " + PRETRAIN, **files, out=out) == 0
    capsys.readouterr()
    assert run("pretrain --resume --steps 8 --out {out}", out=out) == 0
    assert "on cpu in bf16" in capsys.readouterr().out


def test_what_is_logged_is_a_plain_line_on_stderr(files, tmp_path):
    arguments = f"pretrain --data {files['text']} --lines --out {tmp_path / 'run'} {PRETRAIN}".split()
    done = subprocess.run([sys.executable, "-m", "palm_rlhf_pytorch", *arguments], capture_output=True, text=True)
    assert re.search(r"^packing: 1\.\d documents to a row of 25 tokens, .* %\)$", done.stderr, re.MULTILINE)
    assert "packing" not in done.stdout


# reward


@pytest.mark.parametrize("flags", ["--bins 3", "--bins 0", "--bins 2 --edges 1.5", "--encoder --no-lora --bins 0"])
def test_reward_learns_ratings(files, tmp_path, capsys, flags):
    out = tmp_path / "run"
    assert run(f"reward --data {{rated}} --model {{model}} --out {{out}} {REWARD} {flags}", **files, out=out) == 0
    text = capsys.readouterr().out
    assert "held_out_spearman: " in text and ("bins divided at 1.5" in text) is ("--bins 0" not in flags)
    model = RunDirectory(out).reward_model()
    assert model.binned_output is ("--bins 0" not in flags)
    assert model.palm.causal is ("--encoder" not in flags)
    assert (len(model.palm.finetune_modules) == 0) is ("--no-lora" in flags)
    if flags == "--bins 2 --edges 1.5":
        assert model.bin_values[0] == 1.0 and model.bin_values[1] > 2.0


def test_reward_learns_choices(files, tmp_path, capsys):
    command = f"reward --pairs --data {{pairs}} --model {{model}} --out {{out}} {REWARD}"
    assert run(command, **files, out=tmp_path / "run") == 0
    assert "held_out_accuracy: " in capsys.readouterr().out
    assert not RunDirectory(tmp_path / "run").reward_model().binned_output


def test_reward_can_start_from_nothing(files, tmp_path):
    command = f"reward --data {{rated}} --out {{out}} --no-lora --held-out 0 {REWARD} {MODEL}"
    assert run(command, **files, out=tmp_path / "run") == 0
    assert RunDirectory(tmp_path / "run").reward_model().palm.dim == 16


def test_a_resumed_reward_equals_an_uninterrupted_one(files, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        command = "reward --data {rated} --model {model} --out {out} --prompt-words 2 " + REWARD
        assert run(command, **files, out=out) == 130
    assert run("reward --resume --out {out}", out=out) == 0
    assert_same_weights(out / "reward.safetensors", files["reward"] / "reward.safetensors")
    assert numbers(out / "metrics.jsonl") == numbers(files["reward"] / "metrics.jsonl")


# sft, dpo, kto, rejection

TUNED = {
    "sft": "sft --data {responses}",
    "dpo": "dpo --data {pairs}",
    "kto": "kto --data {responses}",
    "rejection": "rejection --prompts {prompts} --reward {reward} " + REJECTION,
}


@pytest.mark.parametrize(
    "name, flags",
    [
        ("sft", ""),
        ("sft", "--no-lora --held-out 0"),
        ("dpo", ""),
        ("dpo", "--no-lora --label-smoothing 0.1 --length-normalised"),
        ("dpo", "--loss simpo --gamma 0.5 --beta 1"),
        ("kto", "--desirable-weight 1.5"),
        ("rejection", ""),
    ],
)
def test_a_resumed_tuning_equals_an_uninterrupted_one(files, tmp_path, monkeypatch, capsys, name, flags):
    command = f"{TUNED[name]} --model {{model}} --out {{out}} {TUNE} {flags}"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(command, **files, out=whole) == 0
    assert ("held_out_loss: " in capsys.readouterr().out) is ("--held-out 0" not in flags)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(command, **files, out=parts) == 130
    assert "stopped after step 3; " in capsys.readouterr().err and "model.safetensors" not in names_in(parts)
    there = {"reference.safetensors", "best.jsonl"} & set(names_in(parts))
    kept = {file: (parts / file).read_bytes() for file in there}
    torch.manual_seed(9)
    with monkeypatch.context() as patch:  # neither is the reference asked again, nor anything sampled
        patch.setattr(preference, "save_weights", None)
        patch.setattr(cli_rejection, "best_of_n", None)
        assert run(name + " --resume --out {out}", out=parts) == 0
    assert kept == {file: (parts / file).read_bytes() for file in there}
    assert ("reference.safetensors" in kept) is (name in ("dpo", "kto") and "simpo" not in flags)
    assert_same_weights(whole / "model.safetensors", parts / "model.safetensors")
    assert numbers(whole / "metrics.jsonl") == numbers(parts / "metrics.jsonl")
    # it moved, and is a model like any other, without adapters
    start, end = weights(files["model"] / "model.safetensors"), weights(whole / "model.safetensors")
    assert start.keys() == end.keys() and any(not torch.equal(start[key], end[key]) for key in start)
    assert run("generate --model {out} --prompt the --max-new-tokens 3", out=whole) == 0


def test_rejection_writes_the_best_answers(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(TUNED["rejection"] + " --model {model} --out {out} " + TUNE, **files, out=out) == 0
    said = capsys.readouterr().out
    assert re.search(r"best of 3: mean score .* at most 0\.43 nats of KL", said)  # ln 3 - 2 / 3
    rows = [json.loads(line) for line in (out / "best.jsonl").read_text().split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == ["the soup", "the film was", "the"]
    assert all(row["score"] >= row["mean_score"] for row in rows)
    reward = text_reward([str(files["reward"])], torch.device("cpu"), None, 24)
    scores = reward([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert [row["score"] for row in rows] == pytest.approx(scores.tolist(), abs=1e-4)


def test_answers_that_were_drawn_stay(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(TUNED["rejection"] + " --model {model} --out {out} " + TUNE, **files, out=out) == 0
    assert run("rejection --resume --samples 2 --temperature 0.5 --out {out}", out=out) == 2
    assert "has its best answers, drawn with another --samples, --temperature" in capsys.readouterr().err


def test_every_tuning_goes_on_from_every_other(files, tmp_path):
    model = files["model"]
    for name in ("sft", "rejection", "dpo", "kto"):
        command = f"{TUNED[name]} --model {{model}} --out {{out}} {TUNE}"
        assert run(command, **{**files, "model": model}, out=tmp_path / name) == 0
        model = tmp_path / name
    data = tmp_path / "rejection" / "best.jsonl"
    command = f"sft --data {{data}} --model {{model}} --out {{out}} {TUNE}"
    assert run(command, data=data, model=model, out=tmp_path / "again") == 0


# ppo


@pytest.mark.parametrize("flags", ["", "--no-lora --micro-batch-size 1"])
def test_a_resumed_ppo_equals_an_uninterrupted_one(files, tmp_path, monkeypatch, capsys, flags):
    command = f"ppo --model {{model}} --reward {{reward}} --prompts {{prompts}} --out {{out}} {PPO} {flags}"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(command, **files, out=whole) == 0
    update, taken = OnPolicyTrainer.update, []

    def interrupted(self, *arguments):
        taken.append(self.step)
        if len(taken) == 1:
            signal.raise_signal(signal.SIGINT)
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(OnPolicyTrainer, "update", interrupted)
        assert run(command, **files, out=parts) == 130
    assert "stopped after update 1; " in capsys.readouterr().err
    torch.manual_seed(9)
    with monkeypatch.context() as patch:
        patch.setattr(OnPolicyTrainer, "update", interrupted)
        assert run("ppo --resume --out {out}", out=parts) == 0
    assert taken == [0, 1, 2]
    assert_same_weights(whole / "model.safetensors", parts / "model.safetensors")
    assert numbers(whole / "metrics.jsonl") == numbers(parts / "metrics.jsonl")
    assert [row["step"] for row in read_metrics(parts / "metrics.jsonl")] == [1, 2, 3]
    # it moved, and is a model like any other, without adapters
    start, end = weights(files["model"] / "model.safetensors"), weights(whole / "model.safetensors")
    assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)
    assert run("generate --model {out} --prompt the --max-new-tokens 3", out=whole) == 0


RL = "--updates 3 --rollouts 3 --rollout-batch 4 --max-seq-len 24 --minibatch-size 4 --lora-r 2 --save-every 2"


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    """Rewards by rule."""
    path = tmp_path_factory.mktemp("rules") / "rules.py"
    path.write_text("def short(prompts, responses):\n    return [-float(len(r)) for r in responses]\n\nconstant = 3\n")
    return path


@pytest.mark.parametrize(
    "algorithm",
    ["grpo --kl 0.1", "ppo", "ppo --value-bins 5 --value-min -30 --value-max 0",
     "flowrl --z-hidden 8", "tpo --no-lora", "dapo --overlong-buffer 4",
     "rloo --process-reward implicit --process-threshold -20", "grpo --process-reward {reward}"],
)  # fmt: skip
def test_a_resumed_rl_equals_an_uninterrupted_one(files, rules, tmp_path, monkeypatch, algorithm):
    samples = "" if algorithm.startswith("ppo") else "--samples-per-prompt 2"
    command = f"rl --model {{model}} --reward {{rules}}:short {{reward}} --prompts {{prompts}} --out {{out}} {RL}"
    command += f" --algorithm {algorithm} {samples}"
    paths = {**files, "rules": rules}
    assert run(command, **{**paths, "out": tmp_path / "whole"}) == 0
    with monkeypatch.context() as patch:
        train = OnPolicyTrainer.train
        saved = count(1)

        def stop(self, *args, on_update, **kwargs):
            def keep(row):
                on_update(row)
                if next(saved) == 2:
                    raise KeyboardInterrupt("stopped")

            return train(self, *args, on_update=keep, **kwargs)

        patch.setattr(OnPolicyTrainer, "train", stop)
        assert run(command, **{**paths, "out": tmp_path / "parts"}) == 130
    assert run("rl --resume --out {out}", out=tmp_path / "parts") == 0
    assert_same_weights(tmp_path / "whole" / "model.safetensors", tmp_path / "parts" / "model.safetensors")
    assert run("generate --model {out} --prompt the --max-new-tokens 3", out=tmp_path / "whole") == 0
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(("prm_loss" in row) == ("implicit" in algorithm) for row in rows)
    assert all(("process_reward" in row) == ("process" in algorithm) for row in rows)
    if "overlong" in algorithm:  # whose penalty is taken from the sum
        return
    for row in rows:  # the mean of both
        assert row["reward"] == pytest.approx((row["reward/short"] + row["reward/model"]) / 2, abs=1e-5)


@pytest.mark.parametrize(
    "reward, message",
    [
        ("{rules}:nothing", "has no function 'nothing'"),
        ("{rules}:constant", "has no function 'constant'"),
        ("missing.py:short", "there is no file 'missing.py'"),
    ],
)
def test_a_rule_that_is_not_there(files, rules, tmp_path, capsys, reward, message):
    command = f"rl --model {{model}} --reward {reward} --prompts {{prompts}} --out {{out}}"
    assert run(command, **files, rules=rules, out=tmp_path / "rl") == 2
    assert message in capsys.readouterr().err


def test_a_resumed_run_takes_another_learning_rate(files, rules, tmp_path, capsys):
    command = "rl --model {model} --reward {rules}:short --prompts {prompts} --out {out} --samples-per-prompt 2 " + RL
    paths = {**files, "rules": rules, "out": tmp_path / "rl"}
    assert run(command, **paths) == 0
    assert run("rl --resume --out {out} --updates 4 --actor-lr 1e-9", **paths) == 0
    assert "resuming with --actor-lr 1e-09 (was 0.001)" in capsys.readouterr().out
    state = load_state(paths["out"] / "state.pt", "GRPO")
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-9 and state["progress"]["step"] == 4


def test_a_rule_may_import_and_define(files, tmp_path, capsys):
    (tmp_path / "beside_the_rule.py").write_text("WORTH = 2.0\n")
    (tmp_path / "rule.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_the_rule import WORTH\n"
        "@dataclass\nclass Worth:\n    value: float = WORTH\n"
        "def model(prompts, responses):\n    return [Worth().value] * len(responses)\n"
    )
    paths = {**files, "rule": tmp_path / "rule.py", "out": tmp_path / "rl"}
    command = "rl --model {model} --reward {rule}:model --prompts {prompts} --out {out} --samples-per-prompt 2 " + RL
    assert run(command.replace("--updates 3", "--updates 1"), **paths) == 0
    assert read_metrics(paths["out"] / "metrics.jsonl")[0]["reward"] == 2.0
    twice = command.replace("{rule}:model", "{rule}:model {reward}").replace("{out}", "{nowhere}")
    assert run(twice, **paths) == 2
    assert (
        "each needs a name of its own (that of reward runs is 'model'), got ['model', 'model']"
        in capsys.readouterr().err
    )


def test_rewards_with_weights(files, rules, tmp_path, capsys):
    """The weighted sum; each reward run by its folder's name."""
    paths = {**files, "rules": rules, "out": tmp_path / "rl", "one": files["reward"], "two": tmp_path / "two"}
    shutil.copytree(files["reward"], paths["two"])
    command = f"rl --model {{model}} --prompts {{prompts}} --samples-per-prompt 2 {RL} --out {{out}} --reward "
    assert run(command + "{rules}:short=0.25 {one}=-2 {two}", **paths) == 0
    for row in read_metrics(paths["out"] / "metrics.jsonl"):
        one, two = (row[f"reward/{paths[name].name}"] for name in ("one", "two"))
        assert row["reward"] == pytest.approx(0.25 * row["reward/short"] - 2 * one + two, abs=1e-4)
    assert run(command + "{rules}:short=much", **{**paths, "out": tmp_path / "no"}) == 2
    assert "behind = stands its weight, a number, got 'much'" in capsys.readouterr().err


def test_an_option_that_its_algorithm_refuses_takes_no_directory(files, rules, tmp_path, capsys):
    command = "rl --algorithm max_rl --kl 0.1 --kl-in reward --model {model} --reward {rules}:short --prompts {prompts}"
    assert run(command + " --out {out}", **files, rules=rules, out=tmp_path / "rl") == 2
    assert "take kl_in='loss'" in capsys.readouterr().err and not (tmp_path / "rl").exists()


def test_a_rule_chooses_the_best_answers(files, rules, tmp_path):
    paths = {**files, "reward": f"{rules}:short", "out": tmp_path / "best"}
    assert run(TUNED["rejection"] + " --model {model} --out {out} " + TUNE, **paths) == 0
    best = read_best(paths["out"] / "best.jsonl")
    assert all(b.score == -len(b.response) >= b.mean_score for b in best) and best


def test_a_process_reward_of_other_tokens_is_refused(files, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    other = {**files, "bpe": tmp_path / "bpe", "out": tmp_path / "rl"}
    bpe = f"--tokenizer bpe --vocab-size 270 {MODEL} {REWARD}"
    assert run("reward --data {rated} --out {bpe} " + bpe, **other) == 0
    line = "rl --model {model} --reward {reward} --process-reward {bpe} --prompts {prompts} --out {out} " + RL
    assert run(line, **other) == 2
    assert "divides text into other tokens than the model" in capsys.readouterr().err
    assert not other["out"].exists()


def test_an_algorithm_shows_its_own_flags(capsys):
    for name, own in (("tpo", "--eta"), ("flowrl", "--beta"), ("dr_grpo", "--max-response")):
        with pytest.raises(SystemExit):
            main(["rl", "--algorithm", name, "--help"])
        assert own in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("rl --model m --reward r --prompts p --algorithm tpo --eps-clip 0.1".split())
    assert "unrecognized arguments: --eps-clip" in capsys.readouterr().err
    assert main(["rl", "--algorithm", "best"]) == 2
    assert "there is no algorithm 'best'; there are ppo, grpo" in capsys.readouterr().err


def test_ppo_from_first_words_with_rewards_of_other_tokenizers(files, tmp_path):
    pytest.importorskip("tokenizers")
    reward = tmp_path / "reward"
    command = f"reward --data {{rated}} --out {{reward}} --no-lora --tokenizer bpe --vocab-size 270 {REWARD} {MODEL}"
    assert run(command, **{**files, "reward": reward}) == 0
    command = (
        f"ppo --model {{model}} --reward {{reward}} {{other}} --whole-text --prompts {{rated}} --prompt-words 2 {PPO}"
    )
    assert run(command + " --out {out}", **files, other=reward, out=tmp_path / "ppo") == 0
    config = json.loads((tmp_path / "ppo" / "config.json").read_text())
    assert config["options"]["reward"] == [str(files["reward"]), str(reward)]
    assert run("ppo --resume --updates 4 --out {out}", out=tmp_path / "ppo") == 0


# generate


def test_generate_streams_one_completion(files, capsys):
    command = "generate --model {model} --prompt {prompt} --max-new-tokens 5 --seed 1"
    texts = []
    for _ in range(2):
        assert run(command, **files, prompt="the soup") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the soup") and texts[0].endswith("\n")
    assert run(command.replace("--seed 1", "--seed 2"), **files, prompt="the soup") == 0
    assert capsys.readouterr().out != texts[0]


def test_generate_several(files, capsys):
    command = "generate --model {model} --prompt {prompt} --max-new-tokens 5 --num-samples 3"
    assert run(command, **files, prompt="the soup was") == 0
    assert capsys.readouterr().out.count("the soup was") == 3


def test_generate_shows_the_best_by_the_reward(files, capsys):
    command = "generate --model {model} --reward {reward} --prompt {prompt} --max-new-tokens 5 --seed 3"
    options = generate.GenerateOptions(
        model=str(files["model"]), prompt="the", reward=(str(files["reward"]),), max_new_tokens=5, seed=3, num_samples=4
    )
    source = RunDirectory(files["model"])
    reward = generate.text_reward(options.reward, torch.device("cpu"), False, 512)
    answers = generate.ranked(source.palm(), reward, source.tokenizer(), "the", options)
    assert [score for score, _ in answers] == sorted((score for score, _ in answers), reverse=True)
    assert answers[0][0] == pytest.approx(float(reward(["the"], [answers[0][1]])))
    assert run(command + " --num-samples 4", **files, prompt="the") == 0
    assert capsys.readouterr().out == f"[{answers[0][0]:.3f}] the{answers[0][1]}\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_generate_chats_line_by_line(files, capsys, monkeypatch):
    command = "generate --model {model} --max-new-tokens 3 --temperature 0"
    expected = []
    for prompt in ("the", "soup", "é"):
        assert run(command + " --prompt {prompt}", **files, prompt=prompt) == 0
        expected.append(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n\nsoup\né"))
    assert run(command, **files) == 0  # a pipe: blank lines are passed over
    assert capsys.readouterr().out == "".join(expected)
    monkeypatch.setattr(sys, "stdin", Terminal("the\n\nsoup\n"))
    assert run(command, **files) == 0  # a terminal: one ends it
    assert capsys.readouterr().out == f"> {expected[0]}> "


def test_a_chat_can_remember(files, capsys, monkeypatch):
    command = "generate --model {model} --max-new-tokens 3 --temperature 0"
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\nsoup"))
    assert run(command + " --remember", **files) == 0
    first, second = capsys.readouterr().out.splitlines()
    whole = f"{first}\nsoup"
    assert run(command + " --prompt {prompt}", **files, prompt=whole) == 0
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_each_line_draws_its_own_noise(files, capsys, monkeypatch):
    command = "generate --model {model} --max-new-tokens 8"
    alone = []
    for seed in ("3", "4"):
        assert run(command + " --prompt the --seed " + seed, **files) == 0
        alone.append(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\nthe"))
    assert run(command + " --seed 3", **files) == 0
    assert capsys.readouterr().out == "".join(alone) and alone[0] != alone[1]


class Says:
    """Stands in for a PaLM that says these bytes."""

    device = "cpu"

    def __init__(self, data):
        self.data = data

    def stream(self, *arguments, **keywords):
        return (torch.tensor([byte + 3]) for byte in self.data)


@pytest.mark.parametrize(
    "data, expected",
    [
        ("aé€😀b".encode(), ["a", "é", "€", "😀", "b"]),
        (b"a\xffb", ["a", "\ufffdb"]),
        (b"a\xe2\x82", ["a", "\ufffd"]),  # ended within a character
    ],
)
def test_characters_of_several_tokens_come_whole(data, expected):
    options = generate.GenerateOptions(model="x")
    found = list(generate.pieces(Says(data), ByteTokenizer(), "", options))
    assert [piece for piece in found if piece] == expected


# mistakes


@pytest.mark.parametrize(
    "command, message",
    [
        ("pretrain --data {nowhere}.txt --out {nowhere}", "nowhere.txt: expected a readable file (No such file or"),
        ("pretrain --data {nowhere} --out {nowhere}", "expected a name ending in .txt,"),
        ("pretrain --data {rated} --out {nowhere} --held-out 1", "less than 1, got 1.0"),
        pytest.param(
            "pretrain --data {text} --out {nowhere} --tokenizer nowhere/at/all",
            "no tokenizer at nowhere/at/all",
            marks=needs_transformers,
        ),
        ("pretrain --data {text} --out {nowhere} --heads 4 --kv-heads 3", "heads (4) must be a multiple of kv_heads"),
        ("pretrain --data {nowhere}.txt --out {model}", "already holds a run: add --resume, or choose another --out"),
        ("pretrain --out {nowhere} --resume", "does not hold a run to resume"),
        ("pretrain --out {reward} --resume", "holds a run of reward, not of pretrain"),
        ("pretrain --out {model} --resume --dim 32", "is of another model: resume with the sizes"),
        ("reward --data {text} --model {model} --out {nowhere}", "text.txt: expected records"),
        (
            "reward --data {pairs} --model {model} --out {nowhere}",
            "line 1: expected the columns prompt + response + rat",
        ),
        ("reward --data {rated} --pairs --model {model} --out {nowhere}", "expected the columns prompt + chosen + rej"),
        ("reward --data {rated} --model {nowhere} --out {nowhere}", "there is no file or directory"),
        ("reward --data {rated} --model {reward} --out {nowhere}", "does not hold a language model"),
        ("reward --data {rated} --model {model} --out {nowhere} --edges 9", "no rating falls into bin 1"),
        (
            "ppo --model {reward} --reward {reward} --prompts {prompts} --out {nowhere}",
            "does not hold a language model",
        ),
        ("ppo --model {model} --reward {model} --prompts {prompts} --out {nowhere}", "does not hold a reward model"),
        (
            "ppo --model {model} --reward {reward} --prompts {rated} --out {nowhere}",
            "expected the columns prompt, or messages, got",
        ),
        (
            "ppo --model {model} --reward {reward} --prompts {text} --prompt-words 9 --out {nowhere}",
            "more than the 9 wor",
        ),
        ("ppo --model {model} --reward {reward} --prompts {long} --max-seq-len 24 --out {nowhere}", "has 151 tokens"),
        (
            "sft --data {pairs} --model {model} --out {nowhere}",
            "expected the columns prompt + response, or prompt + comp",
        ),
        ("sft --data {responses} --model {reward} --out {nowhere}", "does not hold a language model"),
        ("dpo --data {responses} --model {model} --out {nowhere}", "expected the columns prompt + chosen + rejected"),
        ("dpo --data {pairs} --model {model} --out {nowhere} --loss ipo --gamma 1", "gamma is simpo's margin"),
        ("dpo --data {pairs} --model {model} --out {nowhere} --held-out 0.99", "more items are needed"),
        ("kto --data {pairs} --model {model} --out {nowhere}", "expected the columns prompt + response + label, or"),
        (
            "rejection --prompts {long} --model {model} --reward {reward} --out {nowhere} --max-seq-len 24",
            "has 151 tokens, --max-seq-len 24 leaves no room",
        ),
        ("rejection --prompts {prompts} --model {model} --reward {model} --out {nowhere}", "a reward model"),
        ("generate --model {nowhere} --prompt a", "and it is no name of a repository on the hub (owner/name)"),
        ("generate --model {model} --reward {nowhere} --prompt a", "does not hold a reward model (from reward)"),
        ("generate --model {model} --prompt a --top-p 2", "at most 1, got 2.0"),
    ],
)
def test_mistakes_are_said_in_one_sentence(files, capsys, command, message):
    assert run(command, **files) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"palm-rlhf {command.split()[0]}: .*\n", error) and message in error
    assert not files["nowhere"].exists()


@pytest.mark.parametrize(
    "command, message",
    [
        ("", "required: COMMAND"),
        ("train", "invalid choice: 'train'"),
        ("pretrain", "required: --data"),
        ("pretrain --data x --steps 0", "--steps: must be 1 or more, got 0"),
        ("pretrain --data x --devise cpu", "unrecognized arguments: --devise cpu"),
        ("pretrain --data x --res", "unrecognized arguments: --res"),
        ("pretrain --data x --device meta", "invalid choice: 'meta'"),
        ("reward --data x --precision fp16", "invalid choice: 'fp16'"),
        ("ppo --model x --reward x --prompts x --compile", "unrecognized arguments: --compile"),
        ("ppo --model x --reward x --prompts x --temperature 0", "--temperature: must be 0.01 or more"),
        ("dpo --data x --model x --loss hinge", "invalid choice: 'hinge'"),
        ("rejection --prompts x --model x", "required: --reward"),
        ("generate --model x --num-samples 0", "--num-samples: must be 1 or more"),
    ],
)
def test_wrong_flags_are_said_in_one_sentence(capsys, command, message):
    with pytest.raises(SystemExit) as caught:
        run(command)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error and "--help lists all" in error


def test_no_cuda_is_no_traceback(files, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("generate --model {model} --prompt a --device cuda", **files) == 2
    assert "torch sees no CUDA GPU" in capsys.readouterr().err


def test_a_corrupt_checkpoint_is_no_traceback(files, tmp_path, capsys):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((files["model"] / name).read_bytes())
    (tmp_path / "state.pt").write_bytes(b"half")
    (tmp_path / "model.safetensors").write_bytes(b"half")
    for command in ("pretrain --resume --out {out}", "generate --model {out} --prompt a"):
        assert run(command, out=tmp_path) == 2
        assert "is not a whole" in capsys.readouterr().err


def test_an_early_ctrl_c_is_no_traceback(files, capsys, monkeypatch):
    def pressed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "pieces", pressed)
    assert run("generate --model {model} --prompt a", **files) == 130
    assert capsys.readouterr().err == "\npalm-rlhf generate: stopped\n"


# help


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    parser = cli.build_parser(name)
    actions = parser._subparsers._group_actions[0].choices[name]._actions
    assert len(actions) > 5 and all(action.help for action in actions)
    text = " ".join(capsys.readouterr().out.split())
    assert cli.COMMANDS[name] in text and "(default: False)" not in text


def test_help_does_not_wait_for_torch():
    script = (
        "import sys; from palm_rlhf_pytorch.cli import build_parser; build_parser(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_is_also_a_module():
    done = subprocess.run([sys.executable, "-m", "palm_rlhf_pytorch", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("palm-rlhf ")


def test_a_reward_is_asked_as_it_was_trained(tmp_path):
    device = torch.device("cpu")
    small = ["--dim", "8", "--depth", "1", "--heads", "2", "--dim-head", "4", "--steps", "1", "--device", "cpu"]
    rows = "".join(f"{i % 5}\tthe number {i} was here\n" for i in range(20))
    data = tmp_path / "ratings.tsv"
    data.write_text("rating\ttext\n" + rows)
    for name, words in (("whole", "0"), ("divided", "2")):
        run = ["reward", "--data", str(data), "--out", str(tmp_path / name), "--prompt-words", words, *small]
        assert main(run) == 0
    whole, divided = str(tmp_path / "whole"), str(tmp_path / "divided")
    assert text_reward([whole], device, None, 8).whole is True
    assert text_reward([divided], device, None, 8).whole is False
    assert text_reward([divided], device, True, 8).whole is True
    with pytest.raises(ValueError, match="whole-text"):
        text_reward([whole, divided], device, None, 8)
