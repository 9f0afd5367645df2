"""The one on-policy training loop: roll out, set a target, learn, log, save. Algorithms bring the rest."""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from palm_rlhf_pytorch import generation, resuming
from palm_rlhf_pytorch.actor import Actor
from palm_rlhf_pytorch.algorithm import Algorithm
from palm_rlhf_pytorch.devices import fused, prepared
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.metrics import MetricsLog
from palm_rlhf_pytorch.ops import k3, token_shares
from palm_rlhf_pytorch.optimizers import AdamW
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.process_reward import ProcessReward
from palm_rlhf_pytorch.prompts import Prompts, Remembered
from palm_rlhf_pytorch.rollout import REWARD, Reward, RolloutOptions, Scorer, roll_out
from palm_rlhf_pytorch.state import fingerprint, hyper_parameters, load_state, save_state

Metrics = dict[str, float]

JUDGED = 2  # times the rows whose graph is in memory are judged at once: of a pass without a graph, one layer is


@dataclass(frozen=True)
class LearnOptions:
    """How one batch of experience is learned from."""

    minibatch_size: int = 16
    # sequences computed at once (as many tokens as this many of the longest have); None: the whole minibatch
    micro_batch_size: int | None = None
    epochs: int = 1
    max_norm: float | None = None  # gradient clipping, each parameter group by itself
    normalize_reward: bool = False  # scale scores to mean 0, std 1 on the starting policy's first rollouts
    kl_stop: float | None = None  # no more epochs on this batch once approx_kl (k3 of KL(old || new)) exceeds this

    def __post_init__(self):
        for name in ("minibatch_size", "micro_batch_size", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm must be above 0, or None for no clipping, got {self.max_norm}")

    @property
    def rows_in_memory(self) -> int:
        """Sequences whose graph is in memory at once."""
        return self.micro_batch_size or self.minibatch_size


class Learner(nn.Module):
    """Policy and algorithm behind one forward: what accelerate wraps, so that gradients synchronise."""

    def __init__(self, actor_critic: Actor, algorithm: Algorithm):
        super().__init__()
        self.actor_critic, self.algorithm = actor_critic, algorithm

    @property
    def parts(self) -> tuple[str, ...]:
        """The losses that add up to the whole."""
        return ("policy",) if self.algorithm.critic_loss is None else ("policy", "critic")

    def forward(self, experience: Experience, temperature: float, *parts: str) -> tuple[Tensor, dict[str, Tensor]]:
        """-> what these rows add to their minibatch's loss, and numbers (b,) or (b, n) about them."""
        mask, shares = experience.response_mask, experience.loss_shares
        if shares is None:
            shares = token_shares(mask, self.algorithm.normalization)
        total, numbers = 0.0, {}
        for part in parts or self.parts:
            if part == "policy":
                policy = self.actor_critic.log_probs(experience.sequence, mask, temperature)
                losses, found = self.algorithm.loss(policy, experience)
                numbers["approx_kl"] = k3(experience.log_probs, policy.log_probs.detach())
            else:
                losses, found = self.algorithm.critic_loss(self.actor_critic, experience)
            total = total + (by_token(losses) * shares).sum()
            numbers.update(found)
        return total, {name: t.detach() for name, t in numbers.items()}


def by_token(t: Tensor) -> Tensor:
    """(b,) -> (b, 1), what is one for all tokens of a sequence; (b, n) stays."""
    return t if t.ndim == 2 else t[:, None]


class OnPolicyTrainer:
    """Rolls out `update_timesteps` prompts, learns from them, and starts again. See `Algorithm` for what varies.

    One generator draws prompts, samples and minibatches; with it, the optimiser and the weights in a checkpoint, a
    resumed run takes the same next step.
    """

    def __init__(
        self,
        actor_critic: Actor,
        algorithm: Algorithm,
        reward: Reward,
        prompts: Prompts,
        *,
        tokenizer: Any = None,
        reward_over: str | Mapping[str, str] | None = None,
        learn_options: LearnOptions | None = None,
        missing_eos_penalty: float = 0.0,
        overlong_buffer: int = 0,
        overlong_penalty: float = 1.0,
        process_reward: ProcessReward | None = None,
        optimizer_class: Callable[..., Optimizer] = AdamW,
        seed: int | None = None,
        metrics_path: str | Path | None = None,
        accelerate_kwargs: dict[str, Any] | None = None,
    ):
        self.accelerate = Accelerator(**(accelerate_kwargs or {}))
        if self.accelerate.log_with:
            self.accelerate.init_trackers("palm_rlhf_pytorch")
        if self.accelerate.log_with or self.accelerate.num_processes > 1:
            atexit.register(self.accelerate.end_training)  # trackers write their last lines, processes take their leave
        self.options = learn_options or LearnOptions()
        self.penalties = RolloutOptions(
            missing_eos_penalty=missing_eos_penalty, overlong_buffer=overlong_buffer, overlong_penalty=overlong_penalty
        )
        if algorithm.raw_scores and (self.penalties.penalises or self.options.normalize_reward):
            raise ValueError(
                f"{type(algorithm).__name__} needs scores as the reward gives them: leave out missing_eos_penalty, "
                "overlong_buffer and normalize_reward"
            )
        self.prompts = prompts
        self.prompts.check(actor_critic.actor_palm.num_tokens)
        self.tokenizer = tokenizer
        self.scorer = Scorer(reward, Remembered(tokenizer, prompts.texts) if prompts.texts else tokenizer, reward_over)
        self.scorer.check(actor_critic.actor_palm.num_tokens)
        for model in self.scorer.models:
            model.to(self.accelerate.device).eval()
        if process_reward is not None:
            if not isinstance(process_reward, ProcessReward):
                kind = type(process_reward).__name__
                raise TypeError(f"process_reward is a ProcessReward, which a model is wrapped in, got {kind}")
            process_reward.check(actor_critic)
            process_reward.model.to(self.accelerate.device).eval()
        self.process_reward = process_reward

        learner = Learner(actor_critic, algorithm).to(self.accelerate.device)
        self.optimizer = optimizer_class(
            algorithm.parameter_groups(actor_critic), **fused(optimizer_class, self.accelerate.device)
        )
        self.built = hyper_parameters(self.optimizer)
        self.unwrapped = learner  # to ask accelerate for it would import torch's compiler
        self.learner, self.optimizer = prepared(self.accelerate, learner, self.optimizer)
        self.actor_critic, self.algorithm = actor_critic, algorithm

        seed = torch.initial_seed() % 2**31 if seed is None else seed
        # the order of prompts is the same in all processes, what they draw is their own
        self.order = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed + self.accelerate.process_index)
        self.metrics = MetricsLog(
            metrics_path if self.accelerate.is_main_process else None, accelerator=self.accelerate
        )
        self.step = 0  # updates so far
        self.prompts_done = 0  # of the train call under way
        self.resumed = False  # whether the next train call goes on with one that a checkpoint was taken of
        self.score_shift, self.score_scale = 0.0, 1.0
        self.sampled: Metrics = {}  # what the last rollouts were like
        self.room: int | None = None  # tokens that the longest response to their prompts can have

    @property
    def device(self) -> torch.device:
        return self.accelerate.device

    @property
    def palm(self) -> PaLM:
        return self.actor_critic.actor_palm

    @property
    def history(self) -> list[Metrics]:
        """One row of metrics for each update so far."""
        return self.metrics.history

    @property
    def missing_eos_penalty(self) -> float:
        return self.penalties.missing_eos_penalty

    def print(self, message: str) -> None:
        self.accelerate.print(message)

    def eval(self) -> OnPolicyTrainer:
        """Evaluation mode, and nothing else."""
        self.learner.eval()
        return self

    # the loop

    def train(
        self,
        num_episodes: int | bool = 50000,
        max_timesteps: int = 500,
        update_timesteps: int = 5000,
        max_batch_size: int = 16,
        max_seq_len: int = 2048,
        eos_token: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        *,
        on_update: Callable[[Metrics], None] | None = None,
    ) -> OnPolicyTrainer:
        """Roll out num_episodes * max_timesteps prompts, `max_batch_size` at once, learning after every
        `update_timesteps` of them (and from what is left at the end). `on_update` sees each update's metrics.
        """
        if isinstance(num_episodes, bool):  # Module.train(mode), which some code calls on everything
            self.learner.train(num_episodes)
            return self
        if min(update_timesteps, max_batch_size) < 1:
            sizes = f"update_timesteps={update_timesteps} and max_batch_size={max_batch_size}"
            raise ValueError(f"a rollout needs one prompt or more at once, got {sizes}")
        eos = eos_token if eos_token is None or isinstance(eos_token, int) else tuple(eos_token)
        options = replace(
            self.penalties,
            max_seq_len=max_seq_len,
            eos_token=eos,
            temperature=temperature,
            pad_value=self.prompts.pad_value,
        )
        if not temperature > 0:
            raise ValueError(f"learning needs a temperature above 0, got {temperature}")
        total = num_episodes * max_timesteps
        if not self.resumed:
            self.prompts_done = 0
        self.resumed = False
        with tqdm(
            total=total,
            initial=self.prompts_done,
            unit="prompt",
            desc=type(self.algorithm).__name__,
            disable=not self.accelerate.is_local_main_process,
        ) as bar:
            while self.prompts_done < total:
                count = min(update_timesteps, total - self.prompts_done)
                row = self.update(count, max_batch_size, options, bar)
                self.prompts_done += count
                self.metrics.append(row)
                shown = ("reward", "kl", "entropy", "tokens_per_second")
                bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row})
                if on_update is not None:
                    on_update(row)
        self.prompts_done = 0
        return self

    def update(self, count: int, max_batch_size: int, options: RolloutOptions, bar: tqdm | None = None) -> Metrics:
        """Roll out `count` prompts and learn from them once."""
        started = time.perf_counter()
        with self.actor_critic.first_layers_kept():
            experience = self.roll_out(count, max_batch_size, options, bar)
            rolled = time.perf_counter()
            learned = self.learn(experience, options.temperature)
        ended = time.perf_counter()
        self.step += 1
        tokens = self._over_all(float(experience.lengths.sum())) * self.accelerate.num_processes
        return {
            "step": self.step,
            "prompts": self.prompts_done + count,
            **self._means_over_all({**learned, **self.sampled}),
            **(self.process_reward.metrics if self.process_reward is not None and learned else {}),
            "tokens_per_second": tokens / (ended - started),
            "rollout_seconds": rolled - started,
            "learn_seconds": ended - rolled,
        }

    def roll_out(self, count: int, max_batch_size: int, options: RolloutOptions, bar: tqdm | None = None) -> Experience:
        """Answers to the next `count` prompts (this process's share of them), scored and judged. Where the algorithm
        keeps only some, others are drawn in the place of those left out, up to its `sampling_rounds`.
        """
        options = replace(
            options,
            max_batch=max_batch_size * self.algorithm.samples_per_prompt,
            rows_at_once=JUDGED * self.options.rows_in_memory,
            reference=self.algorithm.needs_reference,
        )
        processes = self.accelerate.num_processes
        if count < processes:
            raise ValueError(f"update_timesteps={count} leaves some of {processes} processes without a prompt")
        wanted = count // processes  # equal shares: gradients wait for all
        experience = self._roll_out(wanted, options, bar)
        for _ in range(self.algorithm.sampling_rounds - 1):
            keep = self.algorithm.keep(experience)
            enough = keep is None or int(keep.sum()) >= wanted * self.algorithm.samples_per_prompt
            # every process draws as often, so that the order of prompts stays the same in all
            if self._over_all(float(enough)) == 1.0:
                break
            experience = Experience.cat([experience, self._roll_out(wanted, options)])
        self._find_scale(experience.scores)
        self.sampled, self.room = describe(self._scaled(experience)), options.max_seq_len - self.prompts.shortest
        experience = self._chosen(experience, wanted * self.algorithm.samples_per_prompt)
        if self.process_reward is not None and len(experience):
            tokens = self.options.rows_in_memory * experience.sequence.shape[1]
            mean = partial(self.accelerate.reduce, reduction="mean")
            with self.accelerate.autocast():
                experience = self.process_reward(experience, tokens, mean)
        return self._scaled(experience)

    def _chosen(self, experience: Experience, count: int) -> Experience:
        """At most `count` rows, those that the algorithm keeps. Several processes must take as many steps: there others
        fill up.
        """
        keep = self.algorithm.keep(experience)
        if keep is None:
            return experience
        if self.accelerate.num_processes == 1:
            count = min(count, int(keep.sum()))
        return experience[(~keep).int().argsort(stable=True)[:count].sort().values]

    def _roll_out(self, count: int, options: RolloutOptions, bar: tqdm | None = None) -> Experience:
        """Answers to `count` prompts in each process."""
        processes, samples = self.accelerate.num_processes, self.algorithm.samples_per_prompt
        rows = self.prompts.draw(count * processes, self.order)[self.accelerate.process_index :: processes]
        ids, lengths = self.prompts.rows(rows)
        ids, lengths = generation.repeat_prompts(ids.to(self.device), lengths.to(self.device), samples)
        groups = torch.arange(len(rows), device=self.device).repeat_interleave(samples)
        with torch.no_grad(), self.accelerate.autocast():  # in the precision that learning computes in
            return roll_out(
                self.actor_critic,
                self.scorer,
                ids,
                lengths,
                groups,
                options,
                self.generator,
                partial(self.algorithm.judge, self.actor_critic, temperature=options.temperature),
                None if bar is None else lambda ended: bar.update(ended * processes / samples),
            )

    def _find_scale(self, scores: Tensor) -> None:
        """From the starting policy's first answers."""
        if not self.options.normalize_reward or self.step > 0:
            return
        scores = self.accelerate.gather(scores)
        self.score_shift = float(scores.mean())
        std = float(scores.std(correction=0))
        self.score_scale = std if std > 1e-6 else 1.0  # all equal: there is nothing to scale by

    def _scaled(self, experience: Experience) -> Experience:
        return replace(experience, scores=(experience.scores - self.score_shift) / self.score_scale)

    def learn(self, experience: Experience | Sequence[Experience], temperature: float = 1.0) -> Metrics:
        """Take the optimiser's steps on one batch of experience (or several, put together)."""
        if not isinstance(experience, Experience):
            experience = Experience.cat(list(experience))
        if not len(experience):  # nothing was worth it
            return {}
        experience = self.algorithm.target(experience)
        self.learner.train()
        rows: list[Metrics] = []
        for _ in range(self.options.epochs):
            epoch = [self._take_step(experience[some], temperature) for some in self._minibatches(experience.group_ids)]
            rows += epoch
            if self.options.kl_stop is not None and self._over_all(mean_of(epoch)["approx_kl"]) > self.options.kl_stop:
                break
        self.learner.eval()
        return {**describe(experience), **mean_of(rows)}

    def _over_all(self, value: float) -> float:
        """The mean over processes, so that all take the same decision."""
        return float(self.accelerate.reduce(torch.tensor(value, device=self.device), reduction="mean"))

    def _means_over_all(self, numbers: Metrics) -> Metrics:
        if self.accelerate.num_processes == 1:
            return numbers
        values = torch.tensor(list(numbers.values()), device=self.device)
        return dict(zip(numbers, self.accelerate.reduce(values, reduction="mean").tolist(), strict=True))

    def _minibatches(self, group_ids: Tensor) -> Iterator[Tensor]:
        """Rows of shuffled minibatches; a group is never split."""
        _, group_of, counts = group_ids.unique(return_inverse=True, return_counts=True)
        most = int(counts.max())
        per_batch = max(1, self.options.minibatch_size // most)
        shuffled = torch.randperm(len(counts), generator=self.order).to(group_ids.device)
        for groups in shuffled.split(per_batch):
            yield torch.isin(group_of, groups).nonzero().squeeze(-1)

    def _take_step(self, batch: Experience, temperature: float) -> Metrics:
        micro = self.options.micro_batch_size
        longest = None if micro is None else micro * batch.sequence.shape[1]
        mask = batch.response_mask
        batch = replace(batch, loss_shares=self._shares(mask))
        by_tokens, by_sequences = token_shares(mask, "token"), token_shares(mask, "sequence")
        totals: dict[str, Tensor] = {}
        stepped: set[nn.Parameter] = set()
        *before, last = batch.parts(longest, self.algorithm.whole_groups)
        for terms in self._terms():
            for rows in (*before, last):
                part = batch[rows]
                # processes may have different numbers of parts: gradients are put together with the last
                with nullcontext() if rows is last else self.accelerate.no_sync(self.learner):
                    loss, numbers = self.learner(part, temperature, *terms)
                    self.accelerate.backward(loss)
                for name, t in numbers.items():  # losses are logged as they count, what sequences are by sequence
                    shares = by_sequences if t.ndim == 1 else by_tokens
                    shares = part.loss_shares if name.endswith("loss") else shares[rows, : part.sequence.shape[1]]
                    totals[name] = totals.get(name, 0.0) + (by_token(t) * shares).sum()
            totals |= self._apply_gradients(stepped)
        return {name: float(value) for name, value in totals.items()}

    def _apply_gradients(self, stepped: set[nn.Parameter]) -> dict[str, Tensor]:
        """Step on the parameters that have gradients, and drop these. Their norms, by group. `stepped` are those that
        another loss of this minibatch has reached, and grows.
        """
        reached = {p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None}
        if reached & stepped:
            both = f"{len(reached & stepped)} parameters of {type(self.algorithm).__name__}"
            raise ValueError(f"{both} are reached by loss and critic_loss both: give each its own, or put both in loss")
        stepped |= reached
        self.accelerate.unscale_gradients(self.optimizer)  # here, once: accelerate's clip_grad_norm_ does it every time
        norms = {}
        for group in self.optimizer.param_groups:
            if not reached.isdisjoint(group["params"]):
                norm = nn.utils.clip_grad_norm_(group["params"], self.options.max_norm or math.inf)
                norms[f"grad_norm_{group.get('name', 'policy')}"] = torch.as_tensor(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norms

    def _shares(self, mask: Tensor) -> Tensor:
        """What each token counts for. Gradients are averaged over processes: where tokens are to count the same, those
        of a process with more of them count for more.
        """
        normalization = self.algorithm.normalization
        if normalization == "constant" and self.room is not None:
            normalization = self.room
        shares = token_shares(mask, normalization)
        if normalization == "token" and self.accelerate.num_processes > 1:
            own = float(mask.sum())
            shares = shares * own / self._over_all(own)
        return shares

    def _terms(self) -> list[tuple[str, ...]]:
        """The losses to step on one by one, so that the graph and the gradients of one are in memory: they have no
        parameter in common. Several processes need every gradient in one pass.
        """
        parts = self.unwrapped.parts
        return [(part,) for part in parts] if self.accelerate.num_processes == 1 else [parts]

    # answers

    @torch.no_grad()
    def generate(
        self,
        max_seq_len: int,
        eos_token: int | Sequence[int] | None = None,
        *,
        prompt: Tensor | str,
        num_samples: int = 4,
        return_score: bool = False,
        temperature: float = 1.0,
        **kwargs,
    ) -> Tensor | tuple[Tensor, float]:
        """The best of `num_samples` answers by the reward: (n,), prompt included and padding trimmed.

        prompt: ids (n,), or a text where the trainer has a tokenizer. With return_score also what the reward gave it.
        Further keywords go to `PaLM.generate`.
        """
        if isinstance(prompt, str):
            prompt = Prompts.gather([prompt], None, None, self.tokenizer).ids[0]
        prompt = torch.as_tensor(prompt)
        if prompt.ndim != 1:
            raise ValueError(f"one prompt (n,) is needed, got shape {tuple(prompt.shape)}")
        self.eval()
        out = self.palm.generate(
            max_seq_len,
            prompt[None].expand(num_samples, -1),
            temperature,
            finetune_scope=self.actor_critic.actor_lora_scope,
            **{"filter_logits_fn": None, "pad_value": self.prompts.pad_value, **kwargs},
            eos_token=eos_token,
            return_log_probs=True,
        )
        answer, score = generation.best_of(self.scorer(out), out)
        return (answer, float(score)) if return_score else answer

    def merged_policy(self) -> PaLM:
        """A copy of the policy as a plain PaLM: adapters merged, the critic's left out, nothing frozen."""
        scope = self.actor_critic.actor_lora_scope
        policy = deepcopy(self.palm)
        if scope is not None:
            policy.merge_finetune_params(scope)
        for other in list(policy.finetune_modules):
            policy.remove_finetune_params(other)
        return policy.requires_grad_(True).eval()

    # checkpoints

    def save(self, filepath: str | Path = "./checkpoint.pt") -> None:
        """Write all that a resumed run needs: weights in training, optimiser, counters, random state, metrics."""
        if self.accelerate.is_main_process:
            save_state(filepath, resuming.state_of(self))

    def load(self, filepath: str | Path = "./checkpoint.pt") -> OnPolicyTrainer:
        """Take up what `save` wrote, in a trainer built the same way; the file's tensors are read, no code is run.

        Where adapters are trained, palm must be the one that the run started from, which is checked. A policy trained
        as a whole comes with its frozen reference, so any palm of its sizes will do.
        """
        resuming.restore(self, load_state(filepath, type(self.algorithm).__name__), filepath)
        return self

    def parts(self) -> nn.ModuleDict:
        """Policy and algorithm; and the frozen reference, where the policy is trained as a whole."""
        parts = {"learner": self.unwrapped}
        if self.actor_critic.actor_lora_scope is None:
            parts["reference"] = self.actor_critic.reference_palm
        return nn.ModuleDict(parts)

    @cached_property
    def trunk(self) -> str:
        """A hash of the frozen weights that a checkpoint leaves out."""
        written = resuming.written_weights(self.parts())
        return fingerprint(p for name, p in self.parts().named_parameters() if name not in written)


def mean_of(rows: Sequence[Metrics]) -> Metrics:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def describe(experience: Experience) -> Metrics:
    """What a batch was like, before learning from it."""
    lengths, mask = experience.lengths.float(), experience.response_mask
    numbers = {
        "reward": float(experience.scores.mean()),
        "reward_std": float(experience.scores.std(correction=0)),
        "response_length": float(lengths.mean()),
        "finished": float(experience.finished.float().mean()),
    }
    numbers.update({name: float(t.mean()) for name, t in experience.extra.items() if name.startswith(REWARD)})
    if experience.token_rewards is not None:
        numbers["process_reward"] = float(experience.token_rewards.sum(dim=-1).mean())
    if experience.kl is not None:
        numbers["kl"] = float(experience.kl.mean())
    if experience.values is not None and experience.returns is not None:
        returns, error = experience.returns[mask], (experience.returns - experience.values)[mask]
        variance = float(returns.var(correction=0))
        # how much of the returns the critic foresaw: 1 all, 0 nothing; 0 too where there is nothing to foresee
        numbers["explained_variance"] = 1 - float(error.var(correction=0)) / variance if variance > 1e-8 else 0.0
    return numbers
