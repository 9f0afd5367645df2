"""What one algorithm says, and the training loop does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from palm_rlhf_pytorch.actor import Actor, PolicyOutput
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import checked
from palm_rlhf_pytorch.palm import PaLM

Losses = tuple[Tensor, dict[str, Tensor]]  # by token (b, n) or by sequence (b,), and numbers of the same shapes


def less_entropy(losses: Tensor, policy: PolicyOutput, weight: float) -> Tensor:
    """Losses (b, n), or (b,) of whole sequences, less weight * entropy by token: the bonus of PPO, 1707.06347, eq. 9.
    As they are where the weight is 0, so that nothing goes backward through the entropy.
    """
    if weight == 0:
        return losses
    return (losses if losses.ndim == 2 else losses[:, None]) - weight * policy.entropy


@dataclass(frozen=True)
class NoOptions:
    """An algorithm without numbers of its own"""


class Algorithm(nn.Module):
    """To be inherited from: `target` and `loss` are an algorithm's own, the rest has defaults.

    A module, so that its own parts (a critic, log Z) are trained, saved and resumed with the policy. Its numbers are
    the fields of `Options`, which are also the flags of `palm-rlhf rl`; `defaults` are those that differ in a subclass.
    Options of the names below are taken over.
    """

    Options: ClassVar[type] = NoOptions
    defaults: ClassVar[dict[str, Any]] = {}

    samples_per_prompt: int = 1
    needs_reference: bool = False  # whether log-probs of the starting policy are wanted
    raw_scores: bool = False  # whether scores must be what the reward gave, without penalties and not scaled
    whole_groups: bool = False  # whether the loss compares samples of one prompt, which are then computed together
    # what a token counts for in a minibatch's loss: see `ops.token_shares`; "constant": the room that responses have
    normalization: str | int = "token"
    sampling_rounds: int = 1  # how often prompts are drawn until `keep` has found enough

    def __init__(
        self, actor_optim: dict[str, Any] | None = None, own_optim: dict[str, Any] | None = None, **options: Any
    ):
        """Keywords of the optimiser for the policy, and for the algorithm's own parts; and any of `Options`."""
        super().__init__()
        self.actor_optim, self.own_optim = actor_optim or {}, own_optim or {}
        self.options = checked(self.Options(**{**self.defaults, **options}))
        for name in ("samples_per_prompt", "normalization", "sampling_rounds"):
            if hasattr(self.options, name):
                setattr(self, name, getattr(self.options, name))

    @classmethod
    def for_policy(cls, palm: PaLM, **options: Any) -> Algorithm:
        """With own parts of the sizes that this policy asks for."""
        return cls(**options)

    def new_actor(self, palm: PaLM, actor_lora: bool = True, **keywords: Any) -> Actor:
        """What it trains of a PaLM: an `ActorCritic` where it needs a critic."""
        return Actor(palm, actor_lora=actor_lora, **keywords)

    def judge(self, actor: Actor, experience: Experience, temperature: float = 1.0) -> Experience:
        """Add what only the policy that sampled can tell (values, say), without gradient; called on small batches."""
        return experience

    def keep(self, experience: Experience) -> Tensor | None:
        """Which rows (b,) bool are worth learning from, whole groups at a time; None: all. Others are drawn instead, up
        to `sampling_rounds` times; where too few are found, those are learned from.
        """
        return None

    def target(self, experience: Experience) -> Experience:
        """Add advantages and the like, computed once over the whole of what was rolled out."""
        raise NotImplementedError(f"{type(self).__name__} needs a target(experience)")

    def loss(self, policy: PolicyOutput, experience: Experience) -> Losses:
        """What each token or sequence adds to the loss, and numbers about it: the engine takes the means."""
        raise NotImplementedError(f"{type(self).__name__} needs a loss(policy, experience)")

    # where there is a critic: the same of what does not need the policy, and of parameters that the policy's loss does
    # not reach. It is learned from and stepped on its own, so that the activations and gradients of both are never in
    # memory together
    critic_loss = None  # (actor_critic, experience) -> Losses

    def parameter_groups(self, actor: Actor) -> list[dict[str, Any]]:
        """What is trained, as an optimiser's parameter groups."""
        groups = [{"name": "actor", "params": actor.actor_parameters(), **self.actor_optim}]
        own = list(self.parameters())
        return [*groups, {"name": "own", "params": own, **self.own_optim}] if own else groups
