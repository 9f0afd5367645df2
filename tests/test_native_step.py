"""A decoding step in C++ is the one in torch's operations, row by row."""

import ctypes
from contextlib import nullcontext

import pytest
import torch
from einops import rearrange

from palm_rlhf_pytorch import native_draw, native_step
from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.native_draw import Kept
from palm_rlhf_pytorch.native_step import NativeStep, packed_step
from palm_rlhf_pytorch.packed_step import PackedStep
from palm_rlhf_pytorch.palm import PaLM

pytestmark = pytest.mark.skipif(library("decode") is None, reason="there is no C++ compiler to be found")

KINDS = {
    "xpos": {},
    "no xpos": {"use_xpos": False},
    "two heads a key": {"kv_heads": 4, "use_xpos": False},
    "nine heads a key": {"heads": 9},
    "a key each": {"kv_heads": 8},
    "wide heads": {"dim_head": 48, "heads": 2},
    "a feedforward that is no multiple of anything": {"ff_inner_dim": 523},
    "widths that are no multiple of anything": {"num_tokens": 53, "dim": 37, "norm_eps": 0.1},
    "window": {"sliding_window": 3},
    "window, a layer that sees everything and turns nothing": {
        "sliding_window": 5,
        "global_layers": [1],
        "kv_heads": 2,
    },
}


def new_palm(**keywords):
    torch.manual_seed(0)
    palm = PaLM(**{"num_tokens": 50, "dim": 32, "depth": 3, "heads": 8, "dim_head": 16, **keywords}).eval()
    for parameter in palm.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return palm


def beforehand(palm, rows):
    """With the first layer computed before the first step."""
    return NativeStep(palm, rows, steps=10**6)


def logits(palm, make_step, lengths, steps=3, room=64):
    """Of some steps after prompts of these lengths, and the cache they leave."""
    rows = len(lengths)
    ids = torch.arange(rows * room).view(rows, room) % 50
    cache = palm.new_cache(rows + 1, room)
    cache.clear(0)
    part = cache.admit(rows, max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    palm(ids[:, : max(lengths)], mask=mask, cache=part, return_only_embedding=True)
    cache.join(part)
    step, found = make_step(palm, rows), []
    for i in range(steps):
        cache.reserve(1)
        found.append(step((torch.arange(rows) + i) % 50, cache))
        cache.advance(1, 1)
    return torch.stack(found), cache.memory[:, :rows]


@torch.no_grad()
@pytest.mark.parametrize("make_step", [NativeStep, beforehand])
@pytest.mark.parametrize("lengths", [[1], [9, 2], [3, 30, 17, 1, 8]])
@pytest.mark.parametrize("kind", KINDS)
def test_native_is_torch(kind, lengths, make_step):
    palm = new_palm(**KINDS[kind])
    (ours, kept), (theirs, expected) = (logits(palm, make, lengths) for make in (make_step, PackedStep))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)


def run(palm, make_step, rows):
    """Logits of 7 steps."""
    step, cache, found = make_step(palm, rows), palm.new_cache(rows, 8), []
    for i in range(7):
        found.append(step((torch.arange(rows) + i) % 50, cache))
        cache.advance(1, 1)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("make_step", [NativeStep, beforehand])
@pytest.mark.parametrize("rows", [6, 7, 8, 9, 15, 16, 17, 23, 32, 33, 70])
def test_a_row_is_the_same_bits_whatever_it_comes_with(rows, make_step):
    palm = new_palm(sliding_window=5)
    many = run(palm, make_step, rows)
    assert torch.equal(many[:, :5], run(palm, make_step, 5))
    torch.testing.assert_close(many, run(palm, PackedStep, rows), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [7, 16, 48, 49, 50, 97])
def test_blocks_of_rows_that_take_turns_with_parts_of_a_weight(rows):
    """Inputs of 150 and 523 are several turns of 128, the last ones shorter; above 48 rows are several groups."""
    palm = new_palm(dim=150, depth=2, ff_inner_dim=523, num_tokens=53)
    for parameter in palm.parameters():
        parameter.mul_(0.3)
    many = run(palm, NativeStep, rows)
    assert torch.equal(many[:, :5], run(palm, NativeStep, 5))
    torch.testing.assert_close(many, run(palm, PackedStep, rows), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("keywords", [{}, {"kv_heads": 4}, {"heads": 6, "dim_head": 80}])
@pytest.mark.parametrize("keys", [5, 6, 7, 23, 24, 25, 47, 48, 49])
def test_any_number_of_keys(keys, keywords):
    """They are scored 4, 6 or 8 at once, and weighed 24 at once."""
    palm = new_palm(**{"depth": 1, "dim_head": 32, **keywords})
    ours, theirs = (logits(palm, make, [keys - 1, 3], steps=1)[0] for make in (NativeStep, PackedStep))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scores_far_apart():
    """Weights from 1 down to what no float32 holds, and maxima that come late."""
    palm = new_palm(depth=1, dim_head=64, use_xpos=False)
    palm.layers[0].fn.fused_attn_ff_proj.weight[: palm.heads * 64] *= 40
    ours, theirs = (logits(palm, make, [39, 12], steps=5)[0] for make in (NativeStep, PackedStep))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1], ids=hex)
def test_what_is_no_number_is_not_hidden(bits):
    palm = new_palm(depth=1)
    cache, other = palm.new_cache(2, 64), palm.new_cache(2, 64)
    for memory in (cache, other):
        palm(torch.arange(60).view(2, 30) % 50, cache=memory, return_only_embedding=True)
    cache.memory[0, 0, 7, 0].view(torch.int32).fill_(bits)  # a key of the first row
    found, clean = (NativeStep(palm, 2)(torch.tensor([1, 2]), memory) for memory in (cache, other))
    assert found[0].isnan().all() and torch.equal(found[1], clean[1])


@torch.no_grad()
def test_many_keys_and_a_cache_that_grows():
    palm = new_palm(dim=16, depth=1)
    caches, steps = [palm.new_cache(2, 16) for _ in range(2)], [make(palm, 2) for make in (NativeStep, PackedStep)]
    for i in range(320):
        tokens, found = torch.tensor([i % 50, (3 * i) % 50]), []
        for step, cache in zip(steps, caches, strict=True):
            cache.reserve(1)
            found.append(step(tokens, cache))
            cache.advance(1, 1)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


LONG = (
    {"kv_heads": 2, "dim_head": 48},
    {"heads": 9},
    {"sliding_window": 600},
    {"sliding_window": 513, "use_xpos": False},
)


@torch.no_grad()
@pytest.mark.parametrize("make_step", [NativeStep, beforehand])
@pytest.mark.parametrize("keywords", LONG)
def test_rows_of_one_span_of_keys_and_of_several(keywords, make_step):
    """1,023 keys are two spans, the next token's 1,024 too, and then there are three."""
    palm = new_palm(dim=16, depth=2, **keywords)
    lengths = [1, 510, 511, 512, 1022, 1100]
    ids = torch.arange(len(lengths) * 1100).view(len(lengths), -1) % 50
    found = []
    for make in (make_step, PackedStep):
        cache = palm.new_cache(len(lengths), 1104)
        mask = torch.arange(1100) < torch.tensor(lengths)[:, None]
        palm(ids, mask=mask, cache=cache, return_only_embedding=True)
        step = make(palm, len(lengths))
        for i in range(4):
            found.append(step((torch.arange(len(lengths)) + i) % 50, cache))
            cache.advance(1, 1)
    torch.testing.assert_close(torch.stack(found[:4]), torch.stack(found[4:]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_by_any_number_of_threads(threads):
    palm = new_palm(kv_heads=2)
    before, found = torch.get_num_threads(), []
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            found.append(logits(palm, NativeStep, [3, 30, 17, 1, 8]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_nothing_is_written_behind_the_cache_nor_read_beside_the_vocabulary():
    palm = new_palm()
    step, cache = NativeStep(palm, 2), palm.new_cache(2, 3)
    with pytest.raises(ValueError, match="2 rows, but there are 1 tokens"):
        step(torch.tensor([1]), cache)
    with pytest.raises(IndexError):
        step(torch.tensor([1, 50]), cache)
    for _ in range(3):
        step(torch.tensor([1, 2]), cache)
        cache.advance(1, 1)
    with pytest.raises(ValueError, match="3 positions, 3 of them taken"):
        step(torch.tensor([1, 2]), cache)
    for other in (new_palm(depth=2), new_palm(kv_heads=2), new_palm(dim_head=32)):
        with pytest.raises(ValueError, match="is not this model's"):
            step(torch.tensor([1, 2]), other.new_cache(2, 3))
    cache = palm.new_cache(2, 3)
    cache.memory = cache.memory.bfloat16()
    with pytest.raises(TypeError, match="bfloat16"):
        step(torch.tensor([1, 2]), cache)


@torch.no_grad()
def test_logits_are_scaled_and_rows_may_be_a_part_of_the_memory():
    palm = new_palm(logit_scale=0.5)
    whole = palm.new_cache(5, 8)
    whole.clear(2)
    part = whole.admit(3, 8)
    found = NativeStep(palm, 3)(torch.tensor([1, 2, 3]), part)
    expected = PackedStep(palm, 3)(torch.tensor([1, 2, 3]), palm.new_cache(3, 8))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keywords", [{"qk_rmsnorm": True}, {"qk_layernorm": True}, {"dim_head": 8}])
def test_what_the_step_does_not_know_is_done_in_torch(keywords):
    assert type(packed_step(new_palm(**keywords), 2, 10)) is PackedStep


def test_without_a_compiler(monkeypatch):
    assert type(packed_step(new_palm(), 2, 10)) is NativeStep
    monkeypatch.setattr("palm_rlhf_pytorch.native_step.library", lambda name: None)
    assert type(packed_step(new_palm(), 2, 10)) is PackedStep


def test_structs_are_those_of_the_source():
    for struct in (native_step.Step, native_step.Layer, native_step.Ahead):
        assert library("decode")[f"size_of_{struct.__name__.lower()}"]() == ctypes.sizeof(struct)


@torch.no_grad()
@pytest.mark.parametrize("change", [torch.bfloat16, torch.float64, "meta"])
def test_defaults_of_torch_decide_nothing(change):
    palm, tokens, default = new_palm(), torch.tensor([1, 2]), torch.get_default_dtype()
    caches = [palm.new_cache(2, 4) for _ in range(2)]
    try:
        if change != "meta":
            torch.set_default_dtype(change)
        with torch.device("meta") if change == "meta" else nullcontext():
            found = NativeStep(palm, 2)(tokens, caches[0])
    finally:
        torch.set_default_dtype(default)
    torch.testing.assert_close(found, PackedStep(palm, 2)(tokens, caches[1]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_of_other_sizes_and_dtypes_are_left_to_torch():
    narrow, headed, double = new_palm(), new_palm(), new_palm()
    narrow.layers[1] = new_palm(ff_mult=2).layers[1]
    headed.layers[2] = new_palm(heads=4, kv_heads=1).layers[2]
    double.layers[1].fn.norm.double()
    wide = new_palm()
    wide.to_logits = type(wide.to_logits)(32, 60, bias=False)
    assert not any(NativeStep.fits(palm) for palm in (narrow, headed, double, wide)) and NativeStep.fits(new_palm())
    step, cache = packed_step(narrow, 2, 10**6), narrow.new_cache(2, 4)
    expected = narrow.next_logits(torch.tensor([1, 2]), narrow.new_cache(2, 4))
    torch.testing.assert_close(step(torch.tensor([1, 2]), cache), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_embedding_of_its_own_is_watched_too():
    palm, tokens = new_palm(), torch.tensor([1, 2])
    palm.to_logits.weight = torch.nn.Parameter(palm.to_logits.weight.detach().clone())
    step = beforehand(palm, 2)
    step(tokens, palm.new_cache(2, 4))
    palm.token_emb.weight.mul_(3)
    expected = PackedStep(palm, 2)(tokens, palm.new_cache(2, 4))
    torch.testing.assert_close(step(tokens, palm.new_cache(2, 4)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_rows():
    palm = new_palm()
    cache = palm.new_cache(2, 4)
    cache.clear(0)
    assert NativeStep(palm, 2)(torch.empty(0, dtype=torch.long), cache).shape == (0, 50)


def test_a_table_is_no_larger_than_the_layer():
    assert NativeStep(new_palm(dim=128), 9, 10**6).computes
    assert not NativeStep(new_palm(dim=128, num_tokens=2000), 9, 10**6).computes


def test_the_first_layer_is_computed_beforehand_where_tokens_enough_are_drawn():
    palm = new_palm()  # 50 tokens
    steps = [NativeStep(palm, rows, steps) for rows in (1, 20) for steps in (4, 9)]
    assert [step.computes for step in steps] == [False, True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("make_step", [NativeStep, beforehand])
def test_weights_that_change_are_laid_out_again(make_step):
    palm = new_palm()
    step, tokens = make_step(palm, 2), torch.tensor([1, 2])
    step(tokens, palm.new_cache(2, 3))
    for parameter in palm.parameters():
        parameter.mul_(1.1)
    expected = PackedStep(palm, 2)(tokens, palm.new_cache(2, 3))
    torch.testing.assert_close(step(tokens, palm.new_cache(2, 3)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make_step", [NativeStep, beforehand])
def test_broken_weights_are_not_hidden(make_step):
    palm = new_palm(depth=1)
    palm.token_emb.weight[3].fill_(torch.nan)
    found, _ = logits(palm, make_step, [2, 2], steps=4)
    assert found[3, 0].isnan().all()  # token 3 is the fourth of the first row


def test_memory_is_kept_from_call_to_call_and_weights_are_laid_out_anew():
    palm, ids = new_palm(), torch.tensor([[1, 2, 3]])
    palm.generate(20, ids)
    kept = native_step.spare[palm]
    palm.to_logits.weight.data.neg_()  # which weights do not tell
    found = palm.generate(20, ids, temperature=0)
    assert native_step.spare[palm] is kept
    torch.testing.assert_close(found, palm.generate(20, ids, temperature=0, decoder="plain"))
    other = new_palm(dim=64)
    native_step.spare[other] = kept  # too little
    found = other.generate(20, ids, temperature=0)
    torch.testing.assert_close(found, other.generate(20, ids, temperature=0, decoder="plain"))


def test_one_who_learns_keeps_no_memory_for_generating():
    palm, ids = new_palm(), torch.tensor([[1, 2, 3]])
    palm.generate(20, ids)
    with torch.no_grad():
        palm(ids)
    assert palm in native_step.spare
    palm(ids)
    assert palm not in native_step.spare
    palm.generate(20, ids)
    palm.bfloat16()
    assert palm not in native_step.spare


@torch.no_grad()
def test_two_who_generate_at_once_have_memory_of_their_own():
    palm, ids = new_palm(), torch.tensor([[1, 2, 3]])
    expected = palm.generate(30, ids, temperature=0, decoder="plain")
    palm.generate(30, ids)  # memory is kept
    stream = palm.stream(30, ids, temperature=0)
    tokens = [next(stream)]
    palm.to_logits.weight.data.neg_()
    palm.generate(30, ids)
    palm.to_logits.weight.data.neg_()
    assert torch.equal(torch.stack([*tokens, *stream], dim=-1), expected)


def packed(weight, panels, *numbers):
    addresses = (ctypes.c_void_p(t.data_ptr()) for t in (weight, panels))
    library("decode").pack(*addresses, *map(ctypes.c_int64, (*weight.shape, *numbers)))


def unpacked(panels, count, inputs):
    """Panels in 4 streams that have an input each in turn, and the inputs that are left -> (count, 16, inputs)."""
    part, left = divmod(inputs, 4)
    streams, rest = panels.split([4 * count * part * 16, count * left * 16])
    streams = rearrange(streams.view(4, count, part, 16), "s p i o -> p o (i s)")
    return torch.cat((streams, rest.view(count, left, 16).mT), dim=-1)


@pytest.mark.parametrize("inputs", [16, 13])
def test_panels_are_filled_up_with_zeros(inputs):
    weight, panels = torch.randn(21, inputs), torch.full((2 * 16 * inputs,), torch.nan)
    packed(weight, panels, 0, inputs, 0, 1)
    rows = unpacked(panels, 2, inputs).flatten(0, 1)
    assert torch.equal(rows[:21], weight) and not rows[21:].any()


def test_panels_of_weights_in_turn():
    weights, panels = torch.randn(2, 21, 13), torch.full((4 * 16 * 13,), torch.nan)
    for first, weight in enumerate(weights):
        packed(weight, panels, 0, 13, first, 2)
    rows = rearrange(unpacked(panels, 4, 13), "(p w) o i -> w (p o) i", w=2)
    assert torch.equal(rows[:, :21], weights) and not rows[:, 21:].any()


def test_panels_of_weights_with_all_of_their_inputs():
    one, other, panels = torch.randn(21, 9), torch.randn(21, 14), torch.full((2 * 16 * 23,), torch.nan)
    packed(one, panels, 0, 23, 0, 1)
    packed(other, panels, 9, 23, 0, 1)
    rows = unpacked(panels, 2, 23).flatten(0, 1)
    assert torch.equal(rows[:21], torch.cat((one, other), dim=-1)) and not rows[21:].any()


@torch.no_grad()
@pytest.mark.parametrize("keywords", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("make_step", [NativeStep, beforehand])
def test_few_tokens_of_prompts_are_read_by_the_step(make_step, keywords):
    palm = new_palm(**keywords)
    step, wholes = make_step(palm, 3), [palm.new_cache(5, 40) for _ in range(2)]
    tokens = torch.arange(3 * 14).view(3, 14) % 50
    for n, lengths in ((9, [9, 1, 5]), (5, [2, 4, 1])):  # the second ones follow the first
        real = torch.arange(n) < torch.tensor(lengths)[:, None]
        if n == 9:
            for whole in wholes:
                whole.clear(1)  # a row is at work already
            ours, theirs = (whole.admit(3, 14) for whole in wholes)
        assert step.read(tokens[:, :n], real, ours)
        palm(tokens[:, :n], mask=real, cache=theirs, return_only_embedding=True)
        assert torch.equal(ours.lengths, theirs.lengths) and ours.filled == theirs.filled
    for whole in wholes:
        for row, length in enumerate(ours.lengths.tolist()):
            whole.memory[:, 1 + row, length:] = 0  # padding, which nobody sees
    torch.testing.assert_close(wholes[0].memory, wholes[1].memory, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_that_follow_more_keys_than_a_task_attends_to():
    palm, tokens = new_palm(), torch.arange(550)[None] % 50
    step, ours, theirs = NativeStep(palm, 1), palm.new_cache(1, 550), palm.new_cache(1, 550)
    for cache in (ours, theirs):
        palm(tokens[:, :540], cache=cache, return_only_embedding=True)
    assert step.read(tokens[:, 540:], torch.ones(1, 10, dtype=torch.bool), ours)
    palm(tokens[:, 540:], cache=theirs, return_only_embedding=True)
    torch.testing.assert_close(ours.memory, theirs.memory, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_who_reads_prompts(monkeypatch):
    palm, ids = new_palm(), torch.arange(24).view(2, 12)
    expected = palm.generate(40, ids, temperature=0, decoder="plain")
    step, cache = NativeStep(palm, 2), palm.new_cache(2, 20)
    monkeypatch.setattr(native_step, "MOST_READ", 21)
    real = torch.ones(2, 11, dtype=torch.bool)
    assert not step.read(ids[:, :11], real, cache) and cache.filled == 0
    assert not step.read(ids[:, :11], torch.zeros_like(real), cache)
    read = []
    monkeypatch.setattr(
        palm, "forward", lambda *args, **kwargs: read.append(args) or type(palm).forward(palm, *args, **kwargs)
    )
    assert torch.equal(palm.generate(40, ids, temperature=0), expected) and read
    read.clear()
    monkeypatch.setattr(native_step, "MOST_READ", 22)
    assert torch.equal(palm.generate(40, ids, temperature=0), expected) and not read
    with pytest.raises(ValueError, match=r"reserve\(21\)"):
        step.read(torch.zeros(1, 21, dtype=torch.long), torch.ones(1, 21, dtype=torch.bool), palm.new_cache(1, 20))


@torch.no_grad()
def test_weights_that_changed_are_read_with():
    palm, tokens, real = new_palm(), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    step, ours, theirs = NativeStep(palm, 1), palm.new_cache(1, 4), palm.new_cache(1, 4)
    palm.layers[0].fn.fused_attn_ff_proj.weight.mul_(2)
    assert step.read(tokens, real, ours)
    palm(tokens, cache=theirs)
    torch.testing.assert_close(ours.memory, theirs.memory, rtol=1e-4, atol=1e-4)


# several steps in one call


def one_by_one(step, tokens, cache, steps, kept, uniform, ends):
    """`NativeStep.ahead`, in single steps."""
    found, many = [], len(tokens)
    for i in range(steps):
        logits = step(tokens, cache)
        tokens, log_probs = native_draw.drawn(logits, uniform[i * many : (i + 1) * many], kept)
        found.append((tokens, log_probs))
        cache.advance(1, 1)
        if torch.isin(tokens, ends).any():
            break
    return tuple(map(torch.stack, zip(*found, strict=True)))


def both_ways(palm, make_step, lengths, steps, kept=None, ends=(), room=64):
    """What is drawn after prompts of these lengths (and memory, and positions), in one call and step by step."""
    ids, rows = torch.arange(len(lengths) * room).view(-1, room) % 50, len(lengths)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    uniform = torch.rand(steps * rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    how = steps, kept or Kept(1.0, palm.num_tokens), uniform, torch.tensor(ends, dtype=torch.long)
    results = []
    for together in (True, False):
        cache, step = palm.new_cache(rows, room), make_step(palm, rows)
        palm(ids[:, : max(lengths)], mask=mask, cache=cache, return_only_embedding=True)
        if together:
            drawn = step.ahead(ids[:, 0], cache, *how)
            cache.advance(len(drawn[0]), len(drawn[0]))
        else:
            drawn = one_by_one(step, ids[:, 0], cache, *how)
        results.append((*drawn, cache.memory, cache.lengths))
    return results


@torch.no_grad()
@pytest.mark.parametrize("make_step", [NativeStep, beforehand])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_ahead_are_steps(kind, make_step):
    palm = new_palm(**KINDS[kind])
    ours, theirs = both_ways(palm, make_step, [3, 30, 17], 12)
    assert ours[0].shape == (12, 3) and len(ours[0].unique()) > 9
    assert all(map(torch.equal, ours, theirs))


@torch.no_grad()
@pytest.mark.parametrize("kept", [Kept(0.0, 50), Kept(0.7, 9, 0.8, 0.7)], ids=str)
def test_steps_ahead_draw_as_they_are_told(kept):
    ours, theirs = both_ways(new_palm(logit_scale=0.3), NativeStep, [3, 30, 17], 12, kept)
    assert all(map(torch.equal, ours, theirs))


@torch.no_grad()
def test_steps_ahead_into_keys_of_another_task():
    ours, theirs = both_ways(new_palm(depth=2), NativeStep, [505, 2], 20, room=530)
    assert all(map(torch.equal, ours, theirs))


@torch.no_grad()
def test_steps_ahead_end_with_the_first_row_that_does():
    palm = new_palm()
    free = both_ways(palm, NativeStep, [3, 30, 17], 12)[0][0]
    ends = free[7, 1].item(), 10**6
    first = int((free == ends[0]).any(dim=1).nonzero()[0])
    ours, theirs = both_ways(palm, NativeStep, [3, 30, 17], 12, ends=ends)
    assert all(map(torch.equal, ours, theirs))
    assert 0 < first < 11 and torch.equal(ours[0], free[: first + 1])
    assert ours[3].tolist() == [4 + first, 31 + first, 18 + first]


@torch.no_grad()
def test_steps_ahead_need_room_and_know_of_changed_weights():
    palm, tokens, kept = new_palm(), torch.tensor([1]), Kept(0.0, 50)
    step, cache = NativeStep(palm, 1), palm.new_cache(1, 20)
    with pytest.raises(ValueError, match=r"reserve\(21\)"):
        step.ahead(tokens, cache, 21, kept, None, None)
    with pytest.raises(ValueError, match="has 1 rows, but there are 2 tokens"):
        step.ahead(torch.tensor([1, 2]), cache, 3, kept, None, None)
    palm.to_logits.weight.neg_()
    expected = NativeStep(palm, 1).ahead(tokens, palm.new_cache(1, 20), 20, kept, None, None)
    assert all(map(torch.equal, step.ahead(tokens.int(), cache, 20, kept, None, None), expected))
