import itertools
from contextlib import contextmanager

import pytest
import torch

from palm_rlhf_pytorch import decoder, generation, ops
from palm_rlhf_pytorch.lora import LoRA
from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.native_draw import Kept
from palm_rlhf_pytorch.utils import top_k, top_p

RAGGED = torch.tensor([[3, 5, 7, 1, 9], [4, 2, 0, 0, 0], [8, 8, 6, 11, 0]])
LENGTHS = torch.tensor([5, 2, 4])


@torch.no_grad()
def greedy(model, prompt: list[int], max_len: int, eos: tuple[int, ...] = (), **keywords) -> list[int]:
    """The response, the plain way: the whole sequence through the model for every token, one row at a time."""
    sequence = list(prompt)
    while len(sequence) < max(max_len, len(prompt) + 1):
        sequence.append(int(model(torch.tensor([sequence]), **keywords)[0, -1].argmax()))
        if sequence[-1] in eos:
            break
    return sequence[len(prompt) :]


def ragged_prompts() -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(RAGGED, LENGTHS, strict=True)]


def padded(rows: list[list[int]], pad: int) -> list[list[int]]:
    longest = max(map(len, rows))
    return [row + [pad] * (longest - len(row)) for row in rows]


# shapes and lengths


@pytest.mark.parametrize("seq_len, drawn", [(9, 4), (6, 1), (5, 1), (2, 1), (0, 1)])
def test_seq_len_counts_the_prompt_and_one_token_at_least_is_drawn(make_palm, seq_len, drawn):
    model, prompt = make_palm(), torch.randint(0, 17, (2, 5))
    assert model.generate(seq_len, prompt).shape == (2, drawn)
    whole = model.generate(seq_len, prompt, return_seq_without_prompt=False)
    assert whole.shape == (2, 5 + drawn) and torch.equal(whole[:, :5], prompt)


def test_prompts_of_any_shape(make_palm):
    model = make_palm()
    prompt = torch.randint(0, 17, (2, 3, 5))
    out = model.generate(9, prompt, temperature=0.0)
    assert out.shape == (2, 3, 4)
    one = model.generate(9, prompt[1, 2], temperature=0.0)
    assert one.shape == (4,) and torch.equal(one, out[1, 2])
    ragged = model.generate(9, prompt, temperature=0.0, prompt_lengths=torch.tensor([[5, 5, 5], [5, 5, 3]]))
    assert torch.equal(ragged[0, :, :4], out[0])
    assert ragged[1, 2].tolist() == greedy(model, prompt[1, 2, :3].tolist(), 9)


def test_without_a_prompt_a_random_token_starts_and_is_returned(make_palm):
    model = make_palm()
    out = model.generate(12)
    assert out.shape == (1, 12)
    assert len({model.generate(2, seed=seed)[0, 0].item() for seed in range(30)}) > 5
    assert out[0, 1:].ge(0).all() and out.lt(17).all()


# greedy, ragged, EOS


@pytest.mark.parametrize(
    "keywords", [{}, {"use_xpos": False}, {"kv_heads": 2}, {"qk_rmsnorm": True}, {"rotary_xpos_scale_base": 4}]
)
def test_ragged_greedy_is_each_row_alone(make_palm, keywords):
    model = make_palm(**keywords)
    expected = [greedy(model, prompt, 20) for prompt in ragged_prompts()]
    assert len({token for row in expected for token in row}) > 3  # not one token for ever
    out = model.generate(20, RAGGED, temperature=0.0, prompt_lengths=LENGTHS, pad_value=16)
    assert out.tolist() == padded(expected, 16)
    garbage = torch.where(torch.arange(5) < LENGTHS[:, None], RAGGED, -7)  # nobody reads what is behind a prompt
    assert torch.equal(model.generate(20, garbage, temperature=0.0, prompt_lengths=LENGTHS, pad_value=16), out)
    whole = model.generate(
        20, RAGGED, temperature=0.0, prompt_lengths=LENGTHS, pad_value=16, return_seq_without_prompt=False
    )
    assert whole.tolist() == padded([p + r for p, r in zip(ragged_prompts(), expected, strict=True)], 16)


def test_rows_end_with_their_eos_and_padding_follows(make_palm):
    model = make_palm()
    free = [greedy(model, prompt, 20) for prompt in ragged_prompts()]
    for eos in itertools.chain({t for row in free for t in row}, [(free[0][2], free[1][4])]):
        several = eos if isinstance(eos, tuple) else (eos,)
        expected = [greedy(model, prompt, 20, several) for prompt in ragged_prompts()]
        out = model.generate(20, RAGGED, temperature=0.0, prompt_lengths=LENGTHS, eos_token=eos, pad_value=15)
        assert out.tolist() == padded(expected, 15)
    tensor = torch.tensor(several)
    assert torch.equal(
        model.generate(20, RAGGED, temperature=0.0, prompt_lengths=LENGTHS, eos_token=tensor, pad_value=15), out
    )


def test_what_stood_behind_a_short_prompt_is_not_returned(make_palm):
    model = make_palm()
    prompts, lengths = torch.tensor([[3, 5, 7, 1, 9], [4, 2, 13, 13, 13]]), torch.tensor([5, 2])
    eos = greedy(model, [4, 2], 9)[0]
    whole = model.generate(
        9,
        prompts,
        temperature=0.0,
        prompt_lengths=lengths,
        eos_token=eos,
        pad_value=16,
        return_seq_without_prompt=False,
    )
    assert whole[1, :3].tolist() == [4, 2, eos] and (whole[1, 3:] == 16).all() and whole.shape[1] > 5


def test_eos_in_the_prompt_ends_nothing_and_stays_out_of_the_response_mask(make_palm):
    model = make_palm()
    eos = 8  # twice in the third prompt
    expected = [greedy(model, prompt, 12, (eos,)) for prompt in ragged_prompts()]
    assert len(expected[2]) > 1
    out = model.generate(
        12, RAGGED, temperature=0.0, prompt_lengths=LENGTHS, eos_token=eos, return_log_probs=True, pad_value=eos
    )
    assert out.responses(eos).tolist() == padded(expected, eos)
    assert out.response_mask.sum(dim=-1).tolist() == [len(row) for row in expected]
    assert torch.equal(out.prompt_mask.sum(dim=-1), LENGTHS)
    assert not (out.prompt_mask & out.response_mask).any()


def test_eos_that_is_also_the_padding_stays_in_the_mask_once(make_palm):
    model = make_palm()
    free = greedy(model, [3, 5], 12)
    eos = free[3]
    out = model.generate(
        12, torch.tensor([[3, 5]]), temperature=0.0, eos_token=eos, pad_value=eos, return_log_probs=True
    )
    assert out.sequence[out.mask].tolist() == [3, 5, *free[: free.index(eos) + 1]]


def test_rows_that_ended_are_computed_no_more(make_palm):
    model = make_palm()
    free = [greedy(model, prompt, 20) for prompt in ragged_prompts()]
    eos = tuple({free[0][1], free[1][6]})
    lengths = [len(greedy(model, prompt, 20, eos)) for prompt in ragged_prompts()]
    assert len(set(lengths)) > 1
    seen = []
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    model.generate(20, RAGGED, temperature=0.0, prompt_lengths=LENGTHS, eos_token=eos)
    expected = [(sum(length > step for length in lengths), 1) for step in range(max(lengths))]
    assert seen == [(3, 4), *expected]  # all but the last tokens of the prompts; no pass after the last token drawn


# sampling


FILTERS = {
    "reference's default": ({}, lambda logits, t: top_k(logits, 0.9) / t),
    "reference's top_k": ({"filter_thres": 0.5}, lambda logits, t: top_k(logits, 0.5) / t),
    "reference's top_p": (
        {"filter_logits_fn": top_p, "filter_thres": 0.4},
        lambda logits, t: top_p(logits, 0.4) / t,
    ),
    "top_k": (
        {"top_k": 3},
        lambda logits, t: (logits / t).masked_fill(logits < logits.topk(3).values[..., -1:], -torch.inf),
    ),
    "top_p": ({"top_p": 0.8}, lambda logits, t: usual_top_p(logits / t, 0.8)),
    "nothing": ({"filter_logits_fn": None}, lambda logits, t: logits / t),
    "the whole mass": ({"top_p": 1.0}, lambda logits, t: logits / t),
}


def usual_top_p(logits, p):
    """Holtzman et al.: likeliest first, until their probabilities reach p."""
    out = torch.full_like(logits, -torch.inf)
    flat, flat_out = logits.reshape(-1, logits.shape[-1]), out.view(-1, logits.shape[-1])
    for row, row_out in zip(flat, flat_out, strict=True):
        mass = 0.0
        for token in row.argsort(descending=True).tolist():
            row_out[token] = row[token]
            mass += row.softmax(-1)[token].item()
            if mass >= p:
                break
    return out


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", FILTERS)
def test_log_probs_are_of_the_distribution_sampled_from(make_palm, name, temperature):
    model = make_palm()
    keywords, shape = FILTERS[name]
    out = model.generate(
        14,
        RAGGED.repeat(4, 1),
        temperature,
        prompt_lengths=LENGTHS.repeat(4),
        return_log_probs=True,
        eos_token=2,
        **keywords,
    )
    expected = shape(model(out.sequence)[:, :-1], temperature).log_softmax(-1)
    expected = expected.gather(-1, out.sequence[:, 1:, None]).squeeze(-1)
    follows = out.response_mask[:, 1:]
    assert expected[follows].isfinite().all()
    torch.testing.assert_close(out.log_probs[:, 1:][follows], expected[follows], atol=1e-4, rtol=1e-4)
    assert (out.log_probs[~out.response_mask] == 0).all() and out.log_probs.dtype == torch.float32


def test_greedy_log_probs_are_the_models(make_palm):
    model = make_palm()
    out = model.generate(9, RAGGED[:1], temperature=0.0, return_log_probs=True, filter_logits_fn=None)
    expected = model(out.sequence).log_softmax(-1)[0, 4:-1].max(dim=-1).values
    torch.testing.assert_close(out.log_probs[0, 5:], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["reference's top_k", "top_k", "top_p", "nothing"])
def test_frequencies_follow_the_log_probs(make_palm, name):
    model, draws = make_palm(), 6000
    keywords, shape = FILTERS[name]
    prompt = torch.tensor([4, 9, 1])
    probs = shape(model(prompt[None])[:, -1], 2.0).softmax(-1)[0]
    out = model.generate(4, prompt.expand(draws, -1), temperature=2.0, return_log_probs=True, seed=1, **keywords)
    tokens = out.sequence[:, 3]
    torch.testing.assert_close(out.log_probs[:, 3].exp(), probs[tokens], atol=1e-5, rtol=1e-4)
    count, expected = torch.bincount(tokens, minlength=17), probs * draws
    assert (count[probs == 0] == 0).all()
    common = expected > 5
    freedom = int(common.sum()) - 1
    chi_square = ((count - expected) ** 2 / expected)[common].sum()
    assert freedom >= 2 and chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_sampling_of_several_steps_follows_the_joint_distribution(make_palm):
    # sequences of two tokens: the second is conditioned on the first that was drawn in its own row
    model, draws = make_palm(num_tokens=3), 6000
    prompt = torch.tensor([[1, 0]])
    first = model(prompt)[0, -1].softmax(-1)
    seconds = torch.stack([model(torch.tensor([[1, 0, token]]))[0, -1].softmax(-1) for token in range(3)])
    expected = (first[:, None] * seconds).flatten() * draws
    out = model.generate(4, prompt.expand(draws, -1), filter_logits_fn=None, seed=0)
    count = torch.bincount(out[:, 0] * 3 + out[:, 1], minlength=9)
    common = expected > 5
    assert ((count - expected) ** 2 / expected)[common].sum() < 30 and common.sum() >= 4


def test_seeds_reproduce_and_leave_the_global_state_alone(make_palm):
    model = make_palm()
    state = torch.get_rng_state()
    one, two, three = (model.generate(40, RAGGED, filter_logits_fn=None, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(torch.get_rng_state(), state)
    again = model.generate(40, RAGGED, filter_logits_fn=None, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, again)
    torch.manual_seed(5)
    free = model.generate(40, RAGGED, filter_logits_fn=None)
    torch.manual_seed(5)
    assert torch.equal(free, model.generate(40, RAGGED, filter_logits_fn=None))


def test_generation_runs_in_eval_mode_without_gradient_and_puts_the_mode_back(make_palm):
    model = make_palm(attn_dropout=0.9, ff_dropout=0.9)
    expected = model.generate(12, RAGGED, temperature=0.0)
    out = model.train().generate(12, RAGGED, temperature=0.0, return_log_probs=True)
    assert model.training and not out.log_probs.requires_grad
    assert torch.equal(out.responses(0), expected)


def test_the_whole_works_in_bfloat16(make_palm):
    out = make_palm().bfloat16().generate(12, RAGGED, prompt_lengths=LENGTHS, return_log_probs=True)
    assert out.log_probs.isfinite().all() and out.log_probs.dtype == torch.float32


# streaming


@pytest.mark.parametrize(
    "keywords", [{"temperature": 0.0}, {}, {"top_k": 4}, {"top_p": 0.9}, {"filter_logits_fn": None}]
)
def test_stream_yields_the_tokens_of_generate(make_palm, keywords):
    model = make_palm(finetune_scopes=["a"]).train()
    both = dict(prompt_lengths=LENGTHS, eos_token=5, seed=3, pad_value=16, finetune_scope="a", **keywords)
    expected = model.generate(30, RAGGED, **both)
    streamed = []
    for tokens in model.stream(30, RAGGED, **both):
        streamed.append(tokens)
        assert tokens.shape == (3,)
    rows = [torch.stack(streamed)[:, i].tolist() for i in range(3)]
    # ragged rows begin together, so the i-th tokens drawn come together
    assert rows == expected.tolist()
    assert model.training


def test_stream_comes_token_by_token_and_may_be_left(make_palm):
    model = make_palm().train()
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    stream = model.stream(10**6, torch.tensor([1, 2]))
    first = next(stream)
    assert first.shape == () and len(calls) == 2
    next(stream)
    assert len(calls) == 3
    stream.close()
    assert model.training


# adapters


def test_lora_is_merged_for_the_length_of_the_call(make_palm, monkeypatch):
    model = make_palm(finetune_scopes=["a"])
    expected = [greedy(model, prompt, 15, finetune_scope="a") for prompt in ragged_prompts()]
    base = [greedy(model, prompt, 15) for prompt in ragged_prompts()]
    assert expected != base
    weights = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(LoRA, "forward", None)  # merged: no adapter is called
    out = model.generate(15, RAGGED, temperature=0.0, prompt_lengths=LENGTHS, finetune_scope="a")
    assert out.tolist() == padded(expected, 0)
    assert all(map(torch.equal, weights, model.parameters()))
    disabled = model.generate(15, RAGGED, 0.0, prompt_lengths=LENGTHS, finetune_scope="a", disable_lora=True)
    assert disabled.tolist() == padded(base, 0)


def test_weights_and_mode_come_back_after_an_exception(make_palm):
    model = make_palm(finetune_scopes=["a"]).train()
    weights = [p.clone() for p in model.parameters()]
    merged = []

    def fail(logits, thres):
        merged.append(torch.equal(weights[1], list(model.parameters())[1]))
        if len(merged) == 3:
            raise ZeroDivisionError
        return logits

    with pytest.raises(ZeroDivisionError):
        model.generate(15, RAGGED, filter_logits_fn=fail, finetune_scope="a")
    assert all(map(torch.equal, weights, model.parameters())) and model.training


# batches that are bounded


MANY = torch.tensor([9, 1, 4, 14, 2, 4, 13])  # lengths of MANY_PROMPTS
MANY_PROMPTS = torch.arange(7 * 14).reshape(7, 14) * 5 % 17


def many(model, **keywords):
    return model.generate(
        24, MANY_PROMPTS, 0.0, prompt_lengths=MANY, return_log_probs=True, filter_logits_fn=None, **keywords
    )


def some_eos(model) -> list[int]:
    """Ends that some rows meet early, some late, some never."""
    free = many(model).sequence
    eos = [int(free[row, MANY[row] + k]) for row, k in ((0, 2), (5, 7))]
    lengths = many(model, eos_token=eos).response_mask.sum(-1)
    assert len(lengths.unique()) > 3 and 1 < lengths.min() + 1 < lengths.max()
    return eos


def assert_same(one, two):
    assert torch.equal(one.sequence, two.sequence) and torch.equal(one.response_mask, two.response_mask)
    assert torch.equal(one.prompt_mask, two.prompt_mask)
    torch.testing.assert_close(one.log_probs, two.log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 7, 100])
def test_a_bounded_batch_gives_what_one_batch_gives(make_palm, max_batch, ends):
    model = make_palm()
    eos = some_eos(model) if ends else None
    prompts = [row[:n].tolist() for row, n in zip(MANY_PROMPTS, MANY, strict=True)]
    expected = [greedy(model, prompt, 24, tuple(eos or ())) for prompt in prompts]
    whole = many(model, eos_token=eos, pad_value=3)
    assert whole.responses(3).tolist() == padded(expected, 3)

    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    for how in ("auto", "plain"):
        assert_same(many(model, eos_token=eos, pad_value=3, max_batch=max_batch, decoder=how), whole)
    assert max(rows for rows, _ in seen) == min(max_batch, 7)


@pytest.mark.parametrize("write_every", [1, 5])
@pytest.mark.parametrize("max_batch", [None, 3])
def test_how_often_answers_are_written_changes_nothing(make_palm, monkeypatch, max_batch, write_every):
    model = make_palm()
    eos, held, add = some_eos(model), [], generation.Answers.add
    whole = many(model, eos_token=eos, pad_value=3)
    monkeypatch.setattr(generation, "WRITE_EVERY", write_every)
    monkeypatch.setattr(generation.Answers, "add", lambda self, step: held.append((add(self, step), len(self.steps))))
    assert_same(many(model, eos_token=eos, pad_value=3, max_batch=max_batch), whole)
    assert max(steps for _, steps in held) == write_every - 1  # and no more is kept


def test_a_place_is_not_empty_for_long(make_palm):
    model = make_palm()
    eos = some_eos(model)
    drawn = [
        (step.rows.tolist(), step.ended)
        for step in generation.decode(
            model, MANY_PROMPTS, MANY, MANY + 4, generation.Sampling(0.0), max_batch=4, eos_token=eos
        )
    ]
    waiting = [7 - len(rows) - ended for rows, ended in drawn]
    assert waiting[0] == 3 and waiting[-1] == 0 and sorted(waiting, reverse=True) == waiting
    assert all(len(rows) == 4 for (rows, _), left in zip(drawn, waiting, strict=True) if left)
    assert drawn[0][0] == [3, 6, 0, 2]  # the longest prompts first


def test_prompts_come_when_a_quarter_of_the_batch_is_free(make_palm):
    limits = torch.tensor([3, 4, 5, 6, 7, 8, 9, 10, 4, 4])
    steps = generation.decode(
        make_palm(),
        torch.ones(10, 1, dtype=torch.long),
        torch.ones_like(limits),
        limits,
        generation.Sampling(0.0),
        max_batch=8,
    )
    sizes = [step.rows.numel() for step in steps]
    assert sizes[:5] == [8, 8, 7, 8, 7]  # one place is not worth a pass of its own, two are


def test_prompts_are_read_with_others_of_like_length(make_palm, monkeypatch):
    monkeypatch.setitem(ops.LEAST_TOKENS, "cpu", 1)
    model, seen = make_palm(), []
    expected = many(model)
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    assert_same(many(model), expected)
    assert seen[: seen.index((7, 1))] == [(2, 13), (1, 8), (2, 3), (1, 1)]  # the prompt of one token has no pass
    seen.clear()
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 20)
    assert_same(many(model), expected)
    assert seen[:2] == [(1, 13), (1, 12)]


@pytest.mark.parametrize("keywords", [{}, {"use_xpos": True}, {"sliding_window": 4, "global_layers": (1,)}])
@pytest.mark.parametrize("max_batch", [None, 5, 8])
def test_copies_of_a_prompt_are_read_once(make_palm, monkeypatch, max_batch, keywords):
    model, seen = make_palm(**keywords), []
    how = dict(filter_logits_fn=None, seed=3, max_batch=max_batch, return_log_probs=True)
    # what is read of the second is that of the third and a 0, which stands for padding elsewhere: the lengths tell
    prompts = torch.tensor([[5, 1, 2, 3], [5, 0, 8, 9], [5, 7, 9, 9], [7, 7, 7, 7]])
    lengths = torch.tensor([4, 3, 2, 4])
    prompts, lengths = generation.repeat_prompts(prompts, lengths, 3)
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    found = model.generate(12, prompts, prompt_lengths=lengths, **how)
    if max_batch is None:
        assert seen[0] == (4, 3)
    monkeypatch.setattr(generation, "first_of_copies", lambda rows: (torch.arange(len(rows)),) * 2)
    assert_same(found, model.generate(12, prompts, prompt_lengths=lengths, **how))
    assert len({tuple(row.tolist()) for row in found.sequence[:3]}) == 3  # each copy draws for itself


@pytest.mark.parametrize("max_batch", [None, 1, 3])
@pytest.mark.parametrize("ends", [True, False])
def test_it_is_told_of_every_row_that_ended(make_palm, max_batch, ends):
    model, heard = make_palm(), []
    eos = some_eos(model) if ends else None
    many(model, eos_token=eos, max_batch=max_batch, on_ended=heard.append)
    assert sum(heard) == 7 and min(heard) > 0 and len(heard) > 1


@pytest.mark.parametrize("first_length", [1, 8, 16])
@pytest.mark.parametrize("max_batch", [None, 2])
def test_prompts_may_be_longer_than_what_is_laid_out_at_first(make_palm, monkeypatch, first_length, max_batch):
    model = make_palm(rotary_xpos_scale_base=6)
    expected = many(model)
    monkeypatch.setattr(decoder, "FIRST_LENGTH", first_length)
    for how in ("plain", "packed"):
        assert_same(many(model, max_batch=max_batch, decoder=how), expected)


# several steps in one call


class Calls(list):
    """How many steps each call of several took."""

    def __init__(self, monkeypatch, pause: float):
        monkeypatch.setattr(generation, "PAUSE", pause)
        plain = decoder.Decoder.draw_ahead

        def counted(self_, *args):
            drawn = plain(self_, *args)
            self.append(len(drawn[0]))
            return drawn

        monkeypatch.setattr(decoder.Decoder, "draw_ahead", counted)


@pytest.fixture
def native_palm(make_palm):
    if library("decode") is None:
        pytest.skip("there is no C++ compiler to be found")
    return make_palm(dim_head=16)


@pytest.mark.parametrize("temperature, seed", [(0.0, 0), (1.0, 0), (0.8, None)])
@pytest.mark.parametrize("max_batch", [None, 3])
@pytest.mark.parametrize("ends", [(), (1, 5)])
def test_steps_taken_together_draw_the_same(native_palm, monkeypatch, temperature, seed, max_batch, ends):
    how = dict(temperature=temperature, seed=seed, max_batch=max_batch, eos_token=list(ends) or None)
    how |= dict(prompt_lengths=MANY, return_log_probs=True)
    found = []
    for pause in (0.0, 10.0):
        calls = Calls(monkeypatch, pause)
        torch.manual_seed(5)
        drawn = native_palm.generate(40, MANY_PROMPTS, **how)
        found.append((*(getattr(drawn, name) for name in ("sequence", "response_mask", "log_probs")), torch.rand(3)))
        monkeypatch.undo()
        assert bool(calls) == bool(pause)
    assert all(map(torch.equal, *found))
    assert sum(calls) > 2 * len(calls) or ends


def test_steps_are_taken_together_as_far_as_the_pause_allows_and_no_row_ends(native_palm, monkeypatch):
    prompts, limit = torch.tensor([[1, 2, 3], [4, 5, 6]]), 24
    calls = Calls(monkeypatch, 10.0)
    steps = []
    native_palm.generate(limit, prompts, temperature=0.0, on_ended=steps.append)
    assert calls == [limit - 3 - 1] and steps == [2]  # the first one is alone
    calls = Calls(monkeypatch, 10.0)
    monkeypatch.setattr(generation, "MOST_AHEAD", 8)
    native_palm.generate(limit, prompts, temperature=0.0)
    assert calls == [8, 8, 4]


def test_room_is_made_for_steps_taken_together(native_palm, monkeypatch):
    prompts, expected = torch.tensor([[1, 2, 3], [4, 5, 6]]), []
    for first_length in (4096, 5):
        monkeypatch.setattr(decoder, "FIRST_LENGTH", first_length)
        calls = Calls(monkeypatch, 10.0)
        expected.append(native_palm.generate(40, prompts, temperature=0.0))
        assert len(calls) == 1
    assert torch.equal(*expected)


def test_only_the_steps_that_were_taken_count(native_palm):
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    token = native_palm.generate(24, prompts, temperature=0.0)[1, 6].item()
    with decoder.decoder(native_palm, 2, 24, 21, "packed") as ready:
        rows = generation.Rows(native_palm, ready, prompts, torch.tensor([3, 3]), torch.tensor([24, 24]))
        rows.look(2)
        how = 20, Kept(0.0, native_palm.num_tokens), None, torch.tensor([token])
        drawn, _ = ready.draw_ahead(rows.tokens, *how)
        assert len(drawn) < 20 and ready.cache.filled == 2 + len(drawn)
        assert ready.cache.lengths.tolist() == [2 + len(drawn)] * 2


@pytest.mark.parametrize("own", [{"filter_logits_fn": lambda x, thres: x}, {"decoder": "plain"}])
def test_what_cpp_does_not_know_is_done_step_by_step(native_palm, monkeypatch, own):
    calls = Calls(monkeypatch, 10.0)
    native_palm.generate(24, torch.tensor([[1, 2, 3]]), **own)
    assert not calls


def test_streams_hand_over_each_token_when_it_is_drawn(native_palm, monkeypatch):
    calls = Calls(monkeypatch, 10.0)
    tokens = [step.item() for step in native_palm.stream(24, torch.tensor([[1, 2, 3]]), temperature=0.0)]
    assert not calls and tokens == native_palm.generate(24, torch.tensor([1, 2, 3]), temperature=0.0).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_breaks_steps_taken_together_is_named(native_palm, monkeypatch, temperature):
    prompt = torch.tensor([[1, 2, 3], [3, 2, 1]])
    native_palm.to_logits.weight = torch.nn.Parameter(native_palm.to_logits.weight.detach().clone())
    drawn = native_palm.generate(30, prompt, temperature=temperature, seed=0)
    token = next(t for t in drawn[0, 3:].tolist() if t not in (1, 2, 3))
    met = int((drawn == token).any(dim=0).nonzero()[0])
    assert met > 0
    torch.nn.init.constant_(native_palm.token_emb.weight[token : token + 1], torch.nan)
    next_numbers = []
    for pause in (0.0, 10.0):
        monkeypatch.setattr(generation, "PAUSE", pause)
        with torch.random.fork_rng(), pytest.raises(ValueError, match=f"token {met + 2} is drawn from .* not finite"):
            native_palm.generate(30, prompt, temperature=temperature, seed=0)
        torch.manual_seed(0)
        with pytest.raises(ValueError, match="not finite"):
            native_palm.generate(30, prompt, temperature=temperature)
        next_numbers.append(torch.rand(2))
    assert torch.equal(*next_numbers)


def test_numbers_that_others_draw_meanwhile_are_not_drawn_again(native_palm, monkeypatch):
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    monkeypatch.setattr(generation, "PAUSE", 10.0)
    torch.manual_seed(0)
    ends = native_palm.generate(24, prompts)[0, 5].item()
    plain, others = decoder.Decoder.draw_ahead, []

    def beside(self, *args):
        drawn = plain(self, *args)
        others.append(torch.rand(3))
        return drawn

    monkeypatch.setattr(decoder.Decoder, "draw_ahead", beside)
    torch.manual_seed(0)
    native_palm.generate(24, prompts, eos_token=ends)
    later = torch.rand(500)
    assert others and not torch.isin(later, torch.cat(others)).any()


@pytest.mark.parametrize("pause", [0.0, 10.0])
def test_default_devices_decide_nothing(native_palm, monkeypatch, pause):
    prompt = torch.tensor([[1, 2, 3]])
    expected = native_palm.generate(24, prompt, temperature=0.0)
    monkeypatch.setattr(generation, "PAUSE", pause)
    with torch.device("meta"):
        assert torch.equal(native_palm.generate(24, prompt, temperature=0.0), expected)


def test_a_clock_that_stands_still(native_palm, monkeypatch):
    monkeypatch.setattr(generation.time, "perf_counter", lambda: 0.0)
    assert native_palm.generate(24, torch.tensor([[1, 2, 3]])).shape == (1, 21)


# a GPU's way on a CPU: the results are looked at every few steps only


@pytest.fixture
def looking_every(monkeypatch):
    """Look at the results only every so many steps, as on a GPU."""

    def patch(steps: int):
        @contextmanager
        def patched(*args, **kwargs):
            with decoder.decoder(*args, **kwargs) as ready:
                ready.look_every = steps
                yield ready

        monkeypatch.setattr(generation, "decoder", patched)

    return patch


@pytest.mark.parametrize("how", ["plain", "packed"])
@pytest.mark.parametrize("max_batch", [None, 1, 3])
@pytest.mark.parametrize("steps", [2, 16, 40])
def test_rows_that_ended_unseen_leave_no_trace(make_palm, looking_every, steps, max_batch, how):
    model = make_palm()
    for eos in (some_eos(model), None):
        expected = many(model, eos_token=eos, pad_value=3)
        heard = []
        looking_every(steps)
        found = many(model, eos_token=eos, pad_value=3, max_batch=max_batch, decoder=how, on_ended=heard.append)
        assert_same(found, expected)
        assert (found.log_probs[~found.response_mask] == 0).all() and (found.sequence[~found.mask] == 3).all()
        assert sum(heard) == 7
        looking_every(1)


@pytest.mark.parametrize("steps", [2, 16])
def test_a_stream_ends_with_its_last_token_even_so(make_palm, looking_every, steps):
    model = make_palm()
    eos = some_eos(model)
    both = dict(temperature=0.0, prompt_lengths=MANY, eos_token=eos, pad_value=3)
    expected = model.generate(24, MANY_PROMPTS, **both)
    looking_every(steps)
    streamed = torch.stack(list(model.stream(24, MANY_PROMPTS, **both)), dim=-1)
    assert torch.equal(streamed, expected)


# what cannot be answered


@pytest.mark.parametrize(
    "prompt, keywords, error, message",
    [
        (torch.zeros(0, dtype=torch.long), {}, ValueError, "at least one"),
        (torch.zeros(2, 0, dtype=torch.long), {}, ValueError, "at least one"),
        (torch.zeros(0, 3, dtype=torch.long), {}, ValueError, "at least one"),
        (torch.tensor(3), {}, ValueError, r"got shape \(\)"),
        (torch.tensor([[1, 17]]), {}, ValueError, "run from 1 to 17, but the vocabulary has ids 0 to 16"),
        (torch.tensor([[1, -1]]), {}, ValueError, "run from -1 to 1"),
        (torch.tensor([[1.0, 2.0]]), {}, TypeError, "must be integers, got torch.float32"),
        (torch.tensor([[True]]), {}, TypeError, "must be integers, got torch.bool"),
        (RAGGED, {"temperature": -0.5}, ValueError, "temperature must be 0 .* or more, got -0.5"),
        (RAGGED, {"temperature": float("nan")}, ValueError, "temperature"),
        (RAGGED, {"top_k": 0}, ValueError, "top_k counts the tokens to keep"),
        (RAGGED, {"top_p": 0.0}, ValueError, "top_p is the probability mass"),
        (RAGGED, {"top_p": 1.5}, ValueError, "top_p is the probability mass"),
        (RAGGED, {"prompt_lengths": torch.tensor([5, 0, 4])}, ValueError, "every prompt needs at least one token"),
        (RAGGED, {"prompt_lengths": torch.tensor([5, 6, 4])}, ValueError, "a prompt length is 6, but prompts have 5"),
        (RAGGED, {"prompt_lengths": torch.tensor([5, 5])}, ValueError, r"lengths \(b,\) are needed"),
        (RAGGED, {"prompt_lengths": torch.tensor([5.0, 2.0, 4.0])}, ValueError, "integer lengths"),
    ],
)
def test_bad_input_is_refused_at_the_door(make_palm, prompt, keywords, error, message):
    model = make_palm()
    model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    for call in (model.generate, lambda *args, **kwargs: next(model.stream(*args, **kwargs))):
        with pytest.raises(error, match=message) as caught:
            call(12, prompt, **keywords)
        assert "\n" not in str(caught.value)


def test_broken_weights_are_said_to_be_broken(make_palm):
    model = make_palm()
    torch.nn.init.constant_(model.norm.gamma, torch.nan)
    with pytest.raises(ValueError, match="not finite .* its weights are broken"):
        model.generate(12, RAGGED)


@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"seed": 0}, {"seed": 0, "filter_logits_fn": lambda x, thres: x}]
)
@pytest.mark.parametrize("decoder", ["auto", "plain"])
def test_so_are_those_that_break_in_the_middle_of_an_answer(make_palm, decoder, how):
    model = make_palm()
    model.to_logits.weight = torch.nn.Parameter(model.to_logits.weight.detach().clone())
    prompt = torch.tensor([[1, 2, 3]])
    likely = model.generate(30, prompt, decoder=decoder, **how)
    torch.nn.init.constant_(model.token_emb.weight[likely[0, 4] : likely[0, 4] + 1], torch.nan)
    with pytest.raises(ValueError, match="token .* is drawn from logits that are not finite"):
        model.generate(30, prompt, decoder=decoder, **how)


def test_an_encoder_cannot_generate(make_palm):
    with pytest.raises(ValueError, match="encoder"):
        make_palm(causal=False).generate(12, RAGGED)


# helpers


@pytest.mark.parametrize("max_batch", [None, 1, 2])
def test_limits_may_differ_from_row_to_row(make_palm, max_batch):
    model = make_palm()
    rows, ends = {0: [], 1: [], 2: []}, torch.tensor([7, 9, 3])
    for step in generation.decode(model, RAGGED, LENGTHS, ends, generation.Sampling(0.0), max_batch=max_batch):
        for row, position, token in zip(step.rows.tolist(), step.positions.tolist(), step.tokens.tolist(), strict=True):
            assert position == LENGTHS[row] + len(rows[row])
            rows[row].append(token)
    limits = (7, 9, 3)
    assert list(rows.values()) == [greedy(model, p, n) for p, n in zip(ragged_prompts(), limits, strict=True)]


def test_best_of_is_the_argmax_without_padding():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    response = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    sequence = torch.tensor([[1, 2, 3, 4], [5, 0, 6, 0]])
    answer, score = generation.best_of(torch.tensor([0.5, 0.7]), generation.Generation(sequence, mask, response))
    assert answer.tolist() == [5, 0, 6] and score == pytest.approx(0.7)


def test_repeat_prompts_keeps_copies_together():
    prompts, lengths = generation.repeat_prompts(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 1]), 2)
    assert prompts.tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]] and lengths.tolist() == [2, 2, 1, 1]
