from itertools import islice

import pytest
import torch

from palm_rlhf_pytorch.batches import (
    bucketed_rows,
    document_batches,
    encode_prompt,
    encode_response,
    next_token_batches,
    pack_documents,
    pad_sequences,
)
from palm_rlhf_pytorch.tokenizer import ByteTokenizer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_encode_response_truncates_the_prompt_first():
    tokenizer = ByteTokenizer()
    prompt, response = encode_prompt(tokenizer, "abc"), [*tokenizer.encode("xyz"), tokenizer.eos_id]
    expected = {
        9: (prompt + response, 4),
        8: (prompt + response, 4),
        7: (prompt[1:] + response, 3),
        5: (prompt[3:] + response, 1),
        4: (prompt[3:] + response[:3], 1),  # cut, so without its eos
        2: (prompt[3:] + response[:1], 1),
    }
    for max_len, answer in expected.items():
        assert encode_response(tokenizer, "abc", "xyz", max_len) == answer
    with pytest.raises(ValueError, match="max_len"):
        encode_response(tokenizer, "abc", "xyz", 1)


def test_every_prompt_begins_with_bos():
    tokenizer = ByteTokenizer()
    assert encode_prompt(tokenizer, "a") == [tokenizer.bos_id, 97 + 3]
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_id]
    assert encode_response(tokenizer, "", "x", 8) == ([tokenizer.bos_id, 120 + 3, tokenizer.eos_id], 1)
    assert encode_response(tokenizer, "", "", 8) == ([tokenizer.bos_id, tokenizer.eos_id], 1)


class WordStart(ByteTokenizer):
    """Writes a text's start as if a space stood before it."""

    def encode_start(self, text):
        return self.encode(" " + text) if text else []


def test_only_the_start_of_a_text_is_encoded_as_one():
    tokenizer = WordStart()
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert encode_response(tokenizer, "a", "b", 9) == ([bos, *tokenizer.encode(" ab"), eos], 3)
    assert encode_response(tokenizer, "", "b", 9) == ([bos, *tokenizer.encode(" b"), eos], 1)


def test_pad_sequences():
    ids, mask = pad_sequences([[5], [0, 7, 8]], pad_id=0)
    assert ids.tolist() == [[5, 0, 0], [0, 7, 8]] and ids.dtype == torch.long
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def test_pack_documents():
    stream = pack_documents([[3, 4, 2], [5, 2]])
    assert stream.tolist() == [3, 4, 2, 5, 2] and stream.dtype == torch.long


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_empty_sequences_are_refused(sequences):
    for use in (
        lambda: pad_sequences(sequences, 0),
        lambda: pack_documents(sequences),
        lambda: document_batches(sequences, 2, 0, seeded()),
    ):
        with pytest.raises(ValueError, match="got none|sequence 1 is empty"):
            use()


def test_next_token_batches_are_crops_of_the_whole_stream():
    stream = torch.arange(10, dtype=torch.int32)
    batches = torch.cat(list(islice(next_token_batches(stream, 3, 4, seeded()), 100)))
    assert batches.shape == (400, 4) and batches.dtype == torch.long
    assert torch.equal(batches, batches[:, :1] + torch.arange(4))
    assert set(batches[:, 0].tolist()) == set(range(7))  # the first and the last crop too


def test_next_token_batches_follow_the_generator():
    def first(seed):
        return torch.stack(list(islice(next_token_batches(torch.arange(1000), 8, 4, seeded(seed)), 5)))

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_next_token_batches_refuse_at_the_call():
    next_token_batches(torch.arange(4), 3, 1, seeded())
    with pytest.raises(ValueError, match="seq_len 4 needs at least 5 tokens, got 4"):
        next_token_batches(torch.arange(4), 4, 1, seeded())
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        next_token_batches(torch.zeros(2, 2, dtype=torch.long), 1, 1, seeded())
    with pytest.raises(ValueError, match="float32"):
        next_token_batches(torch.zeros(8), 1, 1, seeded())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        next_token_batches(torch.arange(4), 0, 1, seeded())


DOCUMENTS = [[i + 1] * (1 + i * 7 % 50) for i in range(101)]


def document_epoch(iterator, batch_size: int) -> list[torch.Tensor]:
    return list(islice(iterator, -(-len(DOCUMENTS) // batch_size)))


def test_document_batches_hold_every_document_once_per_epoch():
    batches = document_batches(DOCUMENTS, 4, 0, seeded(), window=3)
    epochs = [document_epoch(batches, 4) for _ in range(2)]
    for epoch in epochs:
        rows = [[i for i in row.tolist() if i] for batch in epoch for row in batch]
        assert sorted(rows) == sorted(DOCUMENTS)
        assert sorted(len(batch) for batch in epoch) == [1] + [4] * 25
    assert [b.tolist() for b in epochs[0]] != [b.tolist() for b in epochs[1]]


def test_document_batches_follow_the_generator():
    def first(seed):
        return [b.tolist() for b in document_epoch(document_batches(DOCUMENTS, 4, 0, seeded(seed)), 4)]

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_document_batches_compute_little_padding():
    def padding(window):
        epoch = document_epoch(document_batches(DOCUMENTS, 4, 0, seeded(), window), 4)
        return sum((batch == 0).sum().item() for batch in epoch)

    assert padding(window=26) < padding(window=1) / 5


def test_document_batches_do_not_run_from_short_to_long():
    widths = [b.shape[1] for b in document_epoch(document_batches(DOCUMENTS, 4, 0, seeded()), 4)]
    assert widths != sorted(widths)


LENGTHS = [1 + i * 7 % 50 for i in range(101)]


def test_bucketed_rows_hold_every_row_once_per_epoch():
    rows = bucketed_rows(LENGTHS, 4, seeded(), window=3)
    epochs = [list(islice(rows, 26)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(101))
        assert sorted(map(len, epoch)) == [1] + [4] * 25
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(islice(bucketed_rows(LENGTHS, 4, seeded(), window=3), 26)) == epochs[0]


def test_rows_of_a_batch_have_similar_lengths():
    def spread(window):
        batches = islice(bucketed_rows(LENGTHS, 4, seeded(), window), 26)
        return sum(max(LENGTHS[i] for i in b) - min(LENGTHS[i] for i in b) for b in batches)

    assert spread(26) < spread(1) / 5


def test_bucketed_rows_refuse_at_the_call():
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            bucketed_rows(LENGTHS, sizes[0], seeded(), sizes[1])
