import math
import random
from dataclasses import replace
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from tiny import numbers

from palm_rlhf_pytorch import preference
from palm_rlhf_pytorch.algorithms.dpo import DPO
from palm_rlhf_pytorch.algorithms.kto import KTO
from palm_rlhf_pytorch.data import Labelled, Pair
from palm_rlhf_pytorch.devices import accelerator_on
from palm_rlhf_pytorch.fine_tuning import SCOPE, TuningOptions, all_response_sums, response_sums
from palm_rlhf_pytorch.preference import answers_loss, reference_log_probs, train_on_answers
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PAIRS = [Pair("the", " end", " beginning of it"), Pair("", "yes", "n"), Pair("a longer prompt", "", " no")]
LABELLED = [Labelled("the", " end", True), Labelled("so", " what is it", False), Labelled("", "yes", True)]
OPTIONS = TuningOptions(max_len=16, batch_size=4, lora_r=4)
FIT = FitOptions(steps=6, lr=1e-2, warmup=0, log_every=2, eval_every=3, save_every=3)


@pytest.fixture
def palm(make_palm):
    return make_palm(num_tokens=TOKENIZER.num_tokens, ff_dropout=0.1)


def rows_of(items, objective, max_len=16):
    first, second, labels = objective.answers(items, TOKENIZER, max_len)
    return [*first, *second], labels


def batch_of(items, objective, palm, max_len=16):
    """All items in a batch, with a reference that is not the policy."""
    rows, labels = rows_of(items, objective, max_len)
    ids, mask, prompt_mask = preference.collate(rows, TOKENIZER.pad_id)
    reference = all_response_sums(palm, rows, TOKENIZER.pad_id, 8).view(2, -1)
    return ids, mask & ~prompt_mask, reference + torch.linspace(-1, 1, reference.numel()).view_as(reference), labels


# log-probs


def test_a_response_is_summed_over_its_own_tokens(palm):
    rows, _ = rows_of(PAIRS, DPO())
    found = all_response_sums(palm, rows, TOKENIZER.pad_id, 2)
    for (ids, prompt), total in zip(rows, found.tolist(), strict=True):
        log_probs = palm(torch.tensor([ids]))[0].log_softmax(dim=-1)
        by_hand = sum(log_probs[t - 1, ids[t]].item() for t in range(prompt, len(ids)))
        assert total == pytest.approx(by_hand, rel=1e-5)


def test_a_response_is_the_cross_entropy_of_its_tokens(palm):
    ids, prompt = rows_of(PAIRS, DPO())[0][0]
    x = torch.tensor([ids])
    targets = x[:, 1:].masked_fill(torch.arange(1, len(ids)) < prompt, -100)
    total = F.cross_entropy(palm(x)[0, :-1], targets[0], reduction="sum")
    mask = torch.arange(len(ids))[None] >= prompt
    assert response_sums(palm, x, mask).item() == pytest.approx(-total.item(), rel=1e-5)


@pytest.mark.parametrize("objective, items", [(DPO(), PAIRS), (DPO(loss="simpo"), PAIRS), (KTO(), LABELLED)])
def test_padding_changes_nothing(palm, objective, items):
    palm.requires_grad_(True)
    ids, mask, reference, labels = batch_of(items, objective, palm)

    def loss_and_gradient(ids, mask):
        palm.zero_grad()
        loss, _ = answers_loss(palm, objective, (ids, mask, reference, labels))
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in palm.parameters()]

    loss, gradient = loss_and_gradient(ids, mask)
    wide, wide_gradient = loss_and_gradient(F.pad(ids, (0, 5), value=7), F.pad(mask, (0, 5)))
    torch.testing.assert_close((loss, gradient), (wide, wide_gradient), rtol=1e-4, atol=1e-6)
    # and each item's alone, without any
    ends = [int(row.nonzero().max()) + 1 for row in mask]
    sums = [response_sums(palm, ids[i : i + 1, :end], mask[i : i + 1, :end]) for i, end in enumerate(ends)]
    alone, _ = objective(torch.cat(sums).view(2, -1), reference, mask.sum(dim=-1).view(2, -1), labels)
    torch.testing.assert_close(loss, alone.mean().detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective, items, expected", [(DPO(), PAIRS, math.log(2)), (KTO(), LABELLED, 0.5)])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.filterwarnings("ignore:the policy's PaLM has causal=False")
def test_the_first_loss_is_that_of_the_reference(palm, objective, items, expected, lora, causal):
    palm.set_causal(causal)  # it is made causal before the reference reads
    options = replace(OPTIONS, lora=lora)
    history = train_on_answers(palm, items, [], TOKENIZER, options, replace(FIT, steps=1, lr=0.0), objective=objective)
    assert history[0]["loss"] == pytest.approx(expected, abs=1e-5)  # dropout is off, too
    assert not [name for name in history[0] if name.startswith("held_out")]


@pytest.mark.parametrize("objective, items", [(DPO(), PAIRS), (KTO(), LABELLED)])
def test_only_places_before_response_tokens_get_gradient(palm, objective, items):
    kept = []
    handle = palm.norm.register_forward_hook(lambda *made: kept.append(made[2]))
    batch = batch_of(items, objective, palm)
    kept.clear()
    palm.requires_grad_(True)
    loss, _ = answers_loss(palm, objective, batch)
    handle.remove()
    embeds = kept[-1]  # of all rows, or of KTO's own responses; the others keep nothing for a backward pass
    assert not any(other.requires_grad for other in kept[:-1]) and len(kept) == (1 if objective.both_learn else 2)
    (gradient,) = torch.autograd.grad(loss, embeds)
    assert torch.equal(gradient.abs().sum(dim=-1) > 0, batch[1][: len(embeds), 1:])


def test_mismatched_responses_get_no_gradient(palm):
    palm.requires_grad_(True)
    ids, mask, reference, labels = batch_of(LABELLED, KTO(), palm)
    answers_loss(palm, KTO(), (ids, mask, reference, labels))[0].backward()
    whole = [p.grad.clone() for p in palm.parameters()]
    palm.zero_grad()
    with torch.no_grad():
        measured = response_sums(palm, ids[3:], mask[3:])
    own = response_sums(palm, ids[:3], mask[:3])
    KTO()(torch.stack((own, measured)), reference, torch.ones(2, 3), labels)[0].mean().backward()
    torch.testing.assert_close([p.grad for p in palm.parameters()], whole)


# the reference


class Asked(Exception):
    pass


def ask(*arguments, **keywords):
    raise Asked


def test_reference_log_probs_are_computed_once(palm, tmp_path, monkeypatch, capsys):
    rows, _ = rows_of(PAIRS, DPO())
    cache = tmp_path / "run" / "reference.safetensors"
    first = reference_log_probs(palm, rows, TOKENIZER.pad_id, 2, cache)
    assert "reference: 100%" in capsys.readouterr().err and cache.is_file()
    torch.testing.assert_close(first, all_response_sums(palm, rows, TOKENIZER.pad_id, 8))
    monkeypatch.setattr(preference, "all_response_sums", ask)
    assert torch.equal(reference_log_probs(palm, rows, TOKENIZER.pad_id, 4, cache), first)
    palm.add_finetune_params("other")  # adapters are not the reference's
    assert torch.equal(reference_log_probs(palm, rows, TOKENIZER.pad_id, 4, cache), first)


@pytest.mark.parametrize("change", ["weights", "rows", "prompt", "model", "precision", "truncated", "other file"])
def test_a_cache_that_does_not_match_is_computed_again(palm, tmp_path, said, change):
    rows, _ = rows_of(PAIRS, DPO())
    cache = tmp_path / "reference.safetensors"
    before = reference_log_probs(palm, rows, TOKENIZER.pad_id, 8, cache)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=change == "precision")
    if change == "weights":
        with torch.no_grad():
            palm.layers[0].fn.attn_out.weight[0, 0] += 1
    elif change == "rows":
        rows[0][0][1] += 1
    elif change == "prompt":
        rows[0] = (rows[0][0], rows[0][1] + 1)
    elif change == "model":
        palm.logit_scale = palm.config["logit_scale"] = 0.5
    elif change == "truncated":
        cache.write_bytes(cache.read_bytes()[:-3])
    elif change == "other file":
        palm.save(cache)
    with autocast:
        found = reference_log_probs(palm, rows, TOKENIZER.pad_id, 8, cache)
        expected = all_response_sums(palm, rows, TOKENIZER.pad_id, 8)
    assert torch.equal(found, expected) and torch.equal(found, before) is (change in ("truncated", "other file"))
    assert len(said()) == 1 and "are computed again" in said()[0]
    with autocast:
        assert torch.equal(reference_log_probs(palm, rows, TOKENIZER.pad_id, 8, cache), found)
    assert len(said()) == 1  # it is kept


@pytest.mark.parametrize("lora", [True, False])
def test_training_holds_no_reference_pass(palm, lora, monkeypatch):
    calls = count()
    monkeypatch.setattr(preference, "response_sums", lambda *arguments: next(calls) * 0 + response_sums(*arguments))
    asked = []
    monkeypatch.setattr(
        preference,
        "all_response_sums",
        lambda *arguments, **keywords: asked.append(1) or all_response_sums(*arguments, **keywords),
    )
    train_on_answers(palm, PAIRS, [], TOKENIZER, replace(OPTIONS, lora=lora), FIT, objective=DPO())
    assert next(calls) == FIT.steps and len(asked) == 1
    train_on_answers(palm, PAIRS, [], TOKENIZER, replace(OPTIONS, lora=lora), FIT, objective=DPO(loss="simpo"))
    assert len(asked) == 1


def test_reduced_precision_starts_at_ln_2_too(palm):
    history = train_on_answers(
        palm, PAIRS[:1], [], TOKENIZER, OPTIONS, replace(FIT, steps=1, lr=0.0), objective=DPO(),
        accelerator=accelerator_on(torch.device("cpu"), "bf16"),
    )  # fmt: skip
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


# training


def choices(amount=40):
    """The chosen begin with a, the rejected with b."""
    rng = random.Random(1)
    return [Pair(rng.choice("pq"), "a" + "x" * rng.randrange(4), "b" + "x" * rng.randrange(4)) for _ in range(amount)]


@pytest.mark.parametrize(
    "objective, lora",
    [(DPO(), True), (DPO(label_smoothing=0.1), False), (DPO(loss="ipo"), True), (DPO(loss="simpo"), True)],
)
def test_choices_are_learned(palm, objective, lora):
    pairs, fit = choices(), replace(FIT, steps=40, log_every=10, eval_every=40)
    trunk = palm.token_emb.weight.clone()
    history = train_on_answers(
        palm, pairs[8:], pairs[:8], TOKENIZER, replace(OPTIONS, lora=lora, batch_size=16), fit, objective=objective
    )
    assert history[-1]["held_out_accuracy"] == history[-1]["accuracy"] == 1.0
    assert history[-1]["held_out_loss"] < history[0]["loss"] and history[-1]["margin"] > history[0]["margin"]
    # a plain model comes out, which is the policy
    assert not palm.finetune_modules and all(p.requires_grad for p in palm.parameters())
    assert torch.equal(palm.token_emb.weight, trunk) is lora
    rows, _ = rows_of(pairs[:8], objective)
    chosen, _ = all_response_sums(palm, rows, TOKENIZER.pad_id, 8).view(2, -1)
    assert chosen.mean().item() == pytest.approx(history[-1]["held_out_chosen_log_prob"], rel=1e-4)


def test_labels_are_learned(palm):
    rng = random.Random(0)
    kinds = [rng.choice("ab") for _ in range(48)]
    responses = [Labelled(rng.choice("pq"), kind + "x" * rng.randrange(4), kind == "a") for kind in kinds]
    fit = replace(FIT, steps=40, log_every=1, eval_every=40)
    history = train_on_answers(
        palm, responses[8:], responses[:8], TOKENIZER, replace(OPTIONS, batch_size=16), fit, objective=KTO(beta=0.5)
    )
    assert history[-1]["held_out_loss"] < 0.35 < history[0]["loss"] == pytest.approx(0.5)
    assert history[-1]["held_out_desirable_reward"] > 0 > history[-1]["held_out_undesirable_reward"]
    assert history[-1]["held_out_accuracy"] > 0.8


def test_held_out_numbers_by_hand(palm):
    pairs = [Pair("p", "ab", "c"), Pair("q", "d", "efg"), Pair("", "h", "i")]
    rows, _ = rows_of(pairs, DPO(loss="simpo"))
    by_token = [total / (len(ids) - prompt) for total, (ids, prompt) in
                zip(all_response_sums(palm, rows, TOKENIZER.pad_id, 8).tolist(), rows, strict=True)]  # fmt: skip
    margins = [2.0 * (by_token[i] - by_token[i + 3]) for i in range(3)]
    history = train_on_answers(
        palm, PAIRS, pairs, TOKENIZER, OPTIONS, replace(FIT, steps=1, lr=0.0), objective=DPO(loss="simpo", gamma=0.0)
    )
    assert history[-1]["held_out_margin"] == pytest.approx(sum(margins) / 3, abs=1e-4)
    assert history[-1]["held_out_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)
    loss = sum(math.log1p(math.exp(-m)) for m in margins) / 3
    assert history[-1]["held_out_loss"] == pytest.approx(loss, rel=1e-4)


# going on


class Crash(Exception):
    pass


@pytest.mark.parametrize(
    "objective, items, lora", [(DPO(), choices(12), True), (DPO(), choices(12), False), (KTO(), LABELLED * 4, True)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(make_palm, tmp_path, monkeypatch, objective, items, lora):
    options = replace(OPTIONS, lora=lora, dropout=0.2)

    def run(directory, seed=0):
        torch.manual_seed(0)
        start = make_palm(num_tokens=TOKENIZER.num_tokens)
        torch.manual_seed(seed)
        history = train_on_answers(
            start, items[3:], items[:3], TOKENIZER, options, FIT, objective=objective,
            cache=directory / "reference.safetensors", checkpoint=directory / "state.pt", resume=seed > 0,
        )  # fmt: skip
        return start.state_dict(), numbers(history)

    whole, expected = run(tmp_path / "whole")
    steps = count(1)

    def crashing(*arguments):
        if next(steps) == 5:
            raise Crash
        return answers_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preference, "answers_loss", crashing)
        with pytest.raises(Crash):
            run(tmp_path / "parts")
    with monkeypatch.context() as patch:  # the reference is known already
        patch.setattr(preference, "reference_log_probs", during_a_pass(patch))
        parts, found = run(tmp_path / "parts", seed=9)
    assert found == expected
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in parts)
    assert SCOPE not in "".join(parts)


def during_a_pass(patch):
    """`reference_log_probs`, in which no model may be asked."""

    def found(*arguments):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(preference, "all_response_sums", ask)
            return reference_log_probs(*arguments)

    return found
