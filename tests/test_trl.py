"""TRL's losses on the same tensors. GRPO and RLOO are in every TRL, PPO was until 1.12 (DPO, KTO: elsewhere).

To run PPO's: pip install trl==1.12 in another environment, or `python benchmarks/peers.py` and then its trl_ppo.
"""

import inspect
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_algorithms import grouped, reduced
from tiny import made_up

from palm_rlhf_pytorch.algorithms.dapo import DAPO
from palm_rlhf_pytorch.algorithms.dr_grpo import DrGRPO
from palm_rlhf_pytorch.algorithms.grpo import GRPO
from palm_rlhf_pytorch.algorithms.gspo import per_token_mean
from palm_rlhf_pytorch.algorithms.ppo import PPO
from palm_rlhf_pytorch.algorithms.rloo import RLOO
from palm_rlhf_pytorch.value_loss import ClippedRegression


def trl_stub(log_probs, loss_type="grpo", level="token", beta=0.0):
    from collections import defaultdict
    from types import SimpleNamespace

    def same(x, *args, **kwargs):
        return x

    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_probs, torch.zeros_like(log_probs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=10,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=same, gather_for_metrics=same, reduce=same
        ),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )


def beside_trl(algorithm):
    e = algorithm.target(grouped([1.0, 0.0, 0.0, 2.0]))
    e.log_probs = e.log_probs * 0.5
    now = (e.log_probs + 0.3 * torch.randn(e.log_probs.shape)) * e.response_mask
    now.requires_grad_()
    mask = e.response_mask.long()
    inputs = dict(
        prompt_ids=torch.zeros(4, 1, dtype=torch.long),
        prompt_mask=torch.ones(4, 1, dtype=torch.long),
        completion_ids=e.sequence,
        completion_mask=mask,
        advantages=e.advantages.amax(-1) + e.advantages.amin(-1),  # one of the two is the mask's 0
        old_per_token_logps=e.log_probs,
        old_logps=e.log_probs.sum(-1),
        ref_per_token_logps=e.ref_log_probs,
        num_items_in_batch=mask.sum(),
    )
    return e, now, inputs


def assert_agree(algorithm, e, now, theirs):
    ours = reduced(algorithm, now, e)
    torch.testing.assert_close(ours, theirs)
    a, b = (torch.autograd.grad(t, now)[0] for t in (ours, theirs))
    torch.testing.assert_close(a[e.response_mask], b[e.response_mask])
    assert b.abs().sum() > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_trl_has_the_same_grpo(loss_type, level, beta):
    trl = pytest.importorskip("trl")
    cls = {"grpo": GRPO, "dr_grpo": DrGRPO}.get(loss_type, DAPO)
    more = {"max_response": 10} if cls is DrGRPO else {}
    algorithm = cls(kl=beta, eps_clip=0.2, eps_clip_high=0.28, **more)
    if level == "sequence":
        algorithm.log_ratio = per_token_mean
    e, now, inputs = beside_trl(algorithm)
    theirs = trl.GRPOTrainer._compute_loss(trl_stub(now, loss_type, level, beta), None, inputs)
    assert_agree(algorithm, e, now, theirs)


def test_trl_has_the_same_rloo():
    trl = pytest.importorskip("trl")
    algorithm = RLOO(eps_clip=0.2, eps_clip_high=0.28)
    e, now, inputs = beside_trl(algorithm)
    assert_agree(algorithm, e, now, trl.RLOOTrainer._compute_loss(trl_stub(now), None, inputs))


def lines_of(source, first, last):
    """The lines of a function's source from one that begins with `first` to the next that begins with `last`, which
    stays outside.
    """
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(i for i in range(start, len(lines)) if lines[i].strip().startswith(last))
    return textwrap.dedent("\n".join(lines[start:stop]))


@pytest.mark.parametrize("lengths, lam", [((4, 4, 4), 0.95), ((4, 2, 1), 1.0)])
def test_trl_has_the_same_ppo(lengths, lam):
    """Its loss stands in the middle of PPOTrainer.train, whose lines are run here on made-up tensors. It scores the
    slot behind a response that ends early, so that lambda < 1 discounts it once more: such rows are compared with 1.
    """
    theirs = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL has PPO until 1.12")
    source = inspect.getsource(theirs.PPOTrainer.train)
    e = made_up(lengths, (1,) * len(lengths))
    n, mask = max(lengths), e.response_mask[:, 1:]
    assert mask.shape[1] == n
    torch.manual_seed(0)
    values = torch.randn(mask.shape) * mask
    e = replace(e, values=torch.cat((torch.zeros(len(e), 1), values), dim=1))
    algorithm = PPO(ClippedRegression(0.2), kl=0.05, eps_clip=0.2, gae_lambda=lam)
    e = algorithm.target(e)

    last = torch.tensor(lengths) - 1
    places = torch.arange(n).expand(len(e), -1)
    names = {
        **vars(theirs),
        "args": SimpleNamespace(
            kl_estimator="k1",
            kl_coef=0.05,
            whiten_rewards=False,
            gamma=1.0,
            lam=lam,
            cliprange=0.2,
            cliprange_value=0.2,
            vf_coef=0.1,
        ),
        "logprobs": e.log_probs[:, 1:].masked_fill(~mask, theirs.INVALID_LOGPROB),
        "ref_logprobs": e.ref_log_probs[:, 1:].masked_fill(~mask, theirs.INVALID_LOGPROB),
        "values": values,
        "scores": e.scores,
        "responses": e.sequence[:, 1:],
        "padding_mask": ~mask,
        "padding_mask_p1": places > last[:, None] + 1,
        "sequence_lengths": last,
        "sequence_lengths_p1": last + 1,
    }
    exec(lines_of(source, "logr = ref_logprobs", "empty_cache()"), names)
    count = int(mask.sum())  # it takes the variance over count - 1
    names["advantages"] *= (count / (count - 1)) ** 0.5
    torch.testing.assert_close(e.advantages[:, 1:][mask], names["advantages"][mask])
    torch.testing.assert_close(e.returns[:, 1:][mask], names["returns"][mask])

    now = (e.log_probs + 0.3 * torch.randn(e.log_probs.shape) * e.response_mask).requires_grad_()
    predicted = (values + 0.3 * torch.randn(values.shape)).requires_grad_()
    names.update(
        vpred=predicted,
        mb_values=values,
        mb_return=names["returns"],
        mb_advantage=names["advantages"],
        mb_logprobs=names["logprobs"],
        new_logprobs=torch.where(mask, now[:, 1:], theirs.INVALID_LOGPROB),
        micro_batch_inds=torch.arange(len(e)),
    )
    exec(lines_of(source, "vpredclipped = torch.clamp(", "accelerator.backward(loss)"), names)
    ours = reduced(algorithm, now, e)
    torch.testing.assert_close(ours, names["pg_loss"])
    for a, b in zip(*(torch.autograd.grad(t, now, retain_graph=True) for t in (ours, names["pg_loss"])), strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 1e-3
    if len(set(lengths)) == 1:  # elsewhere it learns a value of the slot behind, too
        value = algorithm.value_loss(predicted[mask], values[mask], e.returns[:, 1:][mask]).mean()
        torch.testing.assert_close(value, names["vf_loss"])
