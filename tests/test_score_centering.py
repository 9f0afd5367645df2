"""`algorithms/score_centering.py` and `algorithms/centering.py`."""

from functools import partial

import pytest
import torch
from tiny import PROMPTS, ROLL, first_is_even, shake, tiny_palm

from palm_rlhf_pytorch import score_centering_loss, vocabulary
from palm_rlhf_pytorch.actor import Actor, Predictions
from palm_rlhf_pytorch.algorithms import centering
from palm_rlhf_pytorch.algorithms.score_centering import ScoreCentering
from palm_rlhf_pytorch.prompts import Prompts
from palm_rlhf_pytorch.trainer import OnPolicyTrainer


def build(lora=True, lr=1e-2, **options):
    actor = Actor(tiny_palm(), actor_lora=lora)
    if lora:
        shake(actor.actor_parameters())
    algorithm = ScoreCentering(actor_optim={"lr": lr}, **{"samples_per_prompt": 4, **options})
    return OnPolicyTrainer(actor, algorithm, first_is_even, Prompts(PROMPTS), seed=0)


def distributions(*shape):
    return torch.randn(*shape).requires_grad_(), torch.randn(*shape).softmax(-1)


def test_centering_corrects_nothing_on_policy():
    logits, _ = distributions(2, 3, 6)
    actions, a = torch.randint(0, 6, (2, 3)), torch.randn(2)
    log_p = logits.log_softmax(-1)
    plain = (-a[:, None] * log_p.gather(-1, actions[..., None]).squeeze(-1)).sum()
    wanted = torch.autograd.grad(plain, logits, retain_graph=True)[0]
    for topk in (None, 3):
        loss = score_centering_loss(log_p, log_p.detach().exp(), actions, a, topk).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], wanted)


def test_the_whole_vocabulary_is_topk_of_it():
    logits, q = distributions(2, 3, 6)
    actions, a = torch.randint(0, 6, (2, 3)), torch.randn(2, 3)
    log_p = logits.log_softmax(-1)
    full, same, fewer = (score_centering_loss(log_p, q, actions, a, k) for k in (None, 6, 2))
    torch.testing.assert_close(full, same)
    assert not torch.allclose(full, fewer)


def test_equal_advantages_move_nothing():
    """p = (.6, .4) and q = (.5, .5): uncentred the mean gradient by the logits is q - p = (-.1, .1)."""
    logits = torch.tensor((0.6, 0.4)).log().requires_grad_()
    q, log_p = torch.tensor((0.5, 0.5)), logits.log_softmax(-1)
    uncentred = torch.autograd.grad((q * log_p).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(uncentred, torch.tensor((-0.1, 0.1)))
    losses = score_centering_loss(log_p.expand(2, 1, 2), q.expand(2, 1, 2), torch.tensor([[0], [1]]), torch.ones(2))
    found = torch.autograd.grad((q * losses[:, 0]).sum(), logits)[0]
    torch.testing.assert_close(found, torch.zeros(2), atol=1e-6, rtol=0)


def test_topk_coefficients_by_hand():
    # q_H = (.5, .3), p_H = (.4, .4): rest .2 / .2 = 1, so c = q - p = (.1, -.1)
    log_p = torch.tensor((0.4, 0.4, 0.2)).log().requires_grad_()
    centering.centre(log_p, torch.tensor((0.5, 0.3)), torch.ones_like, torch.tensor([0, 1])).backward()
    torch.testing.assert_close(log_p.grad, torch.tensor((0.1, -0.1, 0.0)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("topk", [None, 4, 11])
def test_chunks_are_the_whole(topk, weighted, monkeypatch):
    monkeypatch.setattr(centering, "chunks", lambda w, *t: list(zip(*(x.split(5) for x in t), strict=True)))
    weight_fn = (lambda r: r.clamp(max=1.1)) if weighted else torch.ones_like
    trainer = build(topk=topk, weight_fn=weight_fn)
    e = trainer.algorithm.target(trainer.roll_out(4, 8, ROLL))
    actor, mask = trainer.actor_critic, e.response_mask

    def log_probs():
        places = actor.predictions(e.sequence, mask)
        return (places.embeds @ places.weight.T * places.scale).log_softmax(-1)

    q = log_probs().detach().exp()
    shake(actor.actor_parameters(), seed=5, std=0.2)
    ours, _ = trainer.algorithm.loss(actor.log_probs(e.sequence, mask), e)
    ours = ours[mask]
    args = (q[None], e.sequence[mask][None], e.advantages[mask][None])
    theirs = score_centering_loss(log_probs()[None], *args, topk=topk, weight_fn=weight_fn)[0]
    # the values too: both hold log p, not only its gradient
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    plain = -(e.advantages * actor.log_probs(e.sequence, mask).log_probs)[mask]
    assert (ours - plain).abs().max() > 1e-2
    found, wanted = (torch.autograd.grad(t.sum(), actor.actor_parameters()) for t in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    assert sum(b.abs().sum() for b in wanted) > 1e-3


def with_gradients(centres, embeds, weight):
    """centres(embeds (m, d), weight (v, d)) -> (m,), and the gradients by both, each centre counted differently."""
    embeds, weight = (t.clone().requires_grad_() for t in (embeds, weight))
    found = centres(embeds, weight)
    counts = torch.arange(1.0, len(found) + 1)
    return found.detach(), *torch.autograd.grad((found * counts).sum(), (embeds, weight))


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("topk", [None, 5])
def test_chunks_centre_as_float32_does_whole(monkeypatch, topk, dtype, error):
    monkeypatch.setattr(vocabulary, "ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(vocabulary, "LOGITS_PER_CHUNK", 1)
    embeds, weight = torch.randn(9, 64).to(dtype), torch.randn(50, 64).mul(0.3).to(dtype)
    q, ids = torch.randn(9, 50).softmax(-1), None
    if topk:
        q, ids = q.topk(topk)
    truncated, nothing = partial(torch.clamp, max=2.0), torch.zeros(9, dtype=torch.long)
    sampler = (q,) if ids is None else (q, ids)

    def in_chunks(e, w):
        return centering.centres(Predictions(e, w, nothing, 0.7), truncated, lambda q, ids=None: (q, ids), *sampler)

    def whole(e, w):
        return centering.centre((e @ w.t() * 0.7).log_softmax(-1), q, truncated, ids)

    ours, exact = with_gradients(in_chunks, embeds, weight), with_gradients(whole, embeds.float(), weight.float())
    torch.testing.assert_close(ours[0], exact[0], atol=1e-4, rtol=1e-4)
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert a.dtype == dtype and (a.float() - b).norm() < 2 * error * b.norm()


def test_weights_in_float64_centre_too():
    """A weight function may compute in another precision; chunks give what the whole does."""
    q, ids = torch.randn(3, 7).softmax(-1).topk(2)
    places = Predictions(torch.randn(3, 4), torch.randn(7, 4, requires_grad=True), torch.zeros(3).long(), 1.0)
    log_probs = (places.embeds @ places.weight.t()).log_softmax(-1)
    exact = centering.centre(log_probs, q, torch.Tensor.double, ids)
    found = centering.centres(places, torch.Tensor.double, lambda *rows: rows, q, ids)
    torch.testing.assert_close(found, exact.float())
    gradients = (torch.autograd.grad(t.sum(), places.weight) for t in (found, exact))
    torch.testing.assert_close(*gradients)


def test_a_backward_pass_under_autocast_is_that_of_the_forward_pass():
    embeds, weight, q = torch.randn(6, 64), torch.randn(40, 64, requires_grad=True), torch.randn(6, 40).softmax(-1)
    places = Predictions(embeds, weight, torch.zeros(6, dtype=torch.long), 1.0)
    found = centering.centres(places, torch.ones_like, lambda q: (q, None), q).sum()
    (plain,) = torch.autograd.grad(found, weight, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(found, weight)
    assert inside.equal(plain)


def test_a_backward_pass_centres_by_what_autocast_gave_the_forward_pass():
    """Rounded to bfloat16, what sampled differs."""
    embeds, weight, seen = torch.randn(6, 64), torch.randn(40, 64, requires_grad=True), []

    def distribution(e):
        seen.append(centering.probs(e, weight.detach(), 1.0))
        return seen[-1], None

    places = Predictions(embeds, weight, torch.zeros(6, dtype=torch.long), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = centering.centres(places, torch.ones_like, distribution, embeds)
    found.sum().backward()
    assert len(seen) == 2 and seen[0].equal(seen[1])
    assert not seen[0].equal(centering.probs(embeds, weight.detach(), 1.0))


def test_centering_keeps_what_sampled_when_all_is_trained():
    trainer = build(lora=False, samples_per_prompt=2)
    actor, algorithm = trainer.actor_critic, trainer.algorithm
    e = algorithm.target(trainer.roll_out(4, 8, ROLL))
    mask = e.response_mask
    places = actor.predictions(e.sequence, mask)
    q = (places.embeds @ places.weight.T * places.scale).softmax(-1).detach()
    shake(actor.actor_parameters(), seed=5, std=0.02)  # the vocabulary too
    ours, _ = algorithm.loss(actor.log_probs(e.sequence, mask), e)
    places = actor.predictions(e.sequence, mask)
    log_p = (places.embeds @ places.weight.T * places.scale).log_softmax(-1)
    theirs = score_centering_loss(log_p[None], q[None], e.sequence[mask][None], e.advantages[mask][None])[0]
    torch.testing.assert_close(ours[mask], theirs, atol=1e-5, rtol=1e-4)


def test_centering_keeps_what_sampled_through_fused_steps():
    """Fused AdamW does not count its writes."""
    trainer = build(lora=False, lr=3e-2, samples_per_prompt=2)
    for _ in range(3):
        trainer.train(1, 4, 4, 8, 8)
        e = trainer.roll_out(4, 8, ROLL)
        embeds = e.extra["sampler_embeds"][e.response_mask]
        q = centering.probs(embeds, trainer.algorithm._vocabulary, trainer.palm.logit_scale)
        drawn = q.gather(-1, e.sequence[e.response_mask][:, None]).squeeze(-1).log()
        torch.testing.assert_close(drawn, e.log_probs[e.response_mask], atol=1e-4, rtol=1e-4)
