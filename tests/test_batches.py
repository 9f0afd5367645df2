from itertools import islice

import pytest
import torch
from chat import BOS, BOT, END, EOS, START, USER, assistant, chat_tokenizer, user

from palm_rlhf_pytorch.batches import (
    best_fit,
    bucketed_rows,
    by_length,
    encode_pair,
    encode_prompt,
    encode_response,
    next_token_batches,
    pack_documents,
    packed_batches,
    pad_sequences,
    spans,
)
from palm_rlhf_pytorch.conversation import Conversation
from palm_rlhf_pytorch.tokenizer import ByteTokenizer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_both_of_a_pair_follow_the_same_prompt():
    tokenizer = ByteTokenizer()
    first, second = encode_pair(tokenizer, "0123456789", "a", "abcdef", 10)
    assert first == (tokenizer.encode("789") + tokenizer.encode("a") + [tokenizer.eos_id], 3)
    assert second == (tokenizer.encode("789") + tokenizer.encode("abcdef") + [tokenizer.eos_id], 3)
    short = [encode_response(tokenizer, "01", response, 10) for response in ("a", "bc")]
    assert list(encode_pair(tokenizer, "01", "a", "bc", 10)) == short


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


# conversations

TALK = Conversation([user("hi"), assistant("yes"), user("so")])


def test_a_conversation_begins_as_its_template_says():
    tokenizer = chat_tokenizer()
    hi, yes, so = (tokenizer.encode(text) for text in ("hi", "yes", "so"))
    expected = [BOS, START, USER, *hi, END, START, BOT, *yes, END, START, USER, *so, END, START, BOT]
    assert encode_prompt(tokenizer, TALK) == expected
    assert expected.count(BOS) == 1
    assert encode_prompt(tokenizer, str(TALK)) == [BOS, *tokenizer.encode(str(TALK))]


def test_only_the_last_answer_is_the_response():
    tokenizer = chat_tokenizer()
    prompt, answer = encode_prompt(tokenizer, TALK), tokenizer.encode("fine")
    assert encode_response(tokenizer, TALK, "fine", 99) == ([*prompt, *answer, END], len(prompt))
    assert encode_response(tokenizer, TALK, "", 99) == ([*prompt, END], len(prompt))
    assert encode_response(tokenizer, TALK, " fine ", 99)[0] == [*prompt, *answer, END]  # the template strips
    short = encode_response(tokenizer, TALK, "fine", len(answer) + 4)
    assert short == ([*prompt[-3:], *answer, END], 3)


@pytest.mark.parametrize(
    "ending, expected",
    [
        ("<BOS>{{ content }}<EOS><END>\n", [BOS, "text", EOS]),  # up to the first that ends an answer
        ("{{ content }}\n", ["text", "newline", END]),  # without an eos of its own
        ("", ["text", END]),  # it forgets answers
    ],
)
def test_what_a_template_writes_around_an_answer_is_learned(ending, expected):
    turn = "{% if m['role'] == 'assistant' %}<BOT>" + ending.replace("content", "m['content']")
    template = f"{{% for m in messages %}}{turn}{{% else %}}<USER>{{{{ m['content'] }}}}{{% endif %}}{{% endfor %}}"
    template += "{% if add_generation_prompt %}<BOT>{% endif %}"
    tokenizer = chat_tokenizer(eos_ids=(EOS,), chat_template=template)
    prompt = [USER, *tokenizer.encode("a"), BOT]
    parts = {"text": tokenizer.encode("fine"), "newline": tokenizer.encode("\n")}
    response = [i for part in expected for i in (parts[part] if isinstance(part, str) else [part])]
    assert encode_response(tokenizer, Conversation([user("a")]), "fine", 99) == ([*prompt, *response], len(prompt))


def test_an_answer_is_itself_where_the_template_opens_its_turn_otherwise():
    turns = "{% for m in messages %}<USER>{{ m['content'] }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<BOT>{% endif %}"
    tokenizer = chat_tokenizer(chat_template=template)
    prompt = [USER, *tokenizer.encode("a"), BOT]
    row = encode_response(tokenizer, Conversation([user("a")]), "fine", 99)
    assert row == ([*prompt, *tokenizer.encode("fine"), END], len(prompt))


def test_conversations_need_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        encode_response(ByteTokenizer(), TALK, "a", 99)


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
        lambda: packed_batches(sequences, 4, 2, 0, seeded()),
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


# packing


@pytest.mark.parametrize("length", [1, 2, 5, 6, 9, 10, 23])
@pytest.mark.parametrize("first", [1, 2, 4, None])
def test_pieces_predict_every_token_once(length, first):
    pieces = spans(length, 4, first)
    predicted = [i for start, stop in pieces for i in range(start + 1, stop)]
    assert predicted == list(range(1, length))
    assert all(stop - start <= 5 for start, stop in pieces)
    assert pieces[0][1] == min(length, (first or 4) + 1)


def test_best_fit_by_hand():
    # 7 opens a row, 5 another, 4 another (7 + 4 and 5 + 4 are too long); 3 fills 7 up, not 5 or 4; 2 goes to 5, 2 to 4
    lengths = [2, 4, 3, 7, 5, 2]
    assert best_fit(lengths, 10) == [[3, 2], [4, 1], [0, 5]]
    assert best_fit([8, 6, 2, 1], 8) == [[0], [1, 2], [3]]
    assert best_fit([8, 6, 1, 2], 8) == [[0], [1, 3], [2]]  # 2 fills the row, 1 would not
    assert best_fit([], 8) == []


def test_best_fit_leaves_little_room():
    lengths = torch.randint(1, 60, (3000,), generator=seeded()).tolist()
    rows = best_fit(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(3000))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 100 and sum(filled) > 0.99 * 100 * len(rows)


DOCUMENTS = [[i + 1] * (1 + i * 7 % 50) for i in range(101)]


def unpacked(batch):
    """The documents of a batch, row by row."""
    rows = zip(*batch, strict=True)
    return [[ids[numbers == k].tolist() for k in range(int(numbers.max()) + 1)] for ids, numbers in rows]


def epoch_of(batches):
    """Rows until all documents have come."""
    rows, count = [], 0
    while count < len(DOCUMENTS):
        ((row,),) = [unpacked(next(batches))]
        rows.append(row)
        count += len(row)
    return rows


def test_packed_rows_hold_every_document_once_per_epoch():
    batches = packed_batches(DOCUMENTS, 59, 1, 0, seeded(), window=40)
    epochs = [epoch_of(batches) for _ in range(2)]
    for epoch in epochs:
        assert sorted(document for row in epoch for document in row) == sorted(DOCUMENTS)
    assert epochs[0] != epochs[1]


def test_packed_batches_have_one_shape_and_number_their_documents():
    real = 0
    for ids, numbers in islice(packed_batches(DOCUMENTS, 59, 7, 0, seeded()), 30):
        assert ids.shape == numbers.shape == (7, 60) and ids.dtype == numbers.dtype == torch.long
        assert torch.equal(numbers == -1, ids == 0)
        steps = numbers.masked_fill(numbers == -1, 10**6).diff(dim=-1)
        assert (steps >= 0).all() and (numbers[:, 0] == 0).all()  # one after the other, padding at the end
        assert torch.equal(steps > 0, ids.diff(dim=-1) != 0)  # each document has an id of its own
        real += int((ids > 0).sum())
    assert real > 0.98 * 30 * 7 * 60


def test_rows_are_no_wider_than_all_documents():
    ids, numbers = next(packed_batches([[5, 6], [7, 8, 9]], 100, 2, 0, seeded()))
    assert ids.shape == (2, 5) and (ids > 0).all() and numbers.amax(dim=-1).tolist() == [1, 1]


def test_packed_batches_follow_the_generator():
    def first(seed):
        return [t.tolist() for t in next(packed_batches(DOCUMENTS, 59, 8, 0, seeded(seed)))]

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_rows_do_not_run_from_long_to_short():
    lengths = [len(row[0]) for row in epoch_of(packed_batches(DOCUMENTS, 59, 1, 0, seeded()))]
    assert lengths != sorted(lengths, reverse=True)


def test_long_documents_are_cut_elsewhere_every_time():
    document = list(range(1, 24))
    batches = packed_batches([document, [50, 51]], 5, 1, 0, seeded())
    seen = set()
    for _ in range(20):
        pairs, cuts = [], set()
        while len(pairs) < 23:  # 22 next tokens of the long document and one of the short
            for piece in unpacked(next(batches))[0]:
                assert len(piece) <= 6
                pairs += list(zip(piece, piece[1:], strict=False))
                cuts.add(piece[0])
        assert sorted(pairs) == [*zip(document, document[1:], strict=False), (50, 51)]
        seen.add(frozenset(cuts))
    assert len(seen) == 5


def test_packed_batches_refuse_at_the_call():
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="at least 1, got"):
            packed_batches(DOCUMENTS, sizes[0], sizes[1], 0, seeded(), sizes[2])


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


def test_rows_are_judged_by_length_and_answered_in_order():
    rows = [([1] * length, 1) for length in (5, 2, 9, 3, 7)]
    asked = []

    def judge(some):
        asked.append([len(ids) for ids, _ in some])
        return torch.tensor([len(ids) for ids, _ in some])

    assert by_length(rows, 2, judge).tolist() == [5.0, 2.0, 9.0, 3.0, 7.0]
    assert asked == [[2, 3], [5, 7], [9]]
