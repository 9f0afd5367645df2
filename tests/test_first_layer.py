"""What a frozen first layer makes of each token is kept through an update: the same results and gradients."""

import pickle
from copy import deepcopy

import pytest
import torch
from tiny import TRAIN, tiny_actor_critic, tiny_palm, tiny_trainer

from palm_rlhf_pytorch import first_layer as module
from palm_rlhf_pytorch.first_layer import before_attention, is_small
from palm_rlhf_pytorch.palm import PaLM

TOKENS = 9
IDS = torch.randint(0, TOKENS, (3, 14), generator=torch.Generator().manual_seed(0))


def frozen(adapters=True, **keywords):
    torch.manual_seed(0)
    palm = PaLM(**{"num_tokens": TOKENS, "dim": 16, "depth": 2, "dim_head": 8, "heads": 4, **keywords})
    for parameter in palm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(False)
    if adapters:
        palm.add_finetune_params("a")
        for parameter in palm.finetune_modules.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return palm


@pytest.fixture
def made(monkeypatch):
    """One entry each time that a vocabulary is gone through."""
    times = []
    monkeypatch.setattr(module, "before_attention", lambda palm: times.append(palm) or before_attention(palm))
    return times


def test_by_hand():
    palm = frozen(adapters=False)
    block, embeds = palm.layers[0].fn, palm.token_emb.weight
    normed, qkv, ff = before_attention(palm)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(embeds, (16,)) * (block.norm.gamma + 1))
    projected = normed @ block.fused_attn_ff_proj.weight.t()
    width = block.ff_out[2].weight.shape[1]
    value, gate = projected[:, -2 * width :].chunk(2, dim=-1)
    torch.testing.assert_close(qkv, projected[:, : -2 * width])
    torch.testing.assert_close(ff, (value * torch.nn.functional.silu(gate)) @ block.ff_out[2].weight.t())


KINDS = {
    "plain": {},
    "no xpos, normalised": {"use_xpos": False, "qk_layernorm": True, "kv_heads": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "encoder": {"causal": False},
    "one layer": {"depth": 1},
}


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_with_and_without(kind, adapters, made):
    palm, ids = frozen(adapters, **KINDS[kind]), IDS.clone()
    ids[1, 10:] = -1  # padding
    learned, found = list(palm.finetune_modules.parameters()), []
    for kept in (True, False):
        torch.manual_seed(1)
        if kept:
            with palm.first_layer_kept():
                runs = [palm(ids, return_only_embedding=True, finetune_scope="a" if adapters else None) for _ in "ab"]
            assert torch.equal(*runs)
        else:
            runs = [palm(ids, return_only_embedding=True, finetune_scope="a" if adapters else None)]
        gradients = torch.autograd.grad((runs[-1] * torch.linspace(-1, 1, 16)).sum(), learned) if adapters else ()
        found.append((runs[-1].detach(), *gradients))
    assert len(made) == 1  # in two passes
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_places_and_a_cache(made):
    palm, places = frozen(), torch.rand(IDS.shape) > 0.5
    with torch.no_grad():
        for given in ({"places": places}, {}):
            caches, found = [palm.new_cache(3, 14) for _ in "ab"], []
            with palm.first_layer_kept():
                found.append(palm(IDS, return_only_embedding=True, cache=caches[0], **given))
            found.append(palm(IDS, return_only_embedding=True, cache=caches[1], **given))
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(caches[0].memory, caches[1].memory, rtol=1e-4, atol=1e-4)
    assert len(made) == 2


def changed_in_place(palm):
    with torch.no_grad():
        palm.layers[0].fn.ff_out[2].weight.mul_(2)


def exchanged(palm):
    into = palm.layers[0].fn.fused_attn_ff_proj
    new = torch.nn.Parameter(into.weight * 2, requires_grad=False)
    while new._version < into.weight._version:  # as often written to
        new.mul_(1.0)
    into.weight = new


def put_elsewhere(palm):
    into = palm.layers[0].fn.fused_attn_ff_proj
    into.weight.data = into.weight * 2


def loaded(palm):
    palm.load_state_dict({name: t * 2 for name, t in palm.state_dict().items()})


@pytest.mark.parametrize("change", [changed_in_place, exchanged, put_elsewhere, loaded])
def test_written_weights_are_noticed(change, made):
    palm = frozen(adapters=False)
    with torch.no_grad(), palm.first_layer_kept():
        before = palm(IDS)
        change(palm)
        after = palm(IDS)
        assert len(made) == 2 and not torch.allclose(before, after)
    torch.testing.assert_close(after, palm(IDS), rtol=1e-4, atol=1e-4)


def test_made_without_gradient_learned_with(made):
    palm = frozen()
    with palm.first_layer_kept():
        with torch.inference_mode():
            palm(IDS, finetune_scope="a")
        palm(IDS, finetune_scope="a").sum().backward()
    assert len(made) == 1 and all(p.grad is not None for p in palm.finetune_modules["a"][0].parameters())


def test_merged_adapters_are_other_weights(made):
    palm = frozen()
    with torch.no_grad(), palm.first_layer_kept():
        plain = palm(IDS)
        with palm.merged("a"):
            merged = palm(IDS)
        again = palm(IDS)
        torch.testing.assert_close(merged, palm(IDS, finetune_scope="a"), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4)
    assert palm.first_layer is None and not torch.allclose(plain, merged)


def test_adapters_merged_for_good_are_other_weights(made):
    palm = frozen()
    with torch.no_grad(), palm.first_layer_kept():
        palm(IDS)
        expected = palm(IDS, finetune_scope="a")
        palm.merge_finetune_params("a")
        torch.testing.assert_close(palm(IDS), expected, rtol=1e-4, atol=1e-4)
    assert len(made) == 2


def test_copies_and_files_keep_nothing():
    palm = frozen()
    with torch.no_grad(), palm.first_layer_kept():
        palm(IDS)
        copies = deepcopy(palm), pickle.loads(pickle.dumps(palm))
        assert palm.first_layer.tokens is not None
    for copy in copies:
        assert copy.first_layer is None and torch.equal(copy(IDS), palm(IDS))
    del copies[0].__dict__["first_layer"]  # as in a file of an earlier version
    assert torch.equal(copies[0](IDS), palm(IDS))


def test_contexts_nest():
    palm = frozen()
    with palm.first_layer_kept():
        outer = palm.first_layer
        with pytest.raises(ZeroDivisionError), palm.first_layer_kept():
            assert palm.first_layer is not outer
            raise ZeroDivisionError
        assert palm.first_layer is outer
    assert palm.first_layer is None


def trainable(palm):
    palm.layers[0].fn.norm.gamma.requires_grad_()


NOT = {
    "trained": (trainable, {}),
    "an adapted feedforward": (lambda palm: None, {"finetune_scopes": ["a"], "lora_ff": True}),
    "a large vocabulary": (lambda palm: None, {"num_tokens": 33}),
    "sentences of half precision": (lambda palm: None, {}),
    "a feedforward that drops": (lambda palm: None, {"ff_dropout": 0.5}),
}


@pytest.mark.parametrize("kind", NOT)
def test_not_where_it_would_be_wrong_or_no_gain(kind, made):
    change, keywords = NOT[kind]
    palm = frozen(adapters="finetune_scopes" not in keywords, **keywords)
    change(palm)
    with palm.first_layer_kept(), torch.autocast("cpu", torch.bfloat16, enabled="half" in kind):
        palm(IDS, finetune_scope="a")
        if kind == "a large vocabulary":  # too many for 42 places, but not for the weights
            assert is_small(palm)
    assert not made


def test_not_beside_what_is_added_to_embeddings(made):
    palm, kinds = frozen(), IDS % 2
    added = torch.randn(2, 16)[kinds]
    with torch.no_grad(), palm.first_layer_kept():
        ours = palm(IDS, extra_embed=added, extra_kinds=kinds)
    assert not made
    torch.testing.assert_close(ours, palm(IDS, extra_embed=added, extra_kinds=kinds))


def test_what_is_kept_takes_no_more_than_the_weights():
    def of(tokens):
        return PaLM(num_tokens=tokens, dim=16, depth=1, dim_head=8, heads=4)

    block = of(1).layers[0].fn
    attn, kv, *_ = block.fused_dims
    most = block.fused_attn_ff_proj.weight.numel() // (attn + 2 * kv + 2 * 16)
    assert is_small(of(most)) and not is_small(of(most + 1))


@pytest.mark.parametrize(
    "keywords, many",
    [
        ({}, 1),  # one trunk for all
        ({"critic": True}, 2),
        ({"critic": True, "critic_lora": False}, 1),
        ({"actor_lora": False, "critic_lora": False}, 1),  # the reference, a copy
        ({"actor_lora": False, "critic": True}, 2),
    ],
)
def test_an_actor_s_frozen_models(keywords, many):
    own = {"critic": tiny_palm(seed=1)} if "critic" in keywords else {}
    actor_critic = tiny_actor_critic(**{**keywords, **own})
    palms = actor_critic.frozen_palms
    assert actor_critic.reference_palm in palms and len(palms) == many
    trained = {id(p) for p in (*actor_critic.actor_parameters(), *actor_critic.critic_parameters())}
    for palm in palms:
        assert not trained & {id(p) for p in palm.palm_parameters()}
    with actor_critic.first_layers_kept():
        assert all(palm.first_layer is not None for palm in palms)
    assert all(palm.first_layer is None for palm in palms)


@pytest.mark.parametrize("lora", [True, False])
def test_an_update_learns_the_same(monkeypatch, made, lora):
    found = []
    for worth in (module.WORTH, 0.0):
        monkeypatch.setattr(module, "WORTH", worth)
        trainer = tiny_trainer(palm=tiny_palm(), actor_lora=lora, critic_lora=lora)
        trainer.train(num_episodes=1, **{**TRAIN, "max_timesteps": 8})
        found.append([p.detach().clone() for p in trainer.actor_critic.parameters()])
        if worth:
            assert made
            made.clear()
    assert not made
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
