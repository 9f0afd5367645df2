import math
import random
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import sft
from palm_rlhf_pytorch.batches import encode_response
from palm_rlhf_pytorch.data import Demonstration
from palm_rlhf_pytorch.fine_tuning import TuningOptions, all_response_sums
from palm_rlhf_pytorch.sft import response_batches, response_loss, train_on_demonstrations
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
DEMONSTRATIONS = [Demonstration("the", " end"), Demonstration("", "yes"), Demonstration("what is", ""),
                  Demonstration("a much longer prompt", " answer")]  # fmt: skip
OPTIONS = TuningOptions(max_len=16, batch_size=2, lora_r=4)
FIT = FitOptions(steps=6, lr=1e-2, warmup=0, log_every=2, eval_every=3, save_every=3)


@pytest.fixture
def palm(make_palm):
    return make_palm(num_tokens=TOKENIZER.num_tokens)


def encoded(demonstrations, max_len=16):
    return [encode_response(TOKENIZER, d.prompt, d.response, max_len) for d in demonstrations]


def batches_of(rows, batch_size=2):
    return response_batches(rows, batch_size, torch.Generator().manual_seed(0))


# batches


def test_rows_are_packed_and_only_responses_are_marked():
    rows = [([1, 5, 6, 2], 2), ([1, 7, 2], 1), ([1, 0, 0, 8, 9, 2], 4), ([1, 2], 1)]  # ids of 0 are ids like others
    ids, learned, segments = next(batches_of(rows))
    found = set()
    for row, marks, numbers in zip(ids, learned, segments, strict=True):
        assert not marks[numbers < 0].any() and not row[numbers < 0].any()
        for number in range(int(numbers.max()) + 1):
            inside = numbers == number
            found.add((tuple(row[inside].tolist()), int((~marks[inside]).sum())))
            assert marks[inside].tolist() == sorted(marks[inside].tolist())  # the prompt, then the response
    assert ids.shape == (2, 6)  # no wider than the longest
    assert found <= {(tuple(ids), prompt) for ids, prompt in rows} and len(found) >= 2
    seen = {tuple(i[n == k].tolist()) for b in islice(batches_of(rows), 4)
            for i, n in zip(b[0], b[2], strict=True) for k in range(4)}  # fmt: skip
    assert seen - {()} == {tuple(ids) for ids, _ in rows}


# the loss


def test_the_loss_is_the_mean_over_response_tokens(palm):
    rows = encoded(DEMONSTRATIONS)
    ids, learned, segments = next(batches_of(rows, batch_size=8))
    total, tokens = 0.0, 0
    for row, marks, numbers in zip(ids, learned, segments, strict=True):
        for number in range(int(numbers.max()) + 1):
            inside = numbers == number
            alone, response = row[inside][None], marks[inside]
            losses = F.cross_entropy(palm(alone)[0, :-1], alone[0, 1:], reduction="none")
            total, tokens = total + losses[response[1:]].sum().item(), tokens + int(response.sum())
    found = response_loss(palm, (ids, learned, segments))
    assert found.item() == pytest.approx(total / tokens, rel=1e-5) and tokens == int(learned.sum())


def test_the_loss_is_minus_the_log_probs_of_the_responses(palm):
    rows = encoded(DEMONSTRATIONS)
    sums = all_response_sums(palm, rows, TOKENIZER.pad_id, 8)
    for (ids, prompt), total in zip(rows, sums.tolist(), strict=True):
        x = torch.tensor([ids])
        loss = response_loss(palm, (x, torch.arange(len(ids))[None] >= prompt, torch.zeros_like(x)))
        assert loss.item() * (len(ids) - prompt) == pytest.approx(-total, rel=1e-5)


def test_only_places_before_response_tokens_get_gradient(palm):
    kept = []
    palm.norm.register_forward_hook(lambda *made: kept.append(made[2]))
    batch = next(batches_of(encoded(DEMONSTRATIONS)))
    (gradient,) = torch.autograd.grad(response_loss(palm, batch), kept[0])
    assert torch.equal(gradient.abs().sum(dim=-1) > 0, batch[1][:, 1:])


# training


@pytest.mark.parametrize("lora", [True, False])
def test_responses_are_learned(palm, lora):
    rng = random.Random(0)
    numbers = [rng.randrange(4) for _ in range(40)]
    demonstrations = [Demonstration("pqrs"[n], "wxyz"[n] * (n + 1)) for n in numbers]
    trunk = palm.token_emb.weight.clone()
    fit = replace(FIT, steps=60, lr=5e-2 if lora else 2e-2, log_every=1, eval_every=60)
    options = replace(OPTIONS, lora=lora, lora_r=8, batch_size=16)
    history = train_on_demonstrations(palm, demonstrations[8:], demonstrations[:8], TOKENIZER, options, fit)
    assert history[-1]["held_out_loss"] < 0.5 < 2 < history[0]["loss"]
    assert history[-1]["perplexity"] == pytest.approx(math.exp(history[-1]["held_out_loss"]))
    assert torch.equal(palm.token_emb.weight, trunk) is lora and not palm.finetune_modules
    rows = encoded(demonstrations[:8])
    mean = -all_response_sums(palm, rows, TOKENIZER.pad_id, 8).sum().item() / sum(len(ids) - n for ids, n in rows)
    assert mean == pytest.approx(history[-1]["held_out_loss"], rel=1e-3)


def test_prompts_are_not_learned(palm):
    # the same response to any prompt: what follows a prompt's token stays unknown
    demonstrations = [Demonstration("ab", "c")] * 8
    fit = replace(FIT, steps=20, lr=1e-2)
    train_on_demonstrations(palm, demonstrations, [], TOKENIZER, replace(OPTIONS, lora=False), fit)
    (ids, prompt), *_ = encoded(demonstrations)
    log_probs = palm(torch.tensor([ids]))[0].log_softmax(dim=-1)
    by_token = [log_probs[t - 1, ids[t]].item() for t in range(1, len(ids))]
    assert min(by_token[prompt - 1 :]) > -0.1 and max(by_token[: prompt - 1]) < -1


class Crash(Exception):
    pass


@pytest.mark.parametrize("lora", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(make_palm, tmp_path, monkeypatch, lora):
    def run(name, seed=0):
        torch.manual_seed(0)
        start = make_palm(num_tokens=TOKENIZER.num_tokens)
        torch.manual_seed(seed)
        options = replace(OPTIONS, lora=lora, dropout=0.2)
        keywords = dict(checkpoint=tmp_path / name, resume=seed > 0)
        history = train_on_demonstrations(
            start, DEMONSTRATIONS, DEMONSTRATIONS[:1], TOKENIZER, options, FIT, **keywords
        )
        return start.state_dict(), [{k: v for k, v in row.items() if k != "steps_per_second"} for row in history]

    whole, expected = run("whole.pt")
    steps = count(1)

    def crashing(*arguments):
        if next(steps) == 5:
            raise Crash
        return response_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "response_loss", crashing)
        with pytest.raises(Crash):
            run("parts.pt")
    parts, found = run("parts.pt", seed=9)
    assert found == expected
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in parts)
