"""Ours, in the Python that runs the benchmark."""

from __future__ import annotations

from typing import Any

from tasks import Task, now
from torch import Tensor

from palm_rlhf_pytorch import PaLM, RLHFTrainer
from palm_rlhf_pytorch.native_step import NativeStep, computes_beforehand, matrices


class Ours(Task):
    functions = (*Task.functions, "ppo")

    def load(self, path: str, gradient_checkpointing: bool = False) -> PaLM:
        palm = PaLM.from_checkpoint(path)
        palm.gradient_checkpointing = gradient_checkpointing
        return palm

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def loss(self, ids: Tensor) -> Tensor:
        return self.forward(ids, return_loss=True)

    def draw(self, ids: Tensor, length: int, **how: Any) -> Tensor:
        return self.model.generate(length, ids, filter_logits_fn=None, return_seq_without_prompt=False, **how)

    def clock(self, ids: Tensor, length: int) -> list[float]:
        return [now(self.device) for _ in self.model.stream(length, ids, filter_logits_fn=None)]

    def known_bytes(self, batch: int, steps: int) -> int:
        palm = self.model
        if self.device != "cpu" or not (NativeStep.fits(palm) and computes_beforehand(palm, batch, steps)):
            return 0
        qkv, values, gates, _, of_ff = matrices(palm.layers[0].fn)  # all but the way out of attention
        return sum(w.nbytes for w in (qkv, values, gates, of_ff))

    def ppo(self, rollout: int, minibatch: int, at_once: int, prompt: int, length: int) -> None:
        """One PPO iteration: `rollout` answers, `at_once` generated together, learned from in minibatches."""
        trainer = RLHFTrainer(
            palm=self.model,
            reward_model=lambda prompts, responses: [float((r % 2 == 0).float().mean()) for r in responses],
            prompt_token_ids=self.ids(rollout, prompt),
            minibatch_size=minibatch,
            critic_num_pred_bins=1,
            accelerate_kwargs={"cpu": self.device == "cpu"},
            seed=0,
        )
        sizes = dict(max_timesteps=rollout, update_timesteps=rollout, max_batch_size=at_once, max_seq_len=length)
        trainer.train(num_episodes=1, **sizes)
        for scope in list(self.model.finetune_modules):  # the next starts as this one did
            self.model.remove_finetune_params(scope)


if __name__ == "__main__":
    Ours().serve()
