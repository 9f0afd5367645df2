"""Small models, prompts and trainers that the tests of the on-policy engine share."""

import torch

from palm_rlhf_pytorch import ActorCritic, PaLM, RLHFTrainer
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.ops import lengths_to_mask
from palm_rlhf_pytorch.ppo import PPO
from palm_rlhf_pytorch.rollout import RolloutOptions, Scorer, roll_out
from palm_rlhf_pytorch.value_loss import ClippedRegression

TOKENS = 11
EOS = 1
PROMPTS = torch.tensor([[2, 3, 0, 4, 5], [6, 1, 7, 0, 0], [8, 0, 0, 0, 0], [9, 10, 2, 3, 0]])  # 0 is padding
LENGTHS = torch.tensor([5, 3, 1, 4])


def tiny_palm(seed=0, std=0.12, **kwargs):
    """A PaLM whose next-token distributions are clearly not uniform."""
    torch.manual_seed(seed)
    palm = PaLM(**{"num_tokens": TOKENS, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, **kwargs})
    torch.nn.init.normal_(palm.token_emb.weight, std=std)
    return palm


@torch.no_grad()
def shake(parameters, seed=1, std=0.1):
    """Move parameters away from where they started, so that the policy is no longer the reference."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def tiny_actor_critic(shaken=True, **kwargs):
    actor_critic = ActorCritic(tiny_palm(), **{"pooled_values": True, "critic_dim_out": 1, **kwargs})
    if shaken:
        shake([*actor_critic.actor_parameters(), *actor_critic.critic_parameters()])
    return actor_critic


def count_even(prompts, responses):
    """A reward over tokens."""
    return [float((response % 2 == 0).sum()) for response in responses]


def first_is_even(prompts, responses):
    """A reward over tokens, 0 or 1."""
    return [float(response[0] % 2 == 0) for response in responses]


def numbers(history):
    """A history of supervised training, but for how fast it went."""
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in history]


def tiny_trainer(**kwargs):
    defaults = {
        "palm": tiny_palm() if "palm" not in kwargs else None,
        "reward_model": count_even,
        "prompt_token_ids": PROMPTS if "prompts" not in kwargs and "prompts_path" not in kwargs else None,
        "critic_num_pred_bins": 1,
        "actor_lr": 1e-2,
        "critic_lr": 1e-2,
        "seed": 0,
    }
    return RLHFTrainer(**{**defaults, **kwargs})


TRAIN = dict(max_timesteps=1, update_timesteps=8, max_batch_size=4, max_seq_len=9, eos_token=EOS)
ROLL = RolloutOptions(max_seq_len=9, eos_token=EOS)


def rolled(actor_critic, reward=count_even, options=ROLL, times=2, seed=0):
    """Experience of ragged answers to ragged prompts."""
    prompts, lengths = PROMPTS.repeat(times, 1), LENGTHS.repeat(times)
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(prompts))
    return roll_out(actor_critic, Scorer(reward), prompts, lengths, groups, options, generator)


def tiny_ppo(value_loss=None, **options):
    return PPO(value_loss or ClippedRegression(), **options)


def made_up(responses=(3, 1, 4), prompts=(2, 3, 1), seed=0):
    """An Experience of random numbers, no model behind it; response lengths and prompt lengths as given."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = torch.tensor(prompts), torch.tensor(responses)
    total = prompts + responses
    b, n = len(prompts), int(total.max())
    prompt_mask = lengths_to_mask(prompts, n)
    response_mask = lengths_to_mask(total, n) & ~prompt_mask

    def noise():
        return torch.randn(b, n, generator=generator).masked_fill(~response_mask, 0.0)

    return Experience(
        sequence=torch.randint(0, TOKENS, (b, n), generator=generator).masked_fill(~lengths_to_mask(total, n), 0),
        prompt_mask=prompt_mask,
        response_mask=response_mask,
        log_probs=noise(),
        ref_log_probs=noise(),
        scores=torch.randn(b, generator=generator),
        finished=torch.ones(b, dtype=torch.bool),
        group_ids=torch.arange(b),
        values=noise(),
    )
