import json
import sys
from dataclasses import dataclass

import pytest
import torch

from palm_rlhf_pytorch import RewardModel
from palm_rlhf_pytorch.files import write_json
from palm_rlhf_pytorch.metrics import MetricsLog
from palm_rlhf_pytorch.run_directory import RunDirectory, fresh_directory
from palm_rlhf_pytorch.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.version import __version__

TOKENIZER = ByteTokenizer()


@dataclass(frozen=True)
class Options:
    steps: int = 3
    edges: tuple[float, ...] = (1.5,)


@dataclass(frozen=True)
class Other:
    out: str = "x"


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def start(run, resume=False, command="test", **changes):
    return run.start(command, resume, TOKENIZER, options=Options(**changes), other=Other())


def test_a_fresh_directory_is_never_one_that_is_there(tmp_path):
    path = tmp_path / "run"
    for name in ("run", "run-2", "run-3"):
        found = fresh_directory(path)
        assert found.name == name
        found.mkdir()


def test_a_run_begins_with_its_config_and_tokenizer(run):
    log = start(run)
    assert json.loads((run / "config.json").read_text()) == {
        "command": "test",
        "version": __version__,
        "options": {"steps": 3, "edges": [1.5]},
        "other": {"out": "x"},
    }
    assert run.tokenizer().num_tokens == TOKENIZER.num_tokens
    log.append({"step": 1})
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert run.options("test") == {"steps": 3, "edges": [1.5], "out": "x"}


def test_a_run_that_is_there_is_refused(run):
    run.claim(False)
    start(run)
    with pytest.raises(FileExistsError, match="already holds a run: add --resume, or choose another --out"):
        run.claim(False)
    with pytest.raises(FileExistsError):
        start(run)
    run.claim(True)


def test_only_a_run_of_the_same_command_is_gone_on_with(run, capsys):
    with pytest.raises(FileNotFoundError, match="a run to resume: config.json is missing"):
        start(run, resume=True)
    start(run)
    start(run, resume=True)
    assert capsys.readouterr().out == ""
    start(run, resume=True, steps=5)
    assert capsys.readouterr().out == "resuming with --steps 5 (was 3)\n"
    assert run.options("test")["steps"] == 3  # until it is known that they fit
    run.finish(MetricsLog(), "a test")
    assert run.options("test")["steps"] == 5
    with pytest.raises(ValueError, match="holds a run of test, not of ppo"):
        run.options("ppo")


def test_a_broken_config_is_named(run):
    start(run)
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json' is not JSON"):
        run.options("test")


def test_a_missing_checkpoint_is_said(run, capsys):
    start(run)
    assert not run.has_state() and "no checkpoint yet: starting from the beginning" in capsys.readouterr().out
    run.state.write_bytes(b"")
    assert run.has_state() and capsys.readouterr().out == ""


def test_models_come_back(run, make_palm):
    palm = make_palm()
    ids = torch.arange(6)[None]
    palm.save(run.weights)
    reward_model = RewardModel(palm, dropout=0.5)
    reward_model.save(run.reward_weights)
    assert torch.equal(run.palm()(ids), palm(ids)) and not run.palm().training
    mask = torch.arange(6)[None] < 2
    assert torch.equal(run.reward_model().score(ids, mask), reward_model.score(ids, mask))
    assert not run.reward_model().training


def test_what_is_missing_is_named(run):
    for load, message in {
        run.palm: "does not hold a language model .*: model.safetensors is missing",
        run.reward_model: "does not hold a reward model .*: reward.safetensors is missing",
        run.tokenizer: "does not hold a run: config.json is missing",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            load()


def test_adapters_are_kept_of_models_from_hugging_face_alone(run, tmp_path):
    start(run)
    own, theirs = RunDirectory(tmp_path / "own"), RunDirectory(tmp_path / "theirs")
    write_json(own / "config.json", {"model_type": "palm-rlhf-pytorch"})
    write_json(theirs / "config.json", {"architectures": ["CohereForCausalLM"]})
    kept = {place: run.adapter_of(str(place)) for place in (run.path, own.path, theirs.path, "owner/name")}
    assert list(kept.values()) == [None, None, run / "adapter", run / "adapter"]


def test_finish_draws_curves(run, capsys):
    pytest.importorskip("matplotlib")
    log = start(run)
    log.append({"step": 1, "loss": 1.0})
    run.finish(log, "a test")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"a test: everything is in {run.path}/\n"


def test_without_matplotlib_finish_says_so(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run.finish(start(run), "a test")
    assert "[plot]" in capsys.readouterr().out and not (run / "curves.png").exists()
