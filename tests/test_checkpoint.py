import logging
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from palm_rlhf_pytorch import checkpoint
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.reward import RewardModel

X = torch.tensor([[3, 5, 7, 1, 9]])
LOGGER = "palm_rlhf_pytorch.checkpoint"


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# our own files


@pytest.mark.parametrize("name", ["palm.safetensors", "palm.pt", "palm"])
def test_save_load_save_gives_identical_bytes(make_palm, tmp_path, name, caplog):
    model = make_palm(finetune_scopes=["a"], qk_rmsnorm=True)
    model.add_finetune_params("b", lora_r=3)
    model.save(tmp_path / name)
    first = (tmp_path / name).read_bytes()
    again = PaLM.from_checkpoint(tmp_path / name)
    assert same(model, again) and again.config == model.config
    for _ in range(5):
        again.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert not caplog.records


def test_tied_weights_are_written_once_and_stay_tied(make_palm, tmp_path):
    model = make_palm(depth=3)
    model.save(tmp_path / "palm.safetensors")
    with safe_open(tmp_path / "palm.safetensors", "pt") as file:
        names = set(file.keys())
    assert len(names & {"token_emb.weight", "to_logits.weight"}) == 1
    assert sum("rotary_emb" in name for name in names) == 2
    again = PaLM.from_checkpoint(tmp_path / "palm.safetensors")
    assert again.to_logits.weight is again.token_emb.weight
    assert again.layers[2].fn.rotary_emb is again.rotary_emb


def test_every_keyword_comes_back(make_palm, tmp_path):
    keywords = dict(
        causal=False,
        attn_dropout=0.25,
        ff_dropout=0.5,
        ff_mult=2,
        lora_r=5,
        rotary_xpos_scale_base=16,
        flash_attn=True,
        cross_entropy_ignore_index=-1,
        kv_heads=2,
        rotary_theta=77.0,
        use_xpos=True,
        ff_inner_dim=10,
        norm_eps=0.1,
        logit_scale=0.5,
        gradient_checkpointing=True,
    )
    model = make_palm(**keywords)
    model.save(tmp_path / "palm.safetensors")
    again = PaLM.from_checkpoint(tmp_path / "palm.safetensors").eval()
    assert {k: again.config[k] for k in keywords} == keywords
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("lora", [True, False])
def test_reward_model_round_trip(make_palm, tmp_path, lora):
    palm = make_palm(finetune_scopes=["other"], lora_r=2)
    model = RewardModel(
        palm, 0.3, 4, lora, lora_r=5, sample_from_bins=False, sample_temperature=0.5, bin_values=[1.0, 2.5, 3.0, 9.0]
    )
    for p in model.finetune_parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save(tmp_path / "reward.safetensors")
    again = RewardModel.from_checkpoint(tmp_path / "reward.safetensors")
    assert same(model, again) and again.config == model.config
    assert (again.sample_from_bins, again.sample_temperature) == (False, 0.5)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    mask = torch.tensor([[True, True, False, False, False]])
    assert torch.equal(again.score(X, mask), model.score(X, mask))
    first = (tmp_path / "reward.safetensors").read_bytes()
    again.save(tmp_path / "reward.safetensors")
    assert (tmp_path / "reward.safetensors").read_bytes() == first


def test_bfloat16_weights_come_back_bit_by_bit_with_exact_frequencies(make_palm, tmp_path):
    model = make_palm().bfloat16()
    model.save(tmp_path / "palm.safetensors")
    again = make_palm().bfloat16().load(tmp_path / "palm.safetensors")
    assert same(model, again)
    assert again.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(again.rotary_emb.inv_freq, PaLM(dim=24, num_tokens=17, depth=2, dim_head=8).rotary_emb.inv_freq)


def test_a_failing_save_leaves_the_old_file(make_palm, tmp_path, monkeypatch):
    model = make_palm()
    model.save(tmp_path / "palm.safetensors")
    before = (tmp_path / "palm.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        make_palm().save(tmp_path / "palm.safetensors")
    assert (tmp_path / "palm.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["palm.safetensors"]


def test_state_dicts_of_ours_need_no_guess(make_palm, tmp_path, caplog):
    model = make_palm()
    torch.nn.init.constant_(model.norm.gamma, 1.0)  # trained far away: looks like generation 0.2
    for layer in model.layers:
        torch.nn.init.constant_(layer.fn.norm.gamma, 1.0)
    by_name = make_palm()
    by_name.load_state_dict(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "palm.pt")
    assert same(by_name, model) and same(make_palm().load(tmp_path / "palm.pt"), model)
    assert not caplog.records


# the reference's generations


def test_generations_are_told_by_their_gammas():
    near_one, near_zero = [torch.ones(8) + 0.1 * torch.randn(8)], [0.1 * torch.randn(8)]
    assert checkpoint.detect_generation(near_one * 3) == "0.2"
    assert checkpoint.detect_generation(near_zero * 3) == "0.8"
    assert checkpoint.detect_generation(near_one * 2 + near_zero) == "0.2"  # the majority


@pytest.mark.parametrize("generation", ["0.2", "0.8"])
@pytest.mark.parametrize("role", ["palm", "reward"])
def test_foreign_weights_are_adopted_and_it_is_said(make_palm, tmp_path, caplog, generation, role):
    model, other = (make_palm() if role == "palm" else RewardModel(make_palm()) for _ in range(2))
    foreign = OrderedDict(
        (name, t + 1 if generation == "0.2" and name.endswith("norm.gamma") else t.clone())
        for name, t in model.state_dict().items()
    )
    given = {name: t.clone() for name, t in foreign.items()}
    with caplog.at_level(logging.WARNING, LOGGER):
        other.load_state_dict(foreign)
    assert f"generation {generation}" in caplog.text and len(caplog.records) == 1
    assert all(torch.equal(given[name], t) for name, t in foreign.items())  # the caller's tensors are left alone
    for name, t in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], t)

    del foreign["palm.to_logits.weight" if role == "reward" else "to_logits.weight"]  # tied, often left out
    save_file(foreign, tmp_path / "foreign.safetensors")
    caplog.clear()
    other.load(tmp_path / "foreign.safetensors", generation=generation)
    assert not caplog.records
    for name, t in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], t)


def test_an_override_on_our_own_file(make_palm, tmp_path):
    model = make_palm()
    model.save(tmp_path / "palm.safetensors")
    assert same(make_palm().load(tmp_path / "palm.safetensors", generation="0.8"), model)
    with pytest.raises(ValueError, match=r"generation is one of \('0.2', '0.8'\), or None to look, got '0.3'"):
        model.load(tmp_path / "palm.safetensors", generation="0.3")


# files that must not be trusted


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "old pickle", "torch zip", "torch legacy", "whole module"])
def test_code_in_a_file_is_refused_and_never_run(make_palm, tmp_path, kind):
    file, trace = tmp_path / "palm.pt", tmp_path / "exploded"
    if "pickle" in kind:
        file.write_bytes(pickle.dumps({"norm.gamma": Bomb(trace)}, protocol=2 if kind == "old pickle" else 4))
    elif kind == "whole module":
        torch.save(make_palm(), file)
    else:
        torch.save({"norm.gamma": Bomb(trace)}, file, _use_new_zipfile_serialization=kind == "torch zip")
    with pytest.raises(ValueError, match="nothing in it was executed") as error:
        make_palm().load(file)
    assert not trace.exists()
    assert kind == "pickle" or "it wants to run" in str(error.value)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # the bomb does work


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_broken_files_are_refused_with_one_sentence(make_palm, tmp_path, kind):
    model, file = make_palm(), tmp_path / ("palm.safetensors" if kind == "safetensors" else "palm.pt")
    if kind == "safetensors":
        model.save(file)
    else:
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    dice = random.Random(0)
    broken = [whole[: int(len(whole) * share)] for share in (0, 0.001, 0.01, 0.3, 0.7, 0.99)]
    broken += [dice.randbytes(n) for n in (1, 8, 9, 50, 500)] + [
        b"hello world" * 20,
        b"\x80\x02]q.",
        b"0",
        b"PK\x03\x04",
    ]
    broken += [bytes(dice.choices(b"(.]}\x80\x02cqXKM0123\n", k=40)) for _ in range(20)]
    for data in broken:
        file.write_bytes(data)
        with pytest.raises(ValueError, match="is not a whole weights file|a state dict of tensors is needed") as error:
            model.load(file)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_files_that_do_not_fit_say_why(make_palm, tmp_path):
    model, file = make_palm(), tmp_path / "palm.safetensors"
    model.save(file)
    with pytest.raises(ValueError, match="does not fit this PaLM: .*size mismatch for token_emb.weight"):
        make_palm(dim=16).load(file)
    with pytest.raises(ValueError, match="does not fit this PaLM: .*Missing key.*layers.2"):
        make_palm(depth=3).load(file)
    with pytest.raises(FileNotFoundError, match="there is no weights file"):
        model.load(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="there is no weights file"):
        model.load(tmp_path)
    save_file(model.norm.state_dict(), file)
    with pytest.raises(ValueError, match="was not written by palm_rlhf_pytorch"):
        PaLM.from_checkpoint(file)
    for value, got in (({"model": {}}, "dict"), ([1.0], "list")):
        torch.save(value, tmp_path / "nested.pt")
        with pytest.raises(ValueError, match=f"holds {got}, a state dict of tensors is needed"):
            model.load(tmp_path / "nested.pt")


def test_other_keywords_are_said(tmp_path, caplog):
    sizes = dict(num_tokens=7, dim=8, depth=1, heads=2, dim_head=4)
    PaLM(**sizes).save(tmp_path / "palm.safetensors")
    PaLM(**sizes, attn_dropout=0.1).load(tmp_path / "palm.safetensors")
    assert not caplog.records  # dropout changes nothing that weights mean
    PaLM(**sizes, causal=False, logit_scale=2.0).load(tmp_path / "palm.safetensors")
    assert "causal=True (here False)" in caplog.text and "logit_scale=1.0 (here 2.0)" in caplog.text


def test_the_config_is_read_without_the_tensors(tmp_path, monkeypatch):
    PaLM(num_tokens=7, dim=8, depth=1, heads=2, dim_head=4).save(tmp_path / "palm.safetensors")
    state, config = checkpoint.read_weights(tmp_path / "palm.safetensors", only_config=True)
    assert not state and config["dim"] == 8
