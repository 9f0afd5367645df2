"""The last layer at wanted places alone: the same results and gradients as everywhere and then chosen."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from palm_rlhf_pytorch import palm as palm_module
from palm_rlhf_pytorch import places as module
from palm_rlhf_pytorch import repeated_tokens as repeated_tokens_module
from palm_rlhf_pytorch import shared_prompts
from palm_rlhf_pytorch.actor import Actor
from palm_rlhf_pytorch.attention import Attention
from palm_rlhf_pytorch.blocks import ParallelTransformerBlock
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.places import columns_of, worth_it

B, N = 4, 13
AT = torch.arange(N)
LENGTHS = torch.tensor([13, 9, 5, 11])[:, None]

WANTED = {
    "responses to prompts of one length": (AT >= 4).expand(B, N),
    "late columns": (AT >= 9).expand(B, N),
    "ragged": (AT >= torch.tensor([3, 1, 2, 6])[:, None]) & (AT < LENGTHS),
    "ragged and late": (AT >= torch.tensor([12, 7, 7, 9])[:, None]) & (AT < torch.tensor([13, 8, 10, 11])[:, None]),
    "each row's last": AT == LENGTHS - 1,
    "one column": (AT == 12).expand(B, N),
    "spans": (AT % 4 == 2) & (AT < LENGTHS),
    "one": (AT == 6) & (torch.arange(B)[:, None] == 2),
    "none": (AT < 0).expand(B, N),
    "all": (AT >= 0).expand(B, N),
}

LEFT = AT >= torch.tensor([0, 4, 8, 2])[:, None]
SEGMENTS = torch.tensor([[0] * 5 + [1] * 8, [0] * 13, [0] * 2 + [1] * 4 + [2] * 7, [0] * 9 + [1] * 4])

KINDS = {
    "plain": {},
    "no xpos, grouped heads": {"use_xpos": False, "kv_heads": 2},
    "normalised": {"qk_layernorm": True, "kv_heads": 2},
    "of one length": {"qk_rmsnorm": True},
    "windows": {"sliding_window": 3},
    "a window but in the last": {"sliding_window": 3, "global_layers": [1]},
    "checkpointing": {"gradient_checkpointing": True},
    "adapters": {"finetune_scopes": ["a"]},
    "adapters in the feedforward": {"finetune_scopes": ["a"], "lora_ff": True, "kv_heads": 4},
    "padded on the left": {"mask": LEFT},
    "padded on the left, windows": {"mask": LEFT, "sliding_window": 4},
    "packed": {"segment_ids": SEGMENTS},
    "an encoder": {"causal": False},
    "a padded encoder": {"causal": False, "mask": AT < LENGTHS},
    "a packed encoder": {"causal": False, "segment_ids": SEGMENTS, "qk_rmsnorm": True},
    "added by place": {"extra_embed": torch.linspace(-1, 1, B * N * 16).view(B, N, 16)},
    "one layer": {"depth": 1},
    "three layers": {"depth": 3},
}
OF_FORWARD = ("mask", "segment_ids", "extra_embed")


def made(**keywords) -> PaLM:
    """In float64, with weights that all matter."""
    torch.manual_seed(0)
    palm = PaLM(**{"num_tokens": 40, "dim": 16, "depth": 2, "dim_head": 8, "heads": 4, **keywords}).double()
    for name, parameter in palm.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("scale") else 0.0, std=0.3)
    return palm


def of_kind(kind: str):
    """A palm, and how to call it with ids."""
    keywords = dict(KINDS[kind])
    told = {name: keywords.pop(name) for name in OF_FORWARD if name in keywords}
    scope = "a" if "finetune_scopes" in keywords else None
    palm = made(**keywords)
    return palm, partial(palm, return_only_embedding=True, finetune_scope=scope, **told)


def ids_of(tokens: int = 40):
    return torch.randint(0, tokens, (B, N), generator=torch.Generator().manual_seed(1))


def learned(palm, embeds):
    """Some loss's gradients, by name."""
    palm.zero_grad()
    (embeds * torch.linspace(-1, 1, embeds.numel(), dtype=embeds.dtype).view_as(embeds)).sum().backward()
    return {name: p.grad.clone() for name, p in palm.named_parameters() if p.grad is not None}


def assert_same(palm, ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    found, expected = learned(palm, ours), learned(palm, theirs)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=10 * tolerance, msg=name)


@pytest.fixture
def chosen(monkeypatch):
    """The places that passes found worth it, or None."""
    found = []
    monkeypatch.setattr(palm_module, "worth_it", lambda wanted: found.append(p := worth_it(wanted)) or p)
    return found


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_all_and_then_chosen(chosen, kind, wanted):
    mask = WANTED[wanted]
    palm, call = of_kind(kind)
    ours, theirs = call(ids_of(), places=mask), call(ids_of())[mask]
    assert ours.shape == (int(mask.sum()), 16) and (chosen[0] is None) == (wanted == "all")
    assert_same(palm, ours, theirs)


@pytest.mark.parametrize("kind", ["plain", "windows", "packed", "an encoder"])
def test_the_same_in_all_columns(monkeypatch, kind):
    """As on a GPU."""
    monkeypatch.setattr(module, "columns_of", lambda wanted: slice(0, wanted.shape[1]))
    (palm, call), mask = of_kind(kind), WANTED["ragged and late"]
    assert_same(palm, call(ids_of(), places=mask), call(ids_of())[mask])


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("scope", [None, "a"])
def test_where_only_adapters_are_trained(wanted, scope):
    palm, ids, mask = made(finetune_scopes=["a"]), ids_of(), WANTED[wanted]
    for parameter in palm.palm_parameters():
        parameter.requires_grad_(parameter is palm.layers[0].fn.norm.gamma)  # else nothing would be trained without
    call = partial(palm, ids, return_only_embedding=True, finetune_scope=scope)
    assert_same(palm, call(places=mask), call()[mask])


@pytest.mark.parametrize("wanted", ["ragged", "late columns", "none"])
def test_in_other_precisions(wanted):
    palm, ids, mask = made().float(), ids_of(), WANTED[wanted]
    call = partial(palm, ids, return_only_embedding=True)
    assert_same(palm, call(places=mask), call()[mask], 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(call(places=mask), call()[mask], rtol=0.05, atol=0.1)
    palm.bfloat16()
    torch.testing.assert_close(call(places=mask), call()[mask], rtol=0.05, atol=0.1)


def test_without_gradients(chosen):
    palm, mask = made().float(), WANTED["ragged"]
    with torch.no_grad():
        ours = palm(ids_of(), return_only_embedding=True, places=mask)
        torch.testing.assert_close(ours, palm(ids_of(), return_only_embedding=True)[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "windows", "no xpos, grouped heads"])
@pytest.mark.parametrize("wanted", ["each row's last", "ragged and late", "none"])
def test_prompts_read_into_a_cache(kind, wanted):
    """And what follows in it."""
    mask, found = WANTED[wanted], []
    palm, call = of_kind(kind)
    after = (AT[:4] > 1).expand(B, 4)
    with torch.no_grad():
        for first, then in ((mask, after), (None, None)):
            cache = palm.new_cache(B, 20)
            embeds = call(ids_of(), mask=AT < LENGTHS, cache=cache, places=first)
            more = call(ids_of()[:, :4], cache=cache, places=then)
            found.append((embeds, more, cache.memory, cache.lengths))
    (ours, ours_after, *kept), (theirs, theirs_after, *expected) = found
    torch.testing.assert_close(ours, theirs[mask], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours_after, theirs_after[after], rtol=1e-12, atol=1e-12)
    for a, b in zip(kept, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropped", [{"attn_dropout": 1.0}, {"ff_dropout": 1.0}])
def test_dropout(chosen, dropped):
    """All of it, which is the same every time."""
    palm, mask = made(**dropped).train(), WANTED["ragged"]
    call = partial(palm, ids_of(), return_only_embedding=True)
    assert_same(palm, call(places=mask), call()[mask])
    assert chosen[0] is not None


@pytest.mark.parametrize("depth", [1, 2])
def test_repeated_tokens_too(monkeypatch, chosen, depth):
    """A first layer reads them once; where it is the last as well, that is all."""
    monkeypatch.setattr(repeated_tokens_module, "LEAST", 1)
    monkeypatch.setattr(repeated_tokens_module, "ROUND", 1)
    palm, mask = made(depth=depth), WANTED["ragged"]
    ours = palm(ids_of(9), return_only_embedding=True, places=mask)
    assert len(chosen) == depth - 1
    monkeypatch.setattr(palm_module, "repeated_tokens", lambda ids: None)
    assert_same(palm, ours, palm(ids_of(9), return_only_embedding=True)[mask], 1e-11)


# what is saved


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_feedforward_sees_wanted_places_alone(feedforward_rows, kind):
    (_, call), mask = of_kind(kind), WANTED["ragged"]
    call(ids_of(), places=mask)
    *before, last = feedforward_rows
    assert last == mask.sum() < B * N and set(before) <= {B * N}


def test_attention_sees_their_columns_alone(monkeypatch):
    seen, attend = [], Attention.forward

    def spy(self, q, k, v, mask=None):
        seen.append((q.shape[2], k.shape[2]))
        return attend(self, q, k, v, mask)

    monkeypatch.setattr(Attention, "forward", spy)
    palm = made()
    for wanted in ("ragged and late", "ragged", "each row's last", "one"):
        palm(ids_of(), return_only_embedding=True, places=WANTED[wanted])
    # a causal square where queries begin in the first half, else a rectangle; of keys none that comes later
    assert seen[1::2] == [(6, 13), (13, 13), (13, 13), (1, 7)]
    seen.clear()
    palm(ids_of(), return_only_embedding=True, places=WANTED["none"], cache=palm.new_cache(B, N))
    assert seen == [(13, 13), (0, 0)]


@pytest.mark.parametrize("shared", [False, True])
def test_policies_and_references(monkeypatch, feedforward_rows, shared):
    monkeypatch.setattr(shared_prompts.SharedPrompts, "pays", lambda *_: shared)
    palm, ids, mask = made(), ids_of(), (AT >= 4) & (AT < LENGTHS)
    ids[:, :3] = torch.tensor([3, 3, 4, 4])[:, None]  # two prompts, without their last token
    Actor(palm, actor_lora=False).reference_log_probs(ids, mask)
    assert feedforward_rows == ([2 * 3, 0, B * 9, 22] if shared else [B * 12, 22]) and mask.sum() == 22
    ours = shared_prompts.predicting_embeds(palm, ids, mask)
    assert_same(palm, ours, palm(ids[:, :-1], return_only_embedding=True)[mask[:, 1:]], 1e-11)


def test_prefill_fills_the_cache_alone(feedforward_rows):
    palm = made().float()
    palm.generate(8, ids_of()[:, :6], decoder="packed")
    assert feedforward_rows[:2] == [B * 5, 0]


# where all is computed


class Subclassed(ParallelTransformerBlock):
    """Which may do otherwise."""


CHANGES = {
    "a hook on the last layer": lambda palm: palm.layers[1].register_forward_hook(lambda *_: None),
    "a hook within it": lambda palm: palm.layers[1].fn.ff_out[2].register_forward_pre_hook(lambda *_: None),
    "a hook on the norm": lambda palm: palm.norm.register_forward_hook(lambda *_: None),
    "a subclassed block": lambda palm: setattr(palm.layers[1].fn, "__class__", Subclassed),
    "another residual": lambda palm: (
        setattr(palm.layers, "1", torch.nn.Module()) or setattr(palm.layers[1], "forward", lambda x, *_, **__: x)
    ),
    "another norm": lambda palm: setattr(palm, "norm", torch.nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_is_computed_where_the_end_is_not_as_it_was_made(chosen, change):
    palm, mask = made(), WANTED["ragged"]
    CHANGES[change](palm)
    ours = palm(ids_of(), return_only_embedding=True, places=mask)
    assert torch.equal(ours, palm(ids_of(), return_only_embedding=True)[mask]) and not chosen


def test_while_compiling_and_without_numbers(chosen):
    palm, mask = made(), WANTED["ragged"]
    ours = torch.compile(palm, backend="eager")(ids_of(), return_only_embedding=True, places=mask)
    torch.testing.assert_close(ours, palm(ids_of(), return_only_embedding=True)[mask])
    assert not any(chosen)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert worth_it(torch.ones(2, 9, dtype=torch.bool)) is None


def test_where_it_is_worth_it(monkeypatch):
    mask = torch.arange(40).view(2, 20) < 37
    found = worth_it(mask)
    assert found.index.tolist() == list(range(37)) and found.columns == slice(0, 20)
    assert worth_it(torch.arange(40).view(2, 20) < 38) is None and worth_it(mask[:0]) is None


def test_places_by_hand():
    mask = torch.tensor([[False, False, False, True], [False, False, True, True]])
    assert columns_of(mask) == slice(2, 4) and columns_of(mask[:, 1:]) == slice(0, 3)  # begun in the first half
    found, x = worth_it(mask), torch.arange(8.0).view(2, 4, 1)
    assert found.columns == slice(2, 4) and found.of(x).tolist() == [[3], [6], [7]]
    assert found.spread(found.of(x)).squeeze(-1).tolist() == [[0, 0, 0, 3], [0, 0, 6, 7]]
    inside = found.within_columns()
    assert inside.shape == (2, 2) and inside.spread(found.of(x)).squeeze(-1).tolist() == [[0, 3], [6, 7]]


def test_what_is_refused():
    palm, mask = made(), WANTED["ragged"]
    with pytest.raises(ValueError, match="return_only_embedding"):
        palm(ids_of(), places=mask)
    for wrong in (mask[:, 1:], mask[:1], mask.long()):
        with pytest.raises(ValueError, match="one for each"):
            palm(ids_of(), return_only_embedding=True, places=wrong)
