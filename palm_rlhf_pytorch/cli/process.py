"""--process-reward: what each token of a response is worth, beside the reward for the whole."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

from palm_rlhf_pytorch.batches import encode_prompt
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.implicit_process_reward import ImplicitPRM
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.process_reward import OnlineProcessReward, ProcessReward
from palm_rlhf_pytorch.prompts import Remembered
from palm_rlhf_pytorch.run_directory import RunDirectory

IMPLICIT = "implicit"


@dataclass(frozen=True)
class ProcessOptions:
    """What each token is worth, beside the reward for the whole"""

    process_reward: str | None = option(
        None,
        f"{IMPLICIT}: a copy of --model learns from rewards which tokens make them high (PRIME, 2502.01456); or the "
        "directory of a reward run with the model's tokenizer: what each token adds to its score (default: nothing)",
    )
    process_weight: float = option(1.0, "weight of the tokens' rewards")
    process_lr: float = option(1e-4, f"learning rate of the {IMPLICIT} one", least=0)
    process_beta: float = option(0.05, f"scale of the {IMPLICIT} one: beta times the log ratio to --model", least=0)
    process_threshold: float = option(0.5, f"to the {IMPLICIT} one a response is right where its reward is above this")

    def made(self, palm: PaLM, tokenizer: Remembered) -> ProcessReward | None:
        """The process reward for this policy, which has no adapters yet; None where none is asked for."""
        if self.process_reward is None:
            return None
        if self.process_reward == IMPLICIT:
            model = ImplicitPRM(deepcopy(palm).requires_grad_(True), deepcopy(palm), beta=self.process_beta)
            return OnlineProcessReward(model, self.process_lr, self.process_weight, self.process_threshold)
        run = RunDirectory(self.process_reward)
        own = run.tokenizer()
        if any(tuple(encode_prompt(own, prompt)) != ids for ids, prompt in tokenizer.prompts.items()):
            raise ValueError(
                f"--process-reward {self.process_reward!r} divides text into other tokens than the model: train one "
                f"from the model (palm-rlhf reward --model), or take {IMPLICIT!r}"
            )
        return ProcessReward(run.reward_model(palm.device), self.process_weight)
