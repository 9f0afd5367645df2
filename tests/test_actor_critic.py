import pytest
import torch
import torch.nn.functional as F
from tiny import EOS, LENGTHS, PROMPTS, TOKENS, TRAIN, made_up, shake, tiny_actor_critic, tiny_palm, tiny_trainer

from palm_rlhf_pytorch import ActorCritic, ImplicitPRM
from palm_rlhf_pytorch.actor import Actor, response_log_probs
from palm_rlhf_pytorch.actor_critic import running_mean


def count(parameters):
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())


def trunk_pointers(palm):
    return [p.data_ptr() for p in palm.palm_parameters()]


def test_lora_shares_one_trunk():
    palm = tiny_palm()
    trunk = count(palm.parameters())
    actor_critic = ActorCritic(palm, critic_dim_out=6)
    assert trunk_pointers(actor_critic.actor_palm) == trunk_pointers(actor_critic.critic_palm)
    assert trunk_pointers(actor_critic.actor_palm) == trunk_pointers(actor_critic.reference_palm)
    trained = [*actor_critic.actor_parameters(), *actor_critic.critic_parameters()]
    assert count(actor_critic.parameters()) == trunk + count(trained)
    assert not any(p.requires_grad for p in palm.palm_parameters()) and all(p.requires_grad for p in trained)
    # q 16, k 8, v 8, out 16 -> 16 at rank 8, for each of 2 layers; the head 16 -> 6
    adapters = 2 * 8 * ((16 + 16) + (16 + 8) + (16 + 8) + (16 + 16))
    assert count(actor_critic.actor_parameters()) == adapters
    assert count(actor_critic.critic_parameters()) == adapters + 16 * 6 + 6


@pytest.mark.parametrize("actor_lora, critic_lora", [(False, False), (True, False), (False, True)])
def test_what_is_trained_whole_has_a_trunk_of_its_own(actor_lora, critic_lora):
    palm = tiny_palm()
    actor_critic = ActorCritic(palm, actor_lora=actor_lora, critic_lora=critic_lora)
    actor, critic, reference = (
        set(trunk_pointers(p)) for p in (actor_critic.actor_palm, actor_critic.critic_palm, actor_critic.reference_palm)
    )
    assert not actor & critic and (actor == reference) == actor_lora and not critic & reference
    groups = {id(p) for p in actor_critic.actor_parameters()}, {id(p) for p in actor_critic.critic_parameters()}
    assert not groups[0] & groups[1]
    assert all(p.requires_grad for p in [*actor_critic.actor_parameters(), *actor_critic.critic_parameters()])
    assert not any(p.requires_grad for p in actor_critic.reference_palm.palm_parameters())
    assert (not actor_lora) == bool(actor & {p.data_ptr() for p in actor_critic.actor_parameters()})
    assert (not critic_lora) == bool(critic & {p.data_ptr() for p in actor_critic.critic_parameters()})
    assert torch.equal(actor_critic(PROMPTS)[0], actor_critic.reference_palm(PROMPTS))


@pytest.mark.parametrize("actor_lora, critic_lora", [(True, False), (False, True), (True, True)])
def test_palm_as_its_own_critic_keeps_the_reference(actor_lora, critic_lora):
    palm = tiny_palm()
    before = palm(PROMPTS).detach()
    trainer = tiny_trainer(palm=palm, critic=palm, actor_lora=actor_lora, critic_lora=critic_lora)
    shake([*trainer.actor_critic.critic_parameters()])
    assert torch.equal(trainer.actor_critic(PROMPTS)[0], before)
    trainer.train(8, **TRAIN)
    assert torch.equal(trainer.actor_critic.reference_palm(PROMPTS), before)


@pytest.mark.parametrize("as_reference", [False, True])
def test_an_implicit_critic_made_of_the_policy_does_not_move_it(as_reference):
    palm = tiny_palm()
    critic = ImplicitPRM(tiny_palm(4), palm) if as_reference else ImplicitPRM(palm)
    trainer = tiny_trainer(palm=palm, critic=critic, actor_lora=not as_reference)
    actor_critic, before = trainer.actor_critic, palm(PROMPTS).detach()
    values = actor_critic.values(PROMPTS)
    shake(actor_critic.actor_parameters() if as_reference else actor_critic.critic_parameters())
    if as_reference:
        assert torch.equal(actor_critic.values(PROMPTS), values)
    else:
        assert torch.equal(palm(PROMPTS), before)


def test_the_reference_moves_along_but_is_not_saved():
    actor_critic = ActorCritic(tiny_palm(), actor_lora=False).to(torch.float64)
    assert actor_critic.reference_palm.token_emb.weight.dtype == torch.float64
    assert not any("reference" in name for name in actor_critic.state_dict())
    assert not actor_critic.train().reference_palm.training


def test_critic_of_other_sizes():
    critic = tiny_palm(1, dim=24, depth=1)
    actor_critic = ActorCritic(tiny_palm(), critic, critic_dim_out=6)
    assert actor_critic.critic_palm is critic and actor_critic.value_head.in_features == 24
    assert actor_critic(PROMPTS)[1].shape == (4, 5, 6)
    assert list(critic.finetune_modules) == ["critic"]


def test_what_is_refused():
    with pytest.raises(ValueError, match="it has 5 tokens, the policy 11"):
        ActorCritic(tiny_palm(), tiny_palm(1, num_tokens=5))
    with pytest.raises(ValueError, match="scopes of their own"):
        ActorCritic(tiny_palm(), critic_lora_scope="actor")
    ActorCritic(tiny_palm(), tiny_palm(1), critic_lora_scope="actor")  # on two trunks the names may be the same


def test_adapters_of_an_earlier_trainer_are_no_start():
    palm = tiny_palm()
    first = Actor(palm, actor_lora_r=2)
    with pytest.raises(ValueError, match="merge_finetune_params.*goes on from there.*starts again"):
        Actor(palm, actor_lora_r=4)
    palm.remove_finetune_params(first.actor_lora_scope)
    second = Actor(palm, actor_lora_r=4)
    shake(second.actor_parameters())
    with pytest.raises(ValueError, match="adapters 'actor' of an earlier training"):
        Actor(palm, actor_lora_r=4)


def test_a_refused_keyword_does_not_spend_the_palm():
    palm = tiny_palm()
    for _ in range(2):
        with pytest.raises(ValueError, match="reward_over is"):
            tiny_trainer(palm=palm, reward_over="words")
    assert abs(tiny_trainer(palm=palm).train(8, **TRAIN).history[0]["kl"]) < 1e-6  # from the start, to rounding


def test_an_encoder_is_made_causal():
    palm, critic = tiny_palm(causal=False), tiny_palm(1, causal=False)
    with pytest.warns(UserWarning, match="the policy's PaLM has causal=False"):
        actor_critic = ActorCritic(palm)
    assert torch.equal(actor_critic(PROMPTS)[0], tiny_palm()(PROMPTS))  # the same weights, built causal
    with pytest.warns(UserWarning, match="the critic's PaLM has causal=False"):
        assert ActorCritic(tiny_palm(), critic).critic_palm.causal


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dim_out, shape", [(1, (4, 5)), (6, (4, 5, 6))])
def test_values_are_the_head_on_each_prefix(pooled, dim_out, shape):
    actor_critic = tiny_actor_critic(pooled_values=pooled, critic_dim_out=dim_out)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    values = actor_critic.values(PROMPTS, mask)
    assert values.shape == shape
    for i in range(4):
        for t in range(5):
            embeds = actor_critic.critic_palm(
                PROMPTS[i : i + 1, : t + 1], return_only_embedding=True, finetune_scope="critic"
            )[0]
            held = embeds[mask[i, : t + 1]]
            state = held.mean(dim=0) if pooled and len(held) else embeds[-1]
            expected = actor_critic.value_head(state)
            torch.testing.assert_close(values[i, t], expected.squeeze() if dim_out == 1 else expected)


PLACES = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dim_out", [1, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_values_at_some_places(feedforward_rows, pooled, dim_out, masked):
    actor_critic = tiny_actor_critic(pooled_values=pooled, critic_dim_out=dim_out)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 0, 1]]).bool() if masked else None
    learned, found = actor_critic.critic_parameters(), []
    for places in (PLACES, None):
        values = actor_critic.values(PROMPTS, mask, places)
        values = values.movedim(-1, 0) * PLACES if dim_out > 1 else values * PLACES
        found.append((values, torch.autograd.grad(values.sin().sum(), learned)))
    # a mean is of what lies before its place and the mask holds
    assert feedforward_rows[1] == (5 if not pooled else 7 if masked else 10) and feedforward_rows[3] == 20
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_values_are_0_at_other_places():
    for actor_critic in (tiny_actor_critic(critic_dim_out=6), ActorCritic(tiny_palm(), ImplicitPRM(tiny_palm(1)))):
        shake(actor_critic.critic_parameters())
        values, some = actor_critic.values(PROMPTS), actor_critic.values(PROMPTS, None, PLACES)
        torch.testing.assert_close(some[PLACES], values[PLACES])
        assert values[~PLACES].any() and not some[~PLACES].any()


def test_running_mean_by_hand():
    embeds = torch.tensor([[[1.0], [2.0], [4.0], [9.0]]])
    mask = torch.tensor([[False, True, True, False]])
    assert running_mean(embeds, mask).flatten().tolist() == [1.0, 2.0, 3.0, 3.0]
    assert running_mean(embeds, None).flatten().tolist() == [1.0, 1.5, pytest.approx(7 / 3), 4.0]


def test_implicit_critic_adds_up_its_rewards():
    critic = ImplicitPRM(tiny_palm(1), tiny_palm(2), beta=0.5)
    actor_critic = ActorCritic(tiny_palm(), critic)
    assert actor_critic.value_dim == 1 and actor_critic.value_head is None
    assert {id(p) for p in actor_critic.critic_parameters()} == {id(p) for p in critic.model.parameters()}
    rewards = critic(PROMPTS)
    assert (actor_critic.values(PROMPTS)[:, 0] == 0).all()
    torch.testing.assert_close(actor_critic.values(PROMPTS)[:, 1:], rewards.cumsum(dim=-1))
    mask = torch.tensor([[False, False, True, True, False]]).expand(4, 5)
    expected = torch.stack((torch.zeros(4), torch.zeros(4), rewards[:, 1], rewards[:, 1:3].sum(-1)), dim=-1)
    torch.testing.assert_close(actor_critic.values(PROMPTS, mask)[:, :4], expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_and_entropy_by_hand(temperature):
    actor_critic, e = tiny_actor_critic(), made_up()
    log_probs, entropy, _ = actor_critic.log_probs(e.sequence, e.response_mask, temperature)
    logits, _ = actor_critic(e.sequence, return_values=False)
    expected = (logits / temperature).log_softmax(dim=-1)
    for i, t in e.response_mask.nonzero().tolist():
        before = expected[i, t - 1]
        torch.testing.assert_close(log_probs[i, t], before[e.sequence[i, t]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[i, t], -(before.exp() * before).sum(), atol=1e-5, rtol=1e-5)
    assert (log_probs[~e.response_mask] == 0).all() and (entropy[~e.response_mask] == 0).all()


def test_response_log_probs_hold_no_logits_outside_the_response(monkeypatch):
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *a: seen.append((x.shape, w.shape)) or linear(x, w, *a))
    e, palm = made_up(), tiny_palm()
    response_log_probs(palm, e.sequence, e.response_mask)
    # 3 + 1 + 4 response tokens, and nothing of (b, n) reached the vocabulary
    assert [x for x, w in seen if w == (TOKENS, 16)] == [(8, 16)] and len(seen) > 1


@pytest.mark.parametrize("palm_class", [None, "as critic"])
def test_forward_is_actor_and_critic(palm_class):
    actor_critic = tiny_actor_critic(critic=None if palm_class is None else tiny_palm(5))
    logits, values = actor_critic(PROMPTS)
    torch.testing.assert_close(logits, actor_critic.actor_palm(PROMPTS, finetune_scope="actor"))
    torch.testing.assert_close(values, actor_critic.values(PROMPTS))
    assert actor_critic(PROMPTS, return_values=False)[1] is None


def test_generate_gives_ragged_answers_as_a_named_tuple():
    actor_critic = tiny_actor_critic(actor_dropout=0.5, critic_dropout=0.5).train()
    torch.manual_seed(3)
    prompts, lengths = PROMPTS.repeat(8, 1), LENGTHS.repeat(8)
    out = actor_critic.generate(prompts, 9, eos_token=EOS, return_values=True, pad_value=7, prompt_lengths=lengths)
    assert out._fields == ("actions", "sequence", "mask", "prompt_mask", "action_logits", "values")
    assert actor_critic.training
    b, n = out.sequence.shape
    assert out.action_logits.shape == (b, n, TOKENS) and out.values.shape == (b, n)
    assert torch.equal(out.prompt_mask.sum(-1), lengths) and (out.sequence[~out.mask] == 7).all()
    responses = [s[m] for s, m in zip(out.sequence, out.mask & ~out.prompt_mask, strict=True)]
    ended = [bool(r[-1] == EOS) for r in responses]
    assert any(ended) and not all(ended) and all(EOS not in r[:-1] for r in responses)
    for response, action, done, m in zip(responses, out.actions, ended, out.mask, strict=True):
        assert torch.equal(action[: len(response)], response) and (action[len(response) :] == 7).all()
        assert done or m.sum() == 9
    actor_critic.eval()
    logits, values = actor_critic(out.sequence, mask=out.mask & ~out.prompt_mask)
    assert torch.equal(out.action_logits, logits) and torch.equal(out.values, values)  # no dropout in either
    assert not out.action_logits.requires_grad

    single = actor_critic.generate(PROMPTS[0], 7)
    assert single.sequence.shape == (1, 7) and single.actions.shape == (1, 2) and single.values is None


def test_generate_samples_the_whole_vocabulary():
    actor_critic = tiny_actor_critic()
    torch.manual_seed(0)
    out = actor_critic.generate(PROMPTS[:1].repeat(400, 1), 6)
    assert out.actions.unique().numel() == TOKENS  # the reference's top_k would leave 2 of 11


def test_old_keyword_warns_at_the_callers_line():
    critic = tiny_palm(1)
    with pytest.warns(DeprecationWarning, match="critic_palm has moved: use critic") as caught:
        actor_critic = ActorCritic(tiny_palm(), critic_palm=critic)
    assert actor_critic.critic_palm is critic and caught[0].filename == __file__


def test_values_are_read_off_in_float32_beside_half_precision():
    palm = tiny_palm().bfloat16()
    actor_critic = ActorCritic(palm, critic_dim_out=1)
    shake([*actor_critic.actor_parameters(), *actor_critic.critic_parameters()])
    for some in (actor_critic, actor_critic.bfloat16()):
        assert {p.dtype for p in some.critic_parameters()} == {torch.float32}
        assert palm.token_emb.weight.dtype == torch.bfloat16
        values = some.values(PROMPTS)
        embeds = palm(PROMPTS, return_only_embedding=True, finetune_scope="critic")
        expected = embeds.float() @ some.value_head.weight[0] + some.value_head.bias
        assert embeds.dtype == torch.bfloat16 and values.dtype == torch.float32
        torch.testing.assert_close(values, expected)


def test_policy_log_probs_of_half_precision_are_float32():
    """Those of the embeddings that the trunk gives, not rounded again on the way through the vocabulary."""
    palm = tiny_palm(logit_scale=3.3).bfloat16()
    actor_critic = ActorCritic(palm)
    response_mask = torch.arange(5) >= torch.tensor([[3]] * 4)
    found = actor_critic.log_probs(PROMPTS, response_mask, temperature=0.7)
    embeds = palm(PROMPTS, return_only_embedding=True).float()
    exact = (embeds @ palm.token_emb.weight.float().t() * 3.3 / 0.7).log_softmax(-1)
    for row in range(4):
        for t in (3, 4):
            expected = exact[row, t - 1, PROMPTS[row, t]].item()
            assert found.log_probs[row, t].item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(found.log_probs, actor_critic.reference_log_probs(PROMPTS, response_mask, 0.7))
