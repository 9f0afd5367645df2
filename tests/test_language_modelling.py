from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import PaLM, vocabulary
from palm_rlhf_pytorch.language_modelling import (
    PAD,
    CorpusOptions,
    build_corpus,
    held_out_loss,
    split_texts,
    train_language_model,
)
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


class PadIsEos(ByteTokenizer):
    """As GPT-2's: one special token for everything, and id 0 is an ordinary byte."""

    num_tokens = 257
    pad_id = bos_id = eos_id = 256

    def encode(self, text):
        return list(text.encode())


@pytest.fixture
def palm(make_palm):
    return make_palm(num_tokens=TOKENIZER.num_tokens)


def ids(text, tokenizer=TOKENIZER):
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


# what is held out


def test_documents_are_held_out_whole():
    texts = [f"text {i}" for i in range(20)]
    train, held_out = split_texts(texts, 0.1, seed=0)
    assert len(held_out) == 2 and sorted(train + held_out) == sorted(texts)
    assert split_texts(texts, 0.1, seed=0) == (train, held_out) != split_texts(texts, 0.1, seed=1)


def test_of_a_single_text_the_end_is_held_out():
    assert split_texts(["abcdefghij"], 0.2, 0) == (["abcdefgh"], ["ij"])
    assert split_texts(["abcd"], 0.1, 0) == (["abc"], ["d"])  # never nothing
    for share in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match="less than 1"):
            split_texts(["abcdefghij"], share, 0)


def test_nothing_needs_to_be_held_out(palm):
    assert split_texts(["a", "b"], 0.0, 0) == (["a", "b"], [])
    assert split_texts(["ab"], 0.0, 0) == (["ab"], [])
    corpus = build_corpus(["abc"], [], TOKENIZER, CorpusOptions(batch_size=1))
    history = train_language_model(palm, corpus, FitOptions(steps=1), 1)
    assert "held_out_loss" not in history[0]


# batches


def test_short_documents_stay_whole():
    texts = ["one", "three", "four"]
    corpus = build_corpus(texts, [], TOKENIZER, CorpusOptions(seq_len=6, batch_size=2))
    # 7, 6 and 5 ids: a row each
    rows = [row[row != PAD].tolist() for batch, _ in islice(corpus.batches, 3) for row in batch]
    assert sorted(rows) == sorted(2 * [ids(text) for text in texts])


def test_short_documents_share_rows(said):
    corpus = build_corpus(["one", "three", "four"], [], TOKENIZER, CorpusOptions(seq_len=11, batch_size=2))
    batch, segment_ids = next(corpus.batches)
    assert batch.shape == segment_ids.shape == (2, 12)
    assert sorted(segment_ids.amax(dim=-1).tolist()) == [0, 1]
    assert int((batch != PAD).sum()) == 5 + 7 + 6
    # 18 ids in 2 rows of 12, or in 3
    assert said() == ["packing: 1.5 documents to a row of 12 tokens, 25.0 % padding (with a row each, 50.0 %)"]


def test_one_long_document_among_short_ones_is_cut():
    texts = ["one", "three!", "four"]  # "three!" has 8 ids, one more than a row
    corpus = build_corpus(texts, [], TOKENIZER, CorpusOptions(seq_len=6, batch_size=1))
    pairs = []
    while len(pairs) < 4 + 7 + 5:
        batch, segment_ids = next(corpus.batches)
        inside = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (batch[:, 1:] != PAD)
        pairs += list(zip(batch[:, :-1][inside].tolist(), batch[:, 1:][inside].tolist(), strict=True))
    expected = [ids(text) for text in texts]
    assert sorted(pairs) == sorted(pair for one in expected for pair in zip(one, one[1:], strict=False))


def test_long_documents_make_crops_of_all():
    texts = ["one!!", "three!", "four!"]  # 7, 8 and 7 ids: more than a row on average
    corpus = build_corpus(texts, [], TOKENIZER, CorpusOptions(seq_len=6, batch_size=50))
    stream = [i for text in texts for i in ids(text)]
    crops = {tuple(stream[start : start + 7]) for start in range(len(stream) - 6)}
    rows = {tuple(row) for batch in islice(corpus.batches, 20) for row in batch.tolist()}
    assert rows == crops


def test_batches_follow_the_seed():
    def first(seed):
        corpus = build_corpus([str(i) for i in range(50)], [], TOKENIZER, CorpusOptions(batch_size=50, seed=seed))
        return [t.tolist() for t in next(corpus.batches)]

    assert first(0) == first(0) != first(1)


def test_every_held_out_token_is_predicted_once():
    text = "abcdefghijklm"
    corpus = build_corpus(["x"], [text, "no"], TOKENIZER, CorpusOptions(seq_len=4))
    assert max(map(len, corpus.held_out)) == 5
    assert [i for window in corpus.held_out for i in window[1:]] == ids(text)[1:] + ids("no")[1:]
    assert corpus.held_out_characters == 15


def test_no_window_is_left_with_nothing_to_predict():
    corpus = build_corpus(["x"], ["abc"], TOKENIZER, CorpusOptions(seq_len=2))
    assert [len(window) for window in corpus.held_out] == [3, 3]


# losses


@torch.no_grad()
def total_by_hand(palm, sequences):
    """Each sequence by itself, without padding."""
    total = 0.0
    for sequence in sequences:
        log_probs = palm(torch.tensor([sequence]))[0].log_softmax(dim=-1)
        total -= sum(float(log_probs[n, token]) for n, token in enumerate(sequence[1:]))
    return total


def test_held_out_loss_by_hand(palm):
    texts = ["aé", "bcdef", "g"]  # é is one character of two bytes
    corpus = build_corpus(["x"], texts, TOKENIZER, CorpusOptions())
    total = total_by_hand(palm, map(ids, texts))
    targets, characters = 4 + 6 + 2, 2 + 5 + 1
    for batch_size in (1, 2, 3):
        found = held_out_loss(palm, corpus, batch_size)
        assert found["held_out_loss"] == pytest.approx(total / targets, rel=1e-5)
        assert found["nats_per_character"] == pytest.approx(total / characters, rel=1e-5)
        assert found["perplexity"] == pytest.approx(torch.tensor(total / targets).exp().item(), rel=1e-4)


def test_held_out_loss_never_holds_the_logits(palm, monkeypatch):
    monkeypatch.setattr(PaLM, "logits_of", lambda *arguments: pytest.fail("logits of the whole batch were made"))
    products, linear = [], F.linear

    def spy(x, weight, *bias):
        products.append(x.shape[:-1].numel() * weight.shape[0])
        return linear(x, weight, *bias)

    corpus = build_corpus(["x"], ["abcdefghijklmnop" * 8] * 8, TOKENIZER, CorpusOptions(seq_len=64))
    expected = held_out_loss(palm, corpus, 32)["held_out_loss"]
    monkeypatch.setattr(vocabulary, "rows_of_chunk", lambda weight: 4)
    monkeypatch.setattr(F, "linear", spy)
    assert held_out_loss(palm, corpus, 32)["held_out_loss"] == pytest.approx(expected, rel=1e-5)
    vocabularies = [product for product in products if product % TOKENIZER.num_tokens == 0]
    assert len(vocabularies) > 100 and max(vocabularies) <= 4 * TOKENIZER.num_tokens


def test_a_hopeless_perplexity_does_not_overflow(palm):
    with torch.no_grad():
        palm.token_emb.weight.mul_(1e6)
    corpus = build_corpus(["x"], ["abc"], TOKENIZER, CorpusOptions())
    assert held_out_loss(palm, corpus, 1)["perplexity"] < float("inf")


def test_training_loss_counts_every_token_but_padding(make_palm):
    """Where a tokenizer pads with its eos, the eos is learned; and so is the token of id 0."""
    tokenizer = PadIsEos()
    palm = make_palm(num_tokens=tokenizer.num_tokens)
    texts = ["ab\0c", "d"]
    total = total_by_hand(palm, [ids(text, tokenizer) for text in texts])
    corpus = build_corpus(texts, [], tokenizer, CorpusOptions(batch_size=2))
    history = train_language_model(palm, corpus, FitOptions(steps=1, log_every=1), 2)
    assert history[0]["loss"] == pytest.approx(total / (5 + 2), rel=1e-5)
    assert palm.cross_entropy_ignore_index == 0  # as it was


def test_training_brings_the_loss_down():
    torch.manual_seed(0)
    palm = PaLM(num_tokens=TOKENIZER.num_tokens, dim=32, depth=1, heads=2, dim_head=16)
    corpus = build_corpus(["abcabcabc"] * 8, ["abcabcabc"], TOKENIZER, CorpusOptions(batch_size=8))
    options = FitOptions(steps=40, lr=1e-2, warmup=5, eval_every=20)
    history = train_language_model(palm, corpus, options, 8)
    losses = [row["held_out_loss"] for row in history if "held_out_loss" in row]
    assert len(losses) == 2 and losses[-1] < 1.0 < held_out_loss(PaLM(**palm.config), corpus, 8)["held_out_loss"]
