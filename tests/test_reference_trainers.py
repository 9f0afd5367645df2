import inspect

import pytest
import torch
from tiny import PROMPTS, TRAIN, first_is_even, tiny_palm

import palm_rlhf_pytorch
from palm_rlhf_pytorch import flowrl, grpo, tpo
from palm_rlhf_pytorch.algorithms.dr_grpo import DrGRPO
from palm_rlhf_pytorch.algorithms.flowrl import FlowRL
from palm_rlhf_pytorch.algorithms.groups import centred, standardised
from palm_rlhf_pytorch.algorithms.grpo import GRPO
from palm_rlhf_pytorch.algorithms.max_rl import MaxRL, over_success
from palm_rlhf_pytorch.algorithms.policy_gradient import clipped
from palm_rlhf_pytorch.algorithms.score_centering import ScoreCentering
from palm_rlhf_pytorch.algorithms.spo import SPO, penalised
from palm_rlhf_pytorch.algorithms.tpo import TPO


def make(cls, **keywords):
    return cls(
        palm=tiny_palm(), reward_model=first_is_even, prompt_token_ids=PROMPTS, actor_lr=1e-2, seed=0, **keywords
    )


def trains(trainer):
    """One update that changes the policy, reported in finite numbers."""
    before = [p.detach().clone() for p in trainer.actor_critic.actor_parameters()]
    assert trainer.train(8, **TRAIN) is trainer
    assert all(torch.tensor(value).isfinite() for value in trainer.history[0].values())
    pairs = zip(before, trainer.actor_critic.actor_parameters(), strict=True)
    return len(trainer.history) == 1 and any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("flags", "cls", "advantage", "surrogate"),
    [
        ({}, GRPO, standardised, clipped),
        ({"use_dr_grpo": True}, DrGRPO, centred, clipped),
        ({"dr_grpo_constant": 7}, DrGRPO, centred, clipped),
        ({"use_max_rl": True}, MaxRL, over_success, clipped),
        ({"use_simple_policy_optimization": True}, SPO, standardised, penalised),
        ({"use_simple_policy_optimization": True, "use_dr_grpo": True}, grpo.PenalisedDrGRPO, centred, penalised),
        ({"use_simple_policy_optimization": True, "use_max_rl": True}, grpo.PenalisedMaxRL, over_success, penalised),
        ({"use_score_centering": True}, ScoreCentering, standardised, clipped),
        ({"use_score_centering": True, "score_centering_topk": 3}, ScoreCentering, standardised, clipped),
        ({"use_score_centering": True, "use_dr_grpo": True}, ScoreCentering, centred, clipped),
        ({"use_score_centering": True, "dr_grpo_constant": 7}, ScoreCentering, centred, clipped),
        ({"use_score_centering": True, "use_max_rl": True}, ScoreCentering, over_success, clipped),
        ({"add_entropy_to_advantage": True}, GRPO, standardised, clipped),
    ],
)
def test_grpo_flags(flags, cls, advantage, surrogate):
    trainer = make(grpo.RLHFTrainer, grpo_num_times_sample_rewards=4, **flags)
    algorithm = trainer.algorithm
    assert type(algorithm) is cls and algorithm.advantage is advantage and algorithm.surrogate is surrogate
    assert algorithm.samples_per_prompt == 4 and algorithm.needs_reference
    assert algorithm.options.entropy_advantage == (0.4 if "add_entropy_to_advantage" in flags else 0.0)
    assert trains(trainer)
    clips = not {"use_simple_policy_optimization", "use_score_centering"} & set(flags)
    assert ("clip_fraction" in trainer.history[0]) is clips
    if "dr_grpo_constant" in flags or "use_dr_grpo" in flags:
        assert algorithm.normalization == flags.get("dr_grpo_constant", "constant")


@pytest.mark.parametrize("other", [{}, {"use_dr_grpo": True}, {"use_max_rl": True}])
def test_spo_by_its_flag_refuses_a_range_that_it_divides_by(other):
    with pytest.raises(ValueError, match=r"SPO divides by eps_clip, which must be above 0, got \(0.0, 0.0\)"):
        make(grpo.RLHFTrainer, use_simple_policy_optimization=True, eps_clip=0.0, **other)


@pytest.mark.parametrize("flags", [{}, {"use_score_centering": True}, {"use_simple_policy_optimization": True}])
@pytest.mark.parametrize("penalty", [{"missing_eos_penalty": 0.5}, {"overlong_buffer": 2}, {"normalize_reward": True}])
def test_max_rl_refuses_penalties_at_the_door(flags, penalty):
    with pytest.raises(ValueError, match="needs scores as the reward gives them: leave out missing_eos_penalty"):
        make(grpo.RLHFTrainer, use_max_rl=True, **flags, **penalty)


def test_grpo_keywords_reach_what_they_name():
    def weight(ratio):
        return ratio.clamp(max=2.0)

    trainer = make(
        grpo.RLHFTrainer,
        eps_clip=0.3,
        beta_s=0.02,
        kl_div_loss_weight=0.3,
        add_entropy_to_advantage=True,
        entropy_to_advantage_kappa=3.0,
        entropy_to_advantage_scale=0.2,
        use_score_centering=True,
        score_centering_topk=5,
        score_centering_weight_fn=weight,
        betas=(0.8, 0.9),
        actor_wd=0.1,
        actor_lora_r=2,
        minibatch_size=5,
        epochs=3,
    )
    o = trainer.algorithm.options
    assert (o.entropy, o.kl, o.kl_in) == (0.02, 0.3, "loss")
    assert (o.entropy_kappa, o.entropy_advantage, o.topk) == (3.0, 0.2, 5)
    assert trainer.algorithm.weight_fn is weight and trainer.algorithm.samples_per_prompt == 10
    (group,) = trainer.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-2, 0.1, (0.8, 0.9))
    assert group["params"][0].shape[1] == 2
    assert (trainer.options.minibatch_size, trainer.options.epochs) == (5, 3)


@pytest.mark.parametrize(
    "pair",
    [
        {"use_dr_grpo": True, "use_max_rl": True},
        {"dr_grpo_constant": 5, "use_max_rl": True},
        {"use_simple_policy_optimization": True, "use_score_centering": True},
    ],
)
def test_excluded_pairs_are_refused(pair):
    with pytest.raises(ValueError, match="exclude each other: take one"):
        make(grpo.RLHFTrainer, **pair)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (grpo.RLHFTrainer, "grpo_num_times_sample_rewards"),
        (tpo.RLHFTrainer, "num_times_sample_rewards"),
        (flowrl.FlowRLTrainer, "flowrl_num_times_sample"),
    ],
)
def test_one_answer_cannot_be_compared(cls, name):
    with pytest.raises(ValueError, match=f"{name} must be 2 or more, to have answers to compare, got 1"):
        make(cls, **{name: 1})


def test_tpo():
    trainer = make(tpo.RLHFTrainer, num_times_sample_rewards=4, tpo_eta=0.5, beta_s=0.02)
    o = trainer.algorithm.options
    assert type(trainer.algorithm) is TPO and (o.eta, o.entropy, o.samples_per_prompt) == (0.5, 0.02, 4)
    assert trains(trainer) and "kl_to_target" in trainer.history[0]


def test_flowrl():
    trainer = make(
        flowrl.FlowRLTrainer, flowrl_num_times_sample=4, partition_function_hidden_dim=8, partition_function_lr=3e-3
    )
    algorithm = trainer.algorithm
    assert type(algorithm) is FlowRL and algorithm.options.beta == 15.0 and algorithm.samples_per_prompt == 4
    actor, own = trainer.optimizer.param_groups
    assert (actor["lr"], own["lr"]) == (1e-2, 3e-3)
    assert algorithm.partition_function.layers[-1].weight.shape == (1, 8)
    assert trains(trainer)
    assert algorithm.partition_function.layers[-1].bias.item() != 0
    with pytest.warns(UserWarning, match="kl_div_loss_weight does nothing"):
        make(flowrl.FlowRLTrainer, kl_div_loss_weight=0.1)


@pytest.mark.parametrize(
    ("cls", "known"),
    [
        (
            grpo.RLHFTrainer,
            dict(
                grpo_num_times_sample_rewards=10,
                use_simple_policy_optimization=False,
                use_dr_grpo=False,
                dr_grpo_constant=None,
                use_max_rl=False,
                use_score_centering=False,
                score_centering_topk=None,
                score_centering_weight_fn=torch.ones_like,
                add_entropy_to_advantage=False,
                entropy_to_advantage_kappa=2.0,
                entropy_to_advantage_scale=0.4,
            ),
        ),
        (tpo.RLHFTrainer, dict(num_times_sample_rewards=10, tpo_eta=1.0)),
        (
            flowrl.FlowRLTrainer,
            dict(
                flowrl_num_times_sample=8,
                beta=15.0,
                partition_function_hidden_dim=768,
                partition_function_lr=1e-4,
                beta_s=0.0,  # the reference has 0.01, and never reads it
            ),
        ),
    ],
)
def test_defaults_are_the_references(cls, known):
    shared = dict(
        actor_lr=1e-4, actor_lora=True, actor_lora_r=8, minibatch_size=16, epochs=1, betas=(0.9, 0.999), beta_s=0.01
    )
    ours = inspect.signature(cls).parameters
    wanted = {**shared, **known}
    assert {name: ours[name].default for name in wanted} == wanted


def test_partition_function():
    z = flowrl.PartitionFunction(8)
    prompts = torch.randn(3, 8)
    assert z(prompts).tolist() == [0.0, 0.0, 0.0] and flowrl.PartitionFunction(8, dim=5)(torch.randn(2, 5)).shape == (
        2,
    )
    assert sum(isinstance(part, torch.nn.Linear) for part in z.layers) == 3
    torch.nn.init.normal_(z.layers[-1].weight)
    assert z(prompts).unique().numel() == 3


def test_score_centering_loss_has_the_references_signature():
    found = inspect.signature(palm_rlhf_pytorch.score_centering_loss).parameters
    assert [(name, p.default) for name, p in found.items()] == [
        ("train_log_probs", inspect.Parameter.empty),
        ("samp_probs", inspect.Parameter.empty),
        ("actions", inspect.Parameter.empty),
        ("advantages", inspect.Parameter.empty),
        ("topk", None),
        ("weight_fn", torch.ones_like),
        ("eps", 1e-6),
    ]
    assert grpo.score_centering_loss is palm_rlhf_pytorch.score_centering_loss
