import pytest
import torch

from palm_rlhf_pytorch.kv_cache import KVCache
from palm_rlhf_pytorch.ops import lengths_to_mask

KINDS = {
    "xpos": {},
    "no xpos": {"use_xpos": False},
    "short xpos base": {"rotary_xpos_scale_base": 6},
    "two kv heads": {"kv_heads": 2},
    "all kv heads": {"kv_heads": 4, "use_xpos": False},
    "qk_rmsnorm": {"qk_rmsnorm": True},
    "flash": {"flash_attn": True},
    "qk_layernorm": {"qk_layernorm": True, "kv_heads": 2},
    "window": {"sliding_window": 4},
    "window 1": {"sliding_window": 1, "use_xpos": False},
    "window, a global layer": {"sliding_window": 6, "global_layers": [1], "use_xpos": False, "kv_heads": 2},
    "window, global layers, xpos": {"sliding_window": 3, "global_layers": [0, 1], "rotary_xpos_scale_base": 6},
    "LoRA in the feedforward": {"lora_ff": True, "finetune_scopes": ["a"], "lora_rslora": True},
    "logit scale, theta, LoRA": {"logit_scale": 0.5, "rotary_theta": 500.0, "finetune_scopes": ["a"]},
}


def prefill(model, tokens, lengths, max_len, **keywords):
    """Cache, logits (b, n, v) of ragged prompts, right padded with garbage."""
    cache = model.new_cache(len(tokens), max_len)
    n = int(lengths.max())
    return cache, model(tokens[:, :n], mask=lengths_to_mask(lengths, n), cache=cache, **keywords)


@torch.no_grad()
@pytest.mark.parametrize("max_len", [40, 8, 1], ids=["fits", "grows", "far too short"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_uncached_at_every_position(make_palm, kind, max_len):
    model = make_palm(**KINDS[kind])
    scope = {"finetune_scope": "a"} if "finetune_scopes" in KINDS[kind] else {}
    tokens = torch.randint(0, 17, (3, 24))
    whole = model(tokens, **scope)
    lengths = torch.tensor([3, 8, 5])
    rows = torch.arange(3)[:, None]

    cache, logits = prefill(model, tokens, lengths, max_len, **scope)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row, :length], whole[row, :length], atol=1e-5, rtol=1e-5)
    for chunk in (1, 4, 1, 1, 7, 2):  # 8 + 16 = 24
        positions = cache.lengths[:, None] + torch.arange(chunk)
        logits = model(tokens[rows, positions], cache=cache, **scope)
        torch.testing.assert_close(logits, whole[rows, positions], atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [19, 24, 21]
    assert cache.max_len >= 24


@torch.no_grad()
@pytest.mark.parametrize("kind", ["xpos", "two kv heads", "window", "window, a global layer"])
def test_extension_may_be_ragged_too(make_palm, kind):
    model = make_palm(**KINDS[kind])
    tokens = torch.randint(0, 17, (3, 24))
    whole = model(tokens)
    cache, _ = prefill(model, tokens, torch.tensor([2, 7, 4]), 8)
    rows = torch.arange(3)[:, None]
    for some in ([5, 1, 3], [1, 1, 1], [2, 6, 4], [1, 1, 1]):
        some = torch.tensor(some)
        n = int(some.max())
        positions = cache.lengths[:, None] + torch.arange(n)
        logits = model(tokens[rows, positions.clamp(max=23)], mask=lengths_to_mask(some, n), cache=cache)
        real = lengths_to_mask(some, n)
        torch.testing.assert_close(logits[real], whole[rows, positions][real], atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [11, 16, 13]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["xpos", "two kv heads", "window", "window, a global layer"])
def test_cached_is_uncached_after_rows_left(make_palm, kind):
    model = make_palm(**KINDS[kind])
    tokens = torch.randint(0, 17, (4, 20))
    whole = model(tokens)
    cache, _ = prefill(model, tokens, torch.tensor([3, 6, 4, 5]), 8)
    left = torch.arange(4)
    for keep in ([0, 1, 2, 3], [0, 2, 3], [1, 2], [1]):
        keep = torch.tensor(keep)
        left = left[cache.keep(keep)]
        for _ in range(3):  # grows on the way
            positions = cache.lengths[:, None]
            logits = model(tokens[left[:, None], positions], cache=cache)
            torch.testing.assert_close(logits, whole[left[:, None], positions], atol=1e-5, rtol=1e-5)
    assert left.tolist() == [3]


def test_slots_by_hand():
    cache = KVCache(depth=2, batch=2, kv_heads=1, max_len=3, dim_head=1)
    k = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 1, 2, 1)
    new_k, new_v = cache.extend(1, k, -k, torch.tensor([[0, 1], [0, 1]]), first=True)
    assert torch.equal(new_k, k) and torch.equal(new_v, -k)  # a first pass looks at its own keys
    cache.advance(torch.tensor([2, 1]), 2)
    five = torch.tensor([5.0, 6.0]).reshape(2, 1, 1, 1)
    keys, values = cache.extend(1, five, -five, cache.lengths[:, None], first=False)
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 5], [3, 6, 0]]  # row 1's padding is overwritten
    assert torch.equal(keys, -values)
    assert (cache.k[0] == 0).all()
    cache.advance(1, 1)
    cache.keep(torch.tensor([1]))
    assert cache.lengths.tolist() == [2] and cache.k[1, 0, 0, :, 0].tolist() == [3, 6, 0]


def test_reading_copies_nothing_and_leaving_rows_free_no_memory():
    cache = KVCache(depth=1, batch=4, kv_heads=2, max_len=5, dim_head=3)
    memory = cache.k.data_ptr()
    cache.advance(3, 3)
    cache.keep(torch.tensor([1, 3]))
    assert cache.k.data_ptr() == memory and cache.read(0, 2)[0].data_ptr() == memory
    assert cache.k.shape == (1, 2, 2, 5, 3)


def test_growth_keeps_what_is_there_and_the_centre():
    cache = KVCache(depth=1, batch=1, kv_heads=1, max_len=4, dim_head=2)
    cache.memory.normal_()
    before, centre = cache.k.clone(), cache.centre
    cache.advance(4, 4)
    cache.reserve(1)
    assert cache.max_len == 8 and cache.centre == centre  # twice as long: a token more copies nothing, mostly
    assert torch.equal(cache.k[:, :, :, :4], before)
    cache.advance(4, 4)
    size = cache.max_len
    cache.reserve(size - 8)
    assert cache.max_len == size


def test_an_encoder_has_no_cache(make_palm):
    model = make_palm(causal=False)
    with pytest.raises(ValueError, match="encoder .* cannot use a key/value cache"):
        model(torch.ones(1, 3, dtype=torch.long), cache=model.new_cache(1, 4))


def filled(rows, lengths, max_len=6, **keywords):
    """Of random memory."""
    cache = KVCache(depth=2, batch=rows, kv_heads=2, max_len=max_len, dim_head=3, **keywords)
    cache.clear(len(lengths))
    cache.memory.normal_()
    cache.advance(torch.tensor(lengths), max(lengths))
    return cache


@pytest.mark.parametrize("stay", [[0, 1, 2], [2, 3, 6], [0, 4, 5, 6], [6], [0, 1, 2, 3, 4, 5, 6], []])
def test_those_that_stay_fill_the_gaps_and_no_more_is_moved(stay):
    lengths = [3, 1, 4, 1, 5, 2, 6]
    cache, count = filled(7, lengths), len(stay)
    before = cache.memory.clone()
    order = cache.keep(torch.tensor(stay, dtype=torch.long))
    assert sorted(order.tolist()) == stay and cache.rows == cache.places.numel() == count
    assert all(place == row for place, row in enumerate(order.tolist()) if place in stay)
    assert cache.lengths.tolist() == [lengths[row] for row in order]
    assert cache.filled == max((lengths[row] for row in stay), default=0)
    for place, row in enumerate(order.tolist()):
        n = lengths[row]
        assert torch.equal(cache.memory[:, place, :n], before[:, row, :n])
    moved = (cache.memory != before).flatten(2).any(dim=-1).any(dim=0)
    assert int(moved.sum()) == sum(row >= count for row in stay)


def test_new_rows_come_into_the_memory_behind():
    cache = filled(5, [2, 4])
    before = cache.memory.clone()
    part = cache.admit(3, 5)
    assert part.rows == 3 and part.lengths.tolist() == [0, 0, 0] and part.filled == 0 and cache.rows == 2
    assert part.centre == cache.centre and part.memory.data_ptr() == cache.memory[:, 2:].data_ptr()
    k = torch.randn(3, 2, 5, 3)
    part.extend(1, k, -k, torch.arange(5).expand(3, -1), first=True)
    part.advance(torch.tensor([5, 3, 4]), 5)
    cache.join(part)
    assert cache.lengths.tolist() == [2, 4, 5, 3, 4] and cache.filled == 5 and cache.places.tolist() == [0, 1, 2, 3, 4]
    keys, values = cache.read(1, 5)
    assert torch.equal(keys[2:], k) and torch.equal(values[2:], -k)
    assert torch.equal(cache.memory[:, :2], before[:, :2]) and torch.equal(cache.memory[0], before[0])


def test_a_short_one_that_comes_leaves_the_longest_the_longest():
    cache = filled(2, [4])
    cache.join(cache.admit(1, 1))
    assert cache.filled == 4


def test_room_is_made_before_rows_come():
    cache = filled(3, [4])
    before = cache.memory.clone()
    part = cache.admit(2, 9)
    assert cache.max_len == part.max_len >= 9 and torch.equal(cache.memory[:, :, :6], before)
    part.reserve(9)
    part.memory.fill_(7.0)
    assert (cache.memory[:, 1:] == 7).all() and not (cache.memory[:, 0] == 7).any()


def test_a_static_cache_does_not_grow():
    cache = filled(2, [3, 4], static=True)
    cache.reserve(2)
    for more in (lambda: cache.reserve(3), lambda: cache.admit(1, 7)):
        with pytest.raises(ValueError, match="a static cache of 6 positions cannot take 7"):
            more()
    assert cache.max_len == 6 and cache.span(1) == 6 and filled(2, [3, 4]).span(1) == 5


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["short xpos base", "two kv heads", "window", "window, a global layer", "qk_layernorm"]
)
def test_a_static_cache_sees_nothing_beyond_its_lengths(make_palm, kind):
    model = make_palm(**KINDS[kind])
    tokens = torch.randint(0, 17, (3, 12))
    whole = model(tokens)
    cache = model.new_cache(3, 12, static=True)
    cache.memory.normal_(std=100)
    lengths = torch.tensor([2, 6, 3])
    model(tokens[:, :6], mask=lengths_to_mask(lengths, 6), cache=cache)
    for _ in range(6):
        positions = cache.lengths
        cache.reserve(1)
        logits = model.next_logits(tokens[torch.arange(3), positions], cache)
        cache.advance(1, 1)
        torch.testing.assert_close(logits, whole[torch.arange(3), positions], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_next_logits_counts_nothing(make_palm):
    model = make_palm()
    cache = model.new_cache(2, 4)
    tokens = torch.tensor([3, 4])
    assert torch.equal(model.next_logits(tokens, cache), model.next_logits(tokens, cache))
    assert cache.lengths.tolist() == [0, 0] and cache.filled == 0


def test_writing_one_position_is_writing():
    one, two = (filled(4, [3, 1, 5]) for _ in range(2))
    two.memory.copy_(one.memory)
    k, v = torch.randn(2, 3, 2, 1, 3)
    one.write(1, k, v, one.lengths[:, None])
    two.write_one(1, torch.cat((k.reshape(3, 6), v.reshape(3, 6)), dim=-1), two.next_slots())
    assert torch.equal(one.memory, two.memory)


def test_rows_may_restart():
    cache = filled(3, [5, 2, 4])
    cache.restart(torch.tensor([True, False, False]))
    assert cache.lengths.tolist() == [0, 2, 4] and cache.filled == 4
    cache.restart(torch.tensor([False, False, False]))
    assert cache.lengths.tolist() == [0, 2, 4] and cache.filled == 4
