"""The first layer computes each different token once: the same results and gradients as place by place."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from palm_rlhf_pytorch import palm as palm_module
from palm_rlhf_pytorch import repeated_tokens as module
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.repeated_tokens import repeated_tokens
from palm_rlhf_pytorch.reward import RewardModel


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 1)
    monkeypatch.setattr(module, "ROUND", 1)


def test_which_and_first():
    found = repeated_tokens(torch.tensor([[7, 3, 7, 7], [3, 3, 9, 7]]))
    assert found.first.tolist() == [1, 0, 6] and found.which.tolist() == [[1, 0, 1, 1], [0, 0, 2, 1]]
    x = torch.tensor([[7.0, 3, 7, 7], [3, 3, 9, 7]])[..., None]
    assert found.once(x).tolist() == [[3], [7], [9]] and torch.equal(found.everywhere(found.once(x)), x)


def test_filled_up_to_a_round_number(monkeypatch):
    monkeypatch.setattr(module, "ROUND", 4)
    ids = torch.tensor([[7, 3, 7, 7], [3, 3, 9, 7]])
    found, x = repeated_tokens(ids), ids[..., None].float()
    assert found.first.tolist() == [1, 0, 6, 0] and torch.equal(found.everywhere(found.once(x)), x)
    monkeypatch.setattr(module, "ROUND", 7)
    assert repeated_tokens(ids) is None  # 7 of 8 places


def test_only_where_it_is_worth_it(monkeypatch):
    assert repeated_tokens(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 7]])) is None  # 7 of 8 differ
    assert repeated_tokens(torch.tensor([[1, 2, 3, 4], [5, 6, 6, 6]])) is not None  # 6 of 8
    monkeypatch.setattr(module, "LEAST", 9)
    assert repeated_tokens(torch.ones(2, 4, dtype=torch.long)) is None
    assert repeated_tokens(torch.ones(1, 9, dtype=torch.long)) is not None


KINDS = {
    "plain": {},
    "no xpos, normalised": {"use_xpos": False, "qk_layernorm": True, "kv_heads": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "encoder": {"causal": False},
    "attention's dropout is by place anyway": {"attn_dropout": 0.3},
    "adapters": {"finetune_scopes": ["a"]},
    "adapters in the feedforward": {"finetune_scopes": ["a"], "lora_ff": True},
}


@pytest.mark.parametrize("multiple", [1, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_with_and_without(monkeypatch, kind, multiple):
    monkeypatch.setattr(module, "ROUND", multiple)

    def run(shared):
        used = []
        monkeypatch.setattr(
            palm_module, "repeated_tokens", lambda ids: used.append(r := repeated_tokens(ids) if shared else None) or r
        )
        torch.manual_seed(0)
        palm = PaLM(num_tokens=9, dim=16, depth=2, dim_head=8, heads=4, **KINDS[kind])
        for parameter in palm.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        scope = "a" if "finetune_scopes" in KINDS[kind] else None
        ids = torch.randint(0, 9, (3, 14))
        ids[1, 10:] = -1  # padding
        torch.manual_seed(1)
        embeds = palm(ids, return_only_embedding=True, finetune_scope=scope)
        (embeds * torch.linspace(-1, 1, 16)).sum().backward()
        assert (used[0] is not None) == shared
        return embeds.detach(), [p.grad for p in palm.parameters()]

    (ours, learned), (theirs, expected) = run(True), run(False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(learned, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_prompts_read_into_a_cache(monkeypatch):
    palm = PaLM(num_tokens=5, dim=16, depth=2, dim_head=8, heads=2)
    ids, caches = torch.randint(0, 5, (2, 12)), []
    for find in (repeated_tokens, lambda ids: None):
        monkeypatch.setattr(palm_module, "repeated_tokens", find)
        caches.append(palm.new_cache(2, 12))
        palm(ids, cache=caches[-1])
    torch.testing.assert_close(caches[0].memory, caches[1].memory)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_reward_model_s_prompts_and_responses_are_tokens_of_their_own(monkeypatch, depth):
    def run(shared):
        used = []
        monkeypatch.setattr(
            palm_module, "repeated_tokens", lambda ids: used.append(r := repeated_tokens(ids) if shared else None) or r
        )
        torch.manual_seed(0)
        palm = PaLM(num_tokens=9, dim=16, depth=depth, dim_head=8, heads=4)
        model = RewardModel(palm, num_binned_output=3, use_lora=False, dropout=0.0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        lengths = torch.tensor([5, 5, 5, 5, 5, 9])
        ids = torch.randint(0, 9, (6, 14))
        model.rate(ids, torch.arange(14) < lengths[:, None]).sum().backward()
        assert not shared or len(used[0].first) == 18  # each token twice
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def noisy(module, arguments, made):
    return made + torch.linspace(-1, 1, made.numel()).view(made.shape)


class Learned(torch.nn.Embedding):
    """Positions too."""


CHANGES = {
    "a hook on the embedding": lambda palm: palm.token_emb.register_forward_hook(noisy),
    "a hook on the norm": lambda palm: palm.layers[0].fn.norm.register_forward_hook(noisy),
    "an embedding of another kind": lambda palm: setattr(palm, "token_emb", Learned(5, 16)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_not_where_something_may_depend_on_the_place(monkeypatch, change):
    palm = PaLM(num_tokens=5, dim=16, depth=1, dim_head=8, heads=2)
    assert palm._begins_by_token()
    CHANGES[change](palm)
    monkeypatch.setattr(palm_module, "repeated_tokens", lambda ids: pytest.fail("places may differ"))
    palm(torch.ones(2, 9, dtype=torch.long))


def test_without_numbers():
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert repeated_tokens(torch.ones(2, 9, dtype=torch.long)) is None


@pytest.mark.parametrize("mode", ["added by place", "dropout"])
def test_not_where_places_differ(monkeypatch, mode):
    monkeypatch.setattr(palm_module, "repeated_tokens", lambda ids: pytest.fail("places differ"))
    palm = PaLM(num_tokens=5, dim=16, depth=1, dim_head=8, heads=2, ff_dropout=0.5 if mode == "dropout" else 0.0)
    palm(torch.ones(2, 9, dtype=torch.long), extra_embed=torch.randn(2, 9, 16) if mode != "dropout" else None)


def test_dropout_does_no_harm_in_evaluation():
    palm = PaLM(num_tokens=5, dim=16, depth=1, dim_head=8, heads=2, ff_dropout=0.5)
    assert palm.layers[0].fn.drops and not palm.eval().layers[0].fn.drops


def test_what_is_added_may_be_told_apart(monkeypatch):
    seen = []
    monkeypatch.setattr(palm_module, "repeated_tokens", lambda ids: seen.append(ids) or repeated_tokens(ids))
    palm, ids = PaLM(num_tokens=5, dim=16, depth=2, dim_head=8, heads=2), torch.randint(0, 5, (3, 12))
    kinds = torch.arange(12).expand(3, 12) % 3
    added = torch.randn(3, 16)[kinds]
    losses = [palm(ids, True, extra_embed=added, extra_kinds=k) for k in (kinds, None)]
    torch.testing.assert_close(*losses)
    assert len(seen) == 1 and seen[0].shape == (3, 11)  # the last token is only predicted
    assert torch.equal(seen[0] % 5, ids[:, :11]) and torch.equal(seen[0] // 5, kinds[:, :11])
