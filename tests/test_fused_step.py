"""The pass in C++ between a decoding step's products is the one in torch's operations, row by row."""

import pytest
import torch

from palm_rlhf_pytorch import packed_step
from palm_rlhf_pytorch.fused_step import Fused
from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.packed_step import InTorch, PackedStep
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


def logits(palm, between, lengths, steps=3, room=64):
    """Of some steps after prompts of these lengths, and the cache they leave."""
    rows = len(lengths)
    ids = torch.arange(rows * 40).view(rows, 40) % 50
    cache = palm.new_cache(rows + 1, room)
    cache.clear(0)
    part = cache.admit(rows, max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    palm(ids[:, : max(lengths)], mask=mask, cache=part, return_only_embedding=True)
    cache.join(part)
    step, found = PackedStep(palm, rows), []
    assert step.between is Fused
    step.between = between
    for i in range(steps):
        cache.reserve(1)
        found.append(step((torch.arange(rows) + i) % 50, cache))
        cache.advance(1, 1)
    return torch.stack(found), cache.memory[:, :rows]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1], [9, 2], [3, 30, 17, 1, 8]])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_is_torch(kind, lengths):
    palm = new_palm(**KINDS[kind])
    (ours, kept), (theirs, expected) = (logits(palm, between, lengths) for between in (Fused, InTorch))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_many_keys_and_a_cache_that_grows():
    palm = new_palm(dim=16, depth=1)
    cache = [palm.new_cache(2, 16) for _ in range(2)]
    steps = [PackedStep(palm, 2) for _ in range(2)]
    steps[1].between = InTorch
    for i in range(packed_step.PACKED_FOR * 5):
        tokens, found = torch.tensor([i % 50, (3 * i) % 50]), []
        for step, memory in zip(steps, cache, strict=True):
            memory.reserve(1)
            found.append(step(tokens, memory))
            memory.advance(1, 1)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scores_far_apart_and_large():
    palm = new_palm(depth=1)
    palm.layers[0].fn.fused_attn_ff_proj.weight.mul_(8)
    (ours, _), (theirs, _) = (logits(palm, between, [20, 5]) for between in (Fused, InTorch))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_nothing_is_written_behind_the_cache():
    palm = new_palm()
    step, cache = PackedStep(palm, 2), palm.new_cache(2, 3)
    with pytest.raises(ValueError, match="2 rows, but there are 1 tokens"):
        step(torch.tensor([1]), cache)
    for _ in range(3):
        step(torch.tensor([1, 2]), cache)
        cache.advance(1, 1)
    with pytest.raises(ValueError, match="3 positions are taken"):
        step(torch.tensor([1, 2]), cache)
    cache = palm.new_cache(2, 3)
    cache.memory = cache.memory.bfloat16()
    with pytest.raises(TypeError, match="bfloat16"):
        step(torch.tensor([1, 2]), cache)


@pytest.mark.parametrize("keywords", [{"qk_rmsnorm": True}, {"qk_layernorm": True}, {"dim_head": 8}])
def test_what_the_pass_does_not_know_is_done_in_torch(keywords):
    assert PackedStep(new_palm(**keywords), 2).between is InTorch


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr("palm_rlhf_pytorch.fused_step.library", lambda name: None)
    assert PackedStep(new_palm(), 2).between is InTorch


@torch.no_grad()
def test_broken_weights_are_not_hidden():
    palm = new_palm(depth=1)
    palm.token_emb.weight[3].fill_(torch.nan)
    found, _ = logits(palm, Fused, [2, 2], steps=4)
    assert found[3, 0].isnan().all()  # token 3 is the fourth of the first row
