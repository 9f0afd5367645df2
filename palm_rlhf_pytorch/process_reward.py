"""Process rewards: what each token of a response is worth, from an implicit or an ordinary reward model.

Implicit: Yuan et al., 2412.01981. Learned along with the policy: PRIME, Cui et al., 2502.01456.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from palm_rlhf_pytorch.actor import Actor
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.implicit_process_reward import ImplicitPRM, outcome_loss
from palm_rlhf_pytorch.optimizers import AdamW
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.precision import HALVES
from palm_rlhf_pytorch.reward import RewardModel
from palm_rlhf_pytorch.rollout import checked_weight
from palm_rlhf_pytorch.state import fingerprint, hyper_parameters, restore_optimizer


class ProcessReward:
    """Fills an Experience's token_rewards, times `weight`.

    An `ImplicitPRM` gives each response token beta times its log ratio; a causal `RewardModel` what the token adds to
    the score, so that a response's rewards sum to its score less that of the bare prompt.
    """

    def __init__(self, model: ImplicitPRM | RewardModel, weight: float = 1.0):
        if not isinstance(model, (ImplicitPRM, RewardModel)):
            raise TypeError(f"a process reward needs an ImplicitPRM or a RewardModel, got {type(model).__name__}")
        if isinstance(model, RewardModel) and not model.palm.causal:
            raise ValueError("a process reward scores prefixes and needs a causal reward model, got an encoder")
        self.model, self.weight = model, checked_weight(weight, "the process reward")
        self.metrics: dict[str, float] = {}  # of the last batch, for the trainer's row

    @property
    def palms(self) -> list[PaLM]:
        model = self.model
        return [model.model, model.ref_model] if isinstance(model, ImplicitPRM) else [model.palm]

    def check(self, actor: Actor) -> None:
        """Refuse a model that does not know all of the policy's tokens, or would change as the policy learns."""
        known, policy = min(palm.num_tokens for palm in self.palms), actor.actor_palm
        if known < policy.num_tokens:
            raise ValueError(f"the process reward knows {known} tokens, but the policy writes {policy.num_tokens}")
        if self.shares(actor.actor_parameters()):
            raise ValueError("the process reward shares weights that the policy trains: give it a deepcopy of the palm")

    def shares(self, parameters: Iterable[nn.Parameter]) -> bool:
        own = {id(p) for palm in self.palms for p in palm.palm_parameters()}
        return any(id(p) in own for p in parameters)

    def __call__(
        self,
        experience: Experience,
        max_tokens: int | None = None,
        over_processes: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> Experience:
        """The experience with its token_rewards. At most max_tokens positions are read at once; `over_processes` gives
        the mean of a tensor over all that train together.
        """
        self.model.eval()
        return experience.by_length(lambda part: replace(part, token_rewards=self.rewards(part)), max_tokens)

    @torch.no_grad()
    def rewards(self, experience: Experience) -> Tensor:
        """Weighted rewards (b, n) float32, 0 outside the response."""
        own, mask = self.palms[0].device, experience.response_mask
        sequence, prompt_mask, real = (
            t.to(own) for t in (experience.sequence, experience.prompt_mask, experience.mask)
        )
        if isinstance(self.model, ImplicitPRM):
            rewards = self.model(sequence.masked_fill(~real, -1))
        else:
            rewards = self.model.prefix_scores(sequence, prompt_mask, real).diff(dim=1)
        # the first token is never in a response
        return (self.weight * F.pad(rewards.float(), (1, 0))).to(mask.device).masked_fill(~mask, 0.0)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold of it: nothing, as it does not learn."""
        return None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Take up what `state` gave."""


class OnlineProcessReward(ProcessReward):
    """An `ImplicitPRM` that learns from the policy's rollouts: PRIME, 2502.01456, algorithm 1.

    Before it gives a batch its rewards (section 3.1's order), one step on the outcome's cross-entropy, which is right
    where the score (penalties included) exceeds `threshold`. One reference for policy and rewards, the SFT model, is
    the paper's way.
    """

    def __init__(
        self,
        model: ImplicitPRM,
        lr: float = 1e-6,
        weight: float = 1.0,
        threshold: float = 0.5,
        *,
        max_norm: float = 1.0,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
    ):
        super().__init__(model, weight)
        if not isinstance(model, ImplicitPRM):
            raise TypeError(f"only an ImplicitPRM learns from outcomes, got {type(model).__name__}")
        self.threshold, self.max_norm = threshold, max_norm
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("the implicit PRM has nothing to train: all of its model's weights are frozen")
        if any(p.dtype in HALVES for p in self.trained.values()):
            raise ValueError(
                "the implicit PRM's weights are trained, and in half precision small steps would be lost: give it "
                "float32 (palm.float(), or --dtype fp32)"
            )
        self.optimizer: Optimizer = AdamW(
            list(self.trained.values()), lr=lr, betas=tuple(betas), weight_decay=weight_decay
        )

    def check(self, actor: Actor) -> None:
        """Also refuse to train the policy's own weights."""
        if self.shares(actor.actor_palm.parameters()):
            raise ValueError("the implicit PRM shares weights with the policy: give it a deepcopy of the palm")
        super().check(actor)

    def __call__(
        self,
        experience: Experience,
        max_tokens: int | None = None,
        over_processes: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> Experience:
        self.metrics = self.learn(experience, max_tokens, over_processes)
        return super().__call__(experience, max_tokens)

    @torch.enable_grad()
    def learn(
        self,
        experience: Experience,
        max_tokens: int | None = None,
        over_processes: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> dict[str, float]:
        """One step on all rows, in parts of at most max_tokens positions -> the loss and accuracy before it."""
        device = self.palms[0].device
        sums = torch.zeros(2, device=device)
        self.model.train()
        self.optimizer.zero_grad()
        for rows in experience.parts(max_tokens):
            part = experience[rows].to(device)
            labels, share = (part.scores > self.threshold).float(), len(part) / len(experience)
            totals = self.model.totals(part.sequence.masked_fill(~part.mask, -1), part.prompt_mask)
            loss = outcome_loss(totals, labels) * share
            loss.backward()
            right = ((totals > 0) == labels.bool()).float().mean() * share
            sums += torch.stack([loss.detach(), right])
        self.model.eval()
        for parameter in self.trained.values():
            if parameter.grad is not None:
                parameter.grad = over_processes(parameter.grad)
        nn.utils.clip_grad_norm_(list(self.trained.values()), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.clear_autocast_cache()  # or the rewards would be those of the weights before the step
        loss, accuracy = over_processes(sums).tolist()
        return {"prm_loss": loss, "prm_accuracy": accuracy}

    def state(self) -> dict[str, Any]:
        """Weights in training, a hash of those that are not (the reference's), and the optimiser."""
        frozen = (p for name, p in self.model.named_parameters() if name not in self.trained)
        return {
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "trunk": fingerprint(frozen),
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(state["weights"][name])
        restore_optimizer(self.optimizer, state["optimizer"], hyper_parameters(self.optimizer))


def difference(process: ProcessReward | None, saved: dict[str, Any] | None) -> str | None:
    """Why a saved state is not this process reward's; None where it is."""
    own = None if process is None else process.state()
    if own is None or saved is None:
        return None if own is saved else "one of the two learns from outcomes, the other does not"
    shapes = [{name: t.shape for name, t in state["weights"].items()} for state in (own, saved)]
    if shapes[0] != shapes[1]:
        return f"for one, {min(name for name, _ in shapes[0].items() ^ shapes[1].items())} differs"
    return None if own["trunk"] == saved["trunk"] else "its reference has other weights"
