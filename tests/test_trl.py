"""TRL's losses on the same tensors. GRPO and RLOO are in every TRL (DPO, KTO: elsewhere). PPO was until 1.12, whose
numbers are kept in a file; `python benchmarks/peers.py` makes an environment that has it.
"""

import inspect
import json
import textwrap
from dataclasses import replace
from pathlib import Path
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


PPO_CASES = [((4, 4, 4), 0.95), ((4, 2, 1), 1.0)]  # it scores the slot behind a response that ends early, so that
# lambda < 1 discounts it once more: such rows are compared with 1
NUMBERS = Path(__file__).parent / "trl_1_12_ppo.json"


class PPOCase:
    """Made-up experience, ours made of it, and what two models say of it later."""

    def __init__(self, lengths, lam):
        self.lengths, self.lam = lengths, lam
        e = made_up(lengths, (1,) * len(lengths))
        self.mask = e.response_mask[:, 1:]
        assert self.mask.shape[1] == max(lengths)
        torch.manual_seed(0)
        self.values = torch.randn(self.mask.shape) * self.mask
        self.algorithm = PPO(ClippedRegression(0.2), kl=0.05, eps_clip=0.2, gae_lambda=lam)
        e = replace(e, values=torch.cat((torch.zeros(len(e), 1), self.values), dim=1))
        self.experience = self.algorithm.target(e)
        self.now = (e.log_probs + 0.3 * torch.randn(e.log_probs.shape) * e.response_mask).requires_grad_()
        self.predicted = (self.values + 0.3 * torch.randn(self.values.shape)).requires_grad_()

    def ours(self):
        e, mask = self.experience, self.mask
        loss = reduced(self.algorithm, self.now, e)
        found = {
            "advantages": e.advantages[:, 1:] * mask,
            "returns": e.returns[:, 1:] * mask,
            "policy_loss": loss,
            "policy_gradient": torch.autograd.grad(loss, self.now)[0],
        }
        if len(set(self.lengths)) == 1:  # elsewhere TRL learns a value of the slot behind, too
            predicted, values, returns = self.predicted[mask], self.values[mask], e.returns[:, 1:][mask]
            found["value_loss"] = self.algorithm.value_loss(predicted, values, returns).mean()
        return {name: t.detach() for name, t in found.items()}

    def theirs(self, trainer):
        """TRL's: its loss stands in the middle of PPOTrainer.train, whose lines are run here on these tensors."""
        source, mask, e = inspect.getsource(trainer.PPOTrainer.train), self.mask, self.experience
        last = torch.tensor(self.lengths) - 1
        args = dict(kl_estimator="k1", kl_coef=0.05, whiten_rewards=False, gamma=1.0, lam=self.lam)
        args |= dict(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)
        names = {
            **vars(trainer),
            "args": SimpleNamespace(**args),
            "logprobs": e.log_probs[:, 1:].masked_fill(~mask, trainer.INVALID_LOGPROB),
            "ref_logprobs": e.ref_log_probs[:, 1:].masked_fill(~mask, trainer.INVALID_LOGPROB),
            "values": self.values,
            "scores": e.scores,
            "responses": e.sequence[:, 1:],
            "padding_mask": ~mask,
            "padding_mask_p1": torch.arange(mask.shape[1]).expand(len(e), -1) > last[:, None] + 1,
            "sequence_lengths": last,
            "sequence_lengths_p1": last + 1,
        }
        exec(lines_of(source, "logr = ref_logprobs", "empty_cache()"), names)
        count = int(mask.sum())  # it takes the variance over count - 1
        names["advantages"] *= (count / (count - 1)) ** 0.5
        names.update(
            vpred=self.predicted,
            mb_values=self.values,
            mb_return=names["returns"],
            mb_advantage=names["advantages"],
            mb_logprobs=names["logprobs"],
            new_logprobs=torch.where(mask, self.now[:, 1:], trainer.INVALID_LOGPROB),
            micro_batch_inds=torch.arange(len(e)),
        )
        exec(lines_of(source, "vpredclipped = torch.clamp(", "accelerator.backward(loss)"), names)
        found = {name: names[name] * mask for name in ("advantages", "returns")}
        found["policy_loss"], loss = names["pg_loss"], names["pg_loss"]
        found["policy_gradient"] = torch.autograd.grad(loss, self.now)[0]
        if len(set(self.lengths)) == 1:
            found["value_loss"] = names["vf_loss"]
        return {name: t.detach() for name, t in found.items()}


def assert_numbers(found, stored):
    assert found.keys() == stored.keys()
    for name, t in found.items():
        torch.testing.assert_close(t, torch.tensor(stored[name]), msg=lambda m, name=name: f"{name}: {m}")
        assert t.abs().sum() > 1e-3


@pytest.mark.parametrize("case", range(len(PPO_CASES)))
def test_ppo_is_that_of_trl(case):
    """As TRL 1.12 gave the numbers; `python tests/test_trl.py` writes them where that is installed."""
    assert_numbers(PPOCase(*PPO_CASES[case]).ours(), json.loads(NUMBERS.read_text())[case])


@pytest.mark.parametrize("case", range(len(PPO_CASES)))
def test_these_are_trl_s_numbers(case):
    theirs = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL has PPO until 1.12")
    assert_numbers(PPOCase(*PPO_CASES[case]).theirs(theirs), json.loads(NUMBERS.read_text())[case])


if __name__ == "__main__":
    from trl.experimental.ppo import ppo_trainer

    cases = [PPOCase(*case).theirs(ppo_trainer) for case in PPO_CASES]
    NUMBERS.write_text(json.dumps([{name: t.tolist() for name, t in case.items()} for case in cases], indent=1) + "\n")
