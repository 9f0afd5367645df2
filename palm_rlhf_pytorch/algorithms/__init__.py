"""Algorithms: each one small file, by name for `palm-rlhf rl`."""

from __future__ import annotations

from importlib import import_module

from palm_rlhf_pytorch.algorithm import Algorithm

ALGORITHMS = {
    "ppo": "ppo.PPO",
    "grpo": "grpo.GRPO",
    "dr_grpo": "dr_grpo.DrGRPO",
    "rloo": "rloo.RLOO",
    "reinforce_pp": "reinforce_pp.ReinforcePP",
    "reinforce_pp_baseline": "reinforce_pp.ReinforcePPBaseline",
    "spo": "spo.SPO",
    "max_rl": "max_rl.MaxRL",
    "gspo": "gspo.GSPO",
    "dapo": "dapo.DAPO",
    "tpo": "tpo.TPO",
    "flowrl": "flowrl.FlowRL",
    "score_centering": "score_centering.ScoreCentering",
}


def algorithm_class(name: str) -> type[Algorithm]:
    """The class behind a name; only its module is imported."""
    if name not in ALGORITHMS:
        raise ValueError(f"there is no algorithm {name!r}; there are {', '.join(ALGORITHMS)}")
    module, cls = ALGORITHMS[name].split(".")
    return getattr(import_module(f"{__name__}.{module}"), cls)
