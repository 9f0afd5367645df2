"""RLHF end to end on the PaLM architecture: pretrain, reward, PPO, generate."""

from palm_rlhf_pytorch.actor_critic import ActorCritic
from palm_rlhf_pytorch.implicit_process_reward import ImplicitPRM
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.ppo import RLHFTrainer
from palm_rlhf_pytorch.reward import RewardModel
from palm_rlhf_pytorch.version import __version__

__all__ = ["ActorCritic", "ImplicitPRM", "PaLM", "RLHFTrainer", "RewardModel", "__version__"]
