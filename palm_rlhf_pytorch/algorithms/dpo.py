"""Learning from choices without a reward model: DPO, IPO and SimPO.

In every pair of tensors (2, b) below, row 0 is of the chosen responses and row 1 of the rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.batches import Row, encode_pair
from palm_rlhf_pytorch.data import Pair
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.tokenizer import Tokenizer

BETAS = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0}
PER_TOKEN_BETA = 5.0  # Tülu 3's, where DPO's log-ratios are means
SIMPO_GAMMA = 1.0


@dataclass(frozen=True)
class DPO:
    """How choices are learned from"""

    loss: str = option(
        "sigmoid", "sigmoid (DPO), ipo (squared error), or simpo (without a reference)", choices=tuple(BETAS)
    )
    beta: float | None = option(
        None, "how much a log-ratio is worth; IPO's tau (default: 0.1; 2 for simpo; 5 for sigmoid --length-normalised)"
    )
    label_smoothing: float = option(0.0, "share of the choices taken to be the wrong way round, below 0.5", least=0)
    length_normalised: bool = option(False, "log-ratios are means over tokens, not sums (simpo's always are)")
    gamma: float | None = option(None, "margin by which simpo's chosen reward should be higher (default: 1)")

    both_learn: ClassVar[bool] = True  # gradients flow into both rows

    def __post_init__(self):
        if self.loss not in BETAS:
            raise ValueError(f"the loss is one of {', '.join(BETAS)}, got {self.loss!r}")
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}: without it nothing would be learned")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("ipo has no label smoothing: its squared error is robust by itself; leave it out")
        if self.gamma is not None and self.loss != "simpo":
            raise ValueError(f"gamma is simpo's margin, the loss {self.loss} has none: leave it out")

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo"

    @property
    def per_token(self) -> bool:
        return self.length_normalised or self.loss == "simpo"

    @property
    def strength(self) -> float:
        """beta, or what it is by default."""
        if self.beta is not None:
            return self.beta
        return PER_TOKEN_BETA if self.loss == "sigmoid" and self.per_token else BETAS[self.loss]

    @property
    def lead(self) -> float:
        """gamma, or what it is by default."""
        return SIMPO_GAMMA if self.loss == "simpo" and self.gamma is None else self.gamma or 0.0

    def __call__(
        self, log_probs: Tensor, reference: Tensor, lengths: Tensor, labels: None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed log-probs under policy and reference, and token counts, all (2, b) -> losses (b,), and numbers.

        With r = beta log(pi / pi_ref) and h = r_chosen - r_rejected:
        DPO    -log sigma(h), 2305.18290, eq. 7; smoothed by s: -(1 - s) log sigma(h) - s log sigma(-h) (Mitchell's
               cDPO note, eq. 3); with r / |y| it is Tülu 3's, 2411.15124, eq. 6.
        IPO    (h / tau - 1 / (2 tau))^2, tau = beta, 2310.12036, eq. 17. Its authors, and TRL, take r / |y|.
        SimPO  -log sigma(h - gamma) with r = beta log(pi) / |y|, 2405.14734, eq. 6.
        """
        ratios = log_probs - reference if self.needs_reference else log_probs
        rewards = self.strength * (ratios / lengths if self.per_token else ratios)
        margin = rewards[0] - rewards[1]
        if self.loss == "ipo":
            losses = ((margin - 0.5) / self.strength).square()
        else:
            h, s = margin - self.lead, self.label_smoothing
            losses = -(1 - s) * F.logsigmoid(h) - s * F.logsigmoid(-h)
        numbers = {
            "accuracy": (margin > 0).float().mean(),
            "margin": margin.mean(),
            "chosen_reward": rewards[0].mean(),
            "rejected_reward": rewards[1].mean(),
            "chosen_log_prob": log_probs[0].mean(),
            "rejected_log_prob": log_probs[1].mean(),
        }
        return losses, {name: number.detach() for name, number in numbers.items()}

    def answers(self, pairs: Sequence[Pair], tokenizer: Tokenizer, max_len: int) -> tuple[list[Row], list[Row], None]:
        """Both answers of each pair, encoded; no labels."""
        rows = [encode_pair(tokenizer, pair.prompt, pair.chosen, pair.rejected, max_len) for pair in pairs]
        return [chosen for chosen, _ in rows], [rejected for _, rejected in rows], None
