"""RLHF end to end on the PaLM architecture: pretrain, reward, PPO, generate."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from palm_rlhf_pytorch.version import __version__

if TYPE_CHECKING:
    from palm_rlhf_pytorch.actor_critic import ActorCritic
    from palm_rlhf_pytorch.algorithms.centering import score_centering_loss
    from palm_rlhf_pytorch.implicit_process_reward import ImplicitPRM
    from palm_rlhf_pytorch.palm import PaLM
    from palm_rlhf_pytorch.ppo import RLHFTrainer
    from palm_rlhf_pytorch.reward import RewardModel

__all__ = ["ActorCritic", "ImplicitPRM", "PaLM", "RLHFTrainer", "RewardModel", "__version__", "score_centering_loss"]

# imported when asked for: `palm-rlhf --help` need not wait for torch
HOMES = {
    "ActorCritic": "actor_critic",
    "ImplicitPRM": "implicit_process_reward",
    "PaLM": "palm",
    "RLHFTrainer": "ppo",
    "RewardModel": "reward",
    "score_centering_loss": "algorithms.centering",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
