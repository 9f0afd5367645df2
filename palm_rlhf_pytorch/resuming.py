"""What an on-policy trainer's checkpoint holds, and how a trainer takes it up again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from palm_rlhf_pytorch.process_reward import difference
from palm_rlhf_pytorch.state import random_state, restore_optimizer, set_random_state

if TYPE_CHECKING:
    from palm_rlhf_pytorch.trainer import OnPolicyTrainer

COUNTERS = ("step", "prompts_done", "score_shift", "score_scale")


def written_weights(parts: nn.ModuleDict) -> dict[str, Tensor]:
    """What training changes; with the reference also all that is frozen. A trunk under adapters is not written."""
    if "reference" in parts:
        return parts.state_dict()
    trained = {name for name, p in parts.named_parameters(remove_duplicate=False) if p.requires_grad}
    kept = ("learner.algorithm.", *trained)
    return {name: t for name, t in parts.state_dict().items() if name.startswith(kept)}


def state_of(trainer: OnPolicyTrainer) -> dict[str, Any]:
    """All that the next step depends on."""
    return {
        "kind": type(trainer.algorithm).__name__,
        "weights": written_weights(trainer.parts()),
        "trunk": trainer.trunk,
        "optimizer": trainer.optimizer.state_dict(),
        "built": trainer.built,
        "process_reward": None if trainer.process_reward is None else trainer.process_reward.state(),
        "progress": {name: getattr(trainer, name) for name in COUNTERS},
        "prompts": {"count": len(trainer.prompts), "queue": trainer.prompts.queue},
        "order": trainer.order.get_state(),
        "random": {"device": trainer.device.type, "generator": trainer.generator.get_state(), **random_state()},
        "history": trainer.history,
    }


def restore(trainer: OnPolicyTrainer, state: dict[str, Any], path: str | Path) -> None:
    """Check that a state fits the trainer, then take it up; nothing is changed where it does not fit."""
    parts, saved = trainer.parts(), state["weights"]
    shapes = [{name: t.shape for name, t in weights.items()} for weights in (written_weights(parts), saved)]
    differ = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
    if differ:
        raise ValueError(f"{str(path)!r} is of a trainer built otherwise: for one, {differ[0]} differs")
    if state["trunk"] != trainer.trunk:
        raise ValueError(f"{str(path)!r} holds adapters to other frozen weights: give the palm it started from")
    process, learned = trainer.process_reward, state.get("process_reward")  # which older ones know nothing of
    differs = difference(process, learned)
    if differs:
        raise ValueError(f"{str(path)!r} is of a trainer with another process reward: {differs}")
    try:
        restore_optimizer(trainer.optimizer, state["optimizer"], trainer.built, state.get("built", trainer.built))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is of a trainer with another optimiser: {error}") from None
    weights = parts.state_dict()  # knows that ours wrote it, which a bare dict does not
    weights.update(saved)
    parts.load_state_dict(weights)
    for name in COUNTERS:
        setattr(trainer, name, state["progress"][name])
    if process is not None:
        process.restore(learned)
    trainer.resumed = True
    if state["prompts"]["count"] == len(trainer.prompts):  # other prompts start in an order of their own
        trainer.prompts.queue = state["prompts"]["queue"]
    trainer.order.set_state(state["order"])
    if state["random"]["device"] == trainer.device.type:  # another kind of device draws other numbers anyway
        if trainer.accelerate.num_processes == 1:
            trainer.generator.set_state(state["random"]["generator"])
        else:  # the state is the main process's; each must draw noise of its own
            trainer.generator.manual_seed(trainer.generator.initial_seed() + trainer.step)
        set_random_state(state["random"])
    trainer.metrics.restore(state["history"])
