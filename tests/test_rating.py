import math
import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import RewardModel
from palm_rlhf_pytorch.data import Pair, Rating
from palm_rlhf_pytorch.rating import (
    RatingOptions,
    Scale,
    collate,
    drop_tokens,
    encode_ratings,
    new_reward_model,
    pair_loss,
    ranks,
    rating_loss,
    score_all,
    spearman,
    train_on_pairs,
    train_on_ratings,
)
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
RATINGS = [Rating("the", " end", 1.0), Rating("", "a longer one", 4.0), Rating("so", "", 2.0), Rating("x", " y z", 5.0)]


@pytest.fixture
def palm(make_palm):
    return make_palm(num_tokens=TOKENIZER.num_tokens)


def reward_model(palm, scale=None, lora=True, causal=True):
    """A reward model whose every part matters."""
    model = new_reward_model(palm, scale, dropout=0.0, lora=lora, lora_r=2, causal=causal)
    with torch.no_grad():
        for parameter in model.finetune_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


# scales


def test_whole_stars_are_divided_between():
    scale = Scale.of([1, 2, 3, 4, 5, 5], bins=5)
    assert scale.edges == (1.5, 2.5, 3.5, 4.5) and scale.values == (1, 2, 3, 4, 5)
    assert scale.labels([1, 2.4, 2.5, 5, 9, -3]) == [0, 1, 2, 4, 4, 0]
    assert Scale.of([0, 1, 1], bins=5).edges == (0.5,)  # fewer than asked for


def test_other_ratings_are_divided_at_quantiles():
    scale = Scale.of([0.5, 1.0, 2.0, 4.0], bins=2)
    assert scale.edges == (1.5,) and scale.values == (0.75, 3.0)
    many = Scale.of([float(i) for i in range(100)], bins=4)  # whole, but more than bins
    assert [many.labels([float(i) for i in range(100)]).count(label) for label in range(4)] == [25] * 4


def test_given_edges_are_taken_and_values_are_the_means_within():
    scale = Scale.of([1, 2, 3, 10], bins=5, edges=(2.5,))
    assert scale.edges == (2.5,) and scale.values == (1.5, 6.5)


def test_a_bin_without_ratings_is_refused():
    with pytest.raises(ValueError, match="no rating falls into bin 1 of edges .*1.5, 2.5"):
        Scale.of([1, 3], bins=3)


# batches


def test_collate():
    rows = encode_ratings([Rating("a", "bc", 0.0), Rating("", "d", 0.0)], TOKENIZER, 9)
    ids, mask, prompt_mask = collate(rows, TOKENIZER.pad_id)
    bos, eos = TOKENIZER.bos_id, TOKENIZER.eos_id
    assert ids.tolist() == [[bos, 100, 101, 102, eos], [bos, 103, eos, 0, 0]]
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert prompt_mask.tolist() == [[True, True, False, False, False], [True, False, False, False, False]]


def test_dropped_tokens_are_a_share_and_never_the_first_or_last():
    row = ([1, *range(3, 1003), 2], 400)
    generator = torch.Generator().manual_seed(0)
    ids, prompt_length = drop_tokens(row, 0.3, generator)
    assert ids[0] == 1 and ids[-1] == 2 and ids == sorted(ids[:-1]) + [2]
    assert abs(len(ids) / 1002 - 0.7) < 0.05
    # the prompt is still the prompt
    assert ids[prompt_length - 1] < 402 <= ids[prompt_length]
    assert drop_tokens(row, 0.0, generator) is row
    assert drop_tokens(([1, 7, 8, 2], 2), 1.0, generator) == ([1, 2], 1)


# losses


@pytest.mark.parametrize("binned, causal", list(product([True, False], [True, False])))
def test_rating_loss_is_the_forward_s_with_masks(palm, binned, causal):
    scale = Scale.of([r.rating for r in RATINGS], 4, (1.5, 3.0, 4.5)) if binned else None
    model = reward_model(palm, scale, causal=causal)
    ids, mask, prompt_mask = collate(encode_ratings(RATINGS, TOKENIZER, 32), TOKENIZER.pad_id)
    ratings = [r.rating for r in RATINGS]
    labels = torch.tensor(scale.labels(ratings) if binned else ratings)
    found = rating_loss(model, ((ids, mask, prompt_mask), labels))
    expected = model(ids.masked_fill(~mask, -1), mask=mask & ~prompt_mask, prompt_mask=prompt_mask, labels=labels)
    assert torch.equal(found, expected)
    # and each rating's alone, without any padding
    alone = []
    for (row, length), label in zip(encode_ratings(RATINGS, TOKENIZER, 32), labels, strict=True):
        x = torch.tensor([row])
        response = torch.arange(len(row))[None] >= length
        pred = model(x, mask=response, prompt_mask=~response, sample=False)[0]
        alone.append(F.cross_entropy(pred, label) if binned else (pred - label) ** 2)
    assert torch.allclose(found, torch.stack(alone).mean(), atol=1e-5)


def test_pair_loss_by_hand(palm):
    model = reward_model(palm)
    chosen, rejected = encode_ratings(RATINGS[:2], TOKENIZER, 32), encode_ratings(RATINGS[2:], TOKENIZER, 32)
    margin = torch.tensor([0.0, 0.5])
    found = pair_loss(model, (collate(chosen, 0), collate(rejected, 0), margin))
    gap = (score_all(model, chosen, 0) - score_all(model, rejected, 0) - margin).tolist()
    assert found.item() == pytest.approx(sum(math.log(1 + math.exp(-g)) for g in gap) / 2, rel=1e-4)


# judging


def test_scores_come_in_the_order_of_the_rows(palm):
    model = reward_model(palm, Scale.of([1, 2, 3], 3))
    rows = encode_ratings([Rating("ab", "c" * (i * 7 % 10), 0.0) for i in range(10)], TOKENIZER, 32)
    alone = torch.cat([score_all(model, [row], TOKENIZER.pad_id) for row in rows])
    assert alone.unique().numel() == 10
    for batch_size in (3, 64):
        assert torch.allclose(score_all(model, rows, TOKENIZER.pad_id, batch_size), alone, atol=1e-5)


def test_ranks_share_ties():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert ranks(torch.tensor([5, 5, 5])).tolist() == [1.0, 1.0, 1.0]


def test_spearman_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, a.exp()) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    # ranks (0, 1, 2, 3) and (0.5, 0.5, 3, 2): covariance 3.5 over deviations sqrt(5 * 4.5)
    assert spearman(a, torch.tensor([7.0, 7.0, 9.0, 8.0])) == pytest.approx(3.5 / math.sqrt(5 * 4.5))


@pytest.mark.filterwarnings("error")
def test_nothing_to_order_has_no_rank_correlation():
    for a, b in (([], []), ([1.0], [2.0]), ([1.0, 2.0], [3.0, 3.0])):
        assert math.isnan(spearman(torch.tensor(a), torch.tensor(b)))


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for ties in (3, 1000):
        a, b = torch.randint(ties, (50,)), torch.randint(ties, (50,))
        b = b + a // 2
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


# training


def labelled(count=48):
    """Texts whose rating is in their first letter."""
    rng = random.Random(0)
    letters = [rng.choice("abc") for _ in range(count)]
    return [Rating("", letter + "x" * rng.randrange(6), 1.0 + "abc".index(letter)) for letter in letters]


FIT = FitOptions(steps=40, lr=2e-2, warmup=5, eval_every=20)
OPTIONS = RatingOptions(max_len=16, batch_size=16)


@pytest.mark.parametrize("binned, lora, causal", [(True, True, True), (False, False, True), (True, False, False)])
def test_ratings_are_learned(palm, binned, lora, causal):
    ratings = labelled()
    scale = Scale.of([r.rating for r in ratings], 3) if binned else None
    model = new_reward_model(palm, scale, 0.0, lora, 4, causal)
    trunk = model.palm.token_emb.weight.clone()
    history = train_on_ratings(model, ratings[8:], ratings[:8], TOKENIZER, scale, OPTIONS, FIT)
    assert history[-1]["held_out_spearman"] > 0.7 and history[-1]["held_out_rmse"] < 0.5
    assert ("held_out_accuracy" in history[-1]) is binned
    if binned:
        assert history[-1]["held_out_accuracy"] == 1.0
    assert torch.equal(trunk, model.palm.token_emb.weight) is lora
    assert model.palm.causal is causal and palm.causal


def test_held_out_numbers_by_hand(palm):
    held_out = [Rating("", "a", 1.0), Rating("", "b", 3.0), Rating("", "cc", 2.0)]
    scale = Scale.of([1, 2, 3], 3)
    model = reward_model(palm, scale)
    tiny = FitOptions(steps=1, lr=0.0)
    found = train_on_ratings(model, RATINGS, held_out, TOKENIZER, scale, OPTIONS, tiny)[-1]
    scores = score_all(model, encode_ratings(held_out, TOKENIZER, 16), TOKENIZER.pad_id).tolist()
    error = [score - r.rating for score, r in zip(scores, held_out, strict=True)]
    assert found["held_out_rmse"] == pytest.approx(math.sqrt(sum(e * e for e in error) / 3), rel=1e-5)
    right = [min(max(round(score), 1), 3) == r.rating for score, r in zip(scores, held_out, strict=True)]
    assert found["held_out_accuracy"] == pytest.approx(sum(right) / 3)


def test_nothing_held_out_is_nothing_evaluated(palm):
    model = reward_model(palm)
    rows = train_on_ratings(model, RATINGS, [], TOKENIZER, None, OPTIONS, FitOptions(steps=1))
    assert not [name for name in rows[0] if name.startswith("held_out")]


def test_choices_are_learned(palm):
    rng = random.Random(1)
    pairs = [Pair("p", "a" + "x" * rng.randrange(4), "b" + "x" * rng.randrange(4), 0.1) for _ in range(40)]
    model = new_reward_model(palm, None, 0.0, True, 4)
    history = train_on_pairs(model, pairs[8:], pairs[:8], TOKENIZER, OPTIONS, FIT)
    assert history[-1]["held_out_accuracy"] == 1.0 and history[-1]["held_out_gap"] > 0.5


def test_margins_count(palm):
    pairs = [Pair("p", "a", "bc", margin) for margin in (None, 2.0)]
    model = reward_model(palm)
    options = FitOptions(steps=1, lr=0.0)
    losses = [train_on_pairs(model, [pair], [], TOKENIZER, OPTIONS, options)[0]["loss"] for pair in pairs]
    gap = -math.log(math.expm1(losses[0]))  # of log(1 + exp(-gap))
    assert losses[1] == pytest.approx(math.log(1 + math.exp(2 - gap)), rel=1e-4)


def test_an_encoder_has_the_language_models_weights(palm):
    model = new_reward_model(palm, None, 0.0, False, 4, causal=False)
    assert isinstance(model, RewardModel) and not model.palm.causal
    for name, weight in palm.state_dict().items():
        assert torch.equal(model.palm.state_dict()[name], weight), name
    assert model.palm.token_emb.weight is not palm.token_emb.weight
    # its first token sees the last
    ids = torch.tensor([[1, 5, 6], [1, 5, 7]])
    first = model.palm(ids, return_only_embedding=True)[:, 0]
    assert not torch.allclose(first[0], first[1])
