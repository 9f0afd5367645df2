"""Token ids to batches. Axes: b sequences, n tokens."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf_pytorch.conversation import Conversation, Message
from palm_rlhf_pytorch.ops import lengths_to_mask
from palm_rlhf_pytorch.tokenizer import Tokenizer

Row = tuple[list[int], int]  # ids of prompt and response, and how many are the prompt's
Batch = tuple[Tensor, Tensor, Tensor]  # ids (b, n), mask (b, n), prompt_mask (b, n)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """bos and the prompt's ids: what a response follows, also after an empty prompt. A `Conversation` becomes what the
    chat template makes of it, bos included where the template has one.
    """
    if isinstance(prompt, Conversation):
        return tokenizer.encode_chat(prompt.messages)
    return [tokenizer.bos_id, *tokenizer.encode_start(prompt)]


def encode_response(tokenizer: Tokenizer, prompt: str, response: str, max_len: int) -> Row:
    """The ids of prompt (see `encode_prompt`), response and eos, at most `max_len` of them, and how many are the
    prompt's.

    Too long a prompt loses its beginning, then the response its end (and with it the eos: it did not finish).
    At least one prompt token stays, for the first response token to follow.
    """
    if max_len < 2:
        raise ValueError(f"max_len must hold at least a prompt and a response token (2), got {max_len}.")
    prompt_ids = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, Conversation):
        response_ids = _assistant_turn(tokenizer, prompt, prompt_ids, response)
    else:
        encode = tokenizer.encode if prompt else tokenizer.encode_start
        response_ids = [*encode(response), tokenizer.eos_id]
    kept = max(1, min(len(prompt_ids), max_len - len(response_ids)))
    return (prompt_ids[-kept:] + response_ids)[:max_len], kept


def encode_pair(tokenizer: Tokenizer, prompt: str, first: str, second: str, max_len: int) -> tuple[Row, Row]:
    """Two responses to one prompt, each as `encode_response` has it; where one takes room from the prompt, both follow
    what is left of it.
    """
    rows = [encode_response(tokenizer, prompt, response, max_len) for response in (first, second)]
    kept = min(length for _, length in rows)
    first_row, second_row = ((ids[length - kept :], kept) for ids, length in rows)
    return first_row, second_row


def _assistant_turn(tokenizer: Tokenizer, prompt: Conversation, prompt_ids: list[int], response: str) -> list[int]:
    """What the chat template writes behind the prompt for the assistant's response, up to the first eos.

    A template that does not continue the prompt there (some open a turn otherwise than they write one), or an empty
    response: just the response's ids and eos.
    """
    ids = tokenizer.encode(response)
    if response.strip():
        whole = tokenizer.encode_chat([*prompt.messages, Message("assistant", response)], add_generation_prompt=False)
        if whole[: len(prompt_ids)] == prompt_ids:
            ids = whole[len(prompt_ids) :] or ids
    end = next((place for place, i in enumerate(ids) if i in tokenizer.eos_ids), None)
    return [*ids, tokenizer.eos_id] if end is None else ids[: end + 1]


def pad_sequences(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right padding: ids (b, n), long, and mask (b, n), True at real tokens."""
    _refuse_empty(sequences)
    ids = pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows side by side, right padded."""
    ids, mask = pad_sequences([ids for ids, _ in rows], pad_id)
    lengths = torch.tensor([length for _, length in rows])
    return ids, mask, lengths_to_mask(lengths, ids.shape[1])


def by_length(rows: Sequence[Row], batch_size: int, judge: Callable[[list[Row]], Tensor]) -> Tensor:
    """judge(some rows) -> a number for each (b,), asked in batches of similar length -> (len(rows),) on the CPU."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    found = torch.empty(len(rows))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        found[some] = judge([rows[i] for i in some]).float().cpu()
    return found


def pack_documents(documents: Sequence[Sequence[int]]) -> Tensor:
    """One stream (n,) of all documents."""
    _refuse_empty(documents)
    return torch.cat([torch.tensor(document) for document in documents])


def next_token_batches(ids: Tensor, seq_len: int, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """Random crops of a stream (n,), forever: (b, seq_len + 1), which predict seq_len next tokens each."""
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"expected a stream of token ids (n,), got {tuple(ids.shape)} of {ids.dtype}.")
    if min(seq_len, batch_size) < 1:
        raise ValueError(f"seq_len and batch_size must be at least 1, got {seq_len} and {batch_size}.")
    if len(ids) <= seq_len:
        raise ValueError(f"seq_len {seq_len} needs at least {seq_len + 1} tokens, got {len(ids)}.")

    def batches() -> Iterator[Tensor]:
        offsets = torch.arange(seq_len + 1)
        while True:
            starts = torch.randint(len(ids) - seq_len, (batch_size, 1), generator=generator)
            yield ids[starts + offsets].long()

    return batches()  # a function of its own, so that bad arguments are refused at the call


def spans(length: int, seq_len: int, first: int | None = None) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of a document in which each token but the first is predicted once. They have at most
    seq_len + 1 tokens and share one with the piece before; the first predicts `first` tokens (seq_len).
    """
    starts = [0, *range(first or seq_len, length - 1, seq_len)]
    return list(zip(starts, [start + 1 for start in starts[1:]] + [length], strict=True))


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of lengths in rows of at most `room` together: the longest first, each into the row that it fills best
    (best-fit decreasing, Ding et al., 2404.10830).
    """
    rows: list[list[int]] = []
    rows_with: list[list[list[int]]] = [[] for _ in range(room + 1)]  # so much room left
    known = 0  # bit r: rows_with[r] is not empty
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        enough = known >> lengths[i]
        if enough:
            left = lengths[i] + (enough & -enough).bit_length() - 1  # the lowest bit is the least room
            row = rows_with[left].pop()
            known ^= (not rows_with[left]) << left
        else:
            left, row = room, []
            rows.append(row)
        row.append(i)
        left -= lengths[i]
        rows_with[left].append(row)
        known |= 1 << left
    return rows


def packed_batches(
    documents: Sequence[Sequence[int]],
    seq_len: int,
    batch_size: int,
    pad_id: int,
    generator: Generator,
    window: int = 4096,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of whole documents, forever: ids and segment ids, both (batch_size, seq_len + 1), or as wide as all
    documents together where those have less.

    A segment id is the number of a token's document in its row, -1 at padding. Each epoch has every document once, in
    shuffled order, and batches go on across epochs, so that all have one shape. Documents that are longer than a row
    are cut, at other places every time. `window` documents are packed at once.
    """
    if min(seq_len, batch_size, window) < 1:
        sizes = f"{seq_len}, {batch_size} and {window}"
        raise ValueError(f"seq_len, batch_size and window must be at least 1, got {sizes}.")
    stream = pack_documents(documents)
    room = min(seq_len + 1, len(stream))
    ends = list(accumulate(len(d) for d in documents))

    def pieces(i: int) -> list[Tensor]:
        document = stream[ends[i - 1] if i else 0 : ends[i]]
        long = len(document) > room
        first = int(torch.randint(seq_len, (), generator=generator)) + 1 if long else seq_len
        return [document[start:stop] for start, stop in spans(len(document), seq_len, first)]

    def rows() -> Iterator[list[Tensor]]:
        while True:
            for some in torch.randperm(len(ends), generator=generator).split(window):
                parts = [part for i in some.tolist() for part in pieces(i)]
                packed = best_fit([len(part) for part in parts], room)
                # shuffled again, or every window would run from long to short
                for r in torch.randperm(len(packed), generator=generator).tolist():
                    yield [parts[i] for i in packed[r]]

    def batches(endless: Iterator[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield lay_out(list(islice(endless, batch_size)), room, pad_id)

    return batches(rows())


def lay_out(rows: Sequence[Sequence[Tensor]], size: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Documents side by side: ids and segment ids, both (b, size). See `packed_batches`."""
    ids = torch.full((len(rows), size), pad_id)
    segment_ids = torch.full_like(ids, -1)
    for row, to_ids, to_segments in zip(rows, ids, segment_ids, strict=True):
        stop = 0
        for number, document in enumerate(row):
            start, stop = stop, stop + len(document)
            to_ids[start:stop] = document
            to_segments[start:stop] = number
    return ids, segment_ids


def bucketed_rows(lengths: list[int], batch_size: int, generator: Generator, window: int = 32) -> Iterator[list[int]]:
    """Row numbers of batches of similar lengths, forever.

    Each epoch has every row once; its smallest batch may have less than `batch_size`. Rows are sorted by length within
    shuffled windows of `window` batches, so that batches hold little padding.
    """
    if min(batch_size, window) < 1:
        raise ValueError(f"batch_size and window must be at least 1, got {batch_size} and {window}.")

    def epochs() -> Iterator[list[int]]:
        while True:
            yield from _bucketed_epoch(lengths, batch_size, window, generator)

    return epochs()


def _bucketed_epoch(lengths: list[int], batch_size: int, window: int, generator: Generator) -> list[list[int]]:
    """The batches of one epoch as lists of indices."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), batch_size * window):
        bucket = sorted(order[start : start + batch_size * window], key=lengths.__getitem__)
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    # Shuffled again, or every window would run from short to long.
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _refuse_empty(sequences: Sequence[Sequence[int]]) -> None:
    if not sequences:
        raise ValueError("expected at least one sequence of token ids, got none.")
    lengths = [len(s) for s in sequences]
    if 0 in lengths:
        raise ValueError(f"sequence {lengths.index(0)} is empty: every sequence needs at least one token.")
