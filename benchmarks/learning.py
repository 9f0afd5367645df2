"""Does it learn? Small tasks with a known answer, for every algorithm, over seeds, beside shuffled rewards.

    python benchmarks/learning.py forced reversal modes --algorithms grpo tpo ppo flowrl --seeds 4

forced: one prompt, one rewarded next token. reversal: tokens of two kinds are to be reversed, and only the whole answer
is rewarded (TPO, 2604.06159, section 3.6: 2 layers, width 64, 8 samples of 100 prompts, 4 epochs). modes: four answers
are equally right; how many are left at the end? The control pays the same rewards to other answers. Prints a table with
the mean over seeds and each of them, and with --plot the curves.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.actor import Actor
from palm_rlhf_pytorch.actor_critic import ActorCritic
from palm_rlhf_pytorch.algorithms import ALGORITHMS, algorithm_class
from palm_rlhf_pytorch.prompts import Prompts
from palm_rlhf_pytorch.trainer import LearnOptions, OnPolicyTrainer

Reward = Callable[[list[Tensor], list[Tensor]], Tensor]


@dataclass(frozen=True)
class Task:
    """tokens: the vocabulary, of which 0 is padding; prompts (p, n); answers of `length` tokens; what is right."""

    name: str
    tokens: int
    prompts: Tensor
    length: int
    right: Callable[[Tensor, Tensor], bool]
    updates: int
    batch: int = 100  # prompts an update
    dim: int = 64
    depth: int = 2
    measure: str = "right"  # a share of sampled answers, or for modes how evenly they are covered

    def reward(self, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
        return torch.tensor([float(self.right(p, r)) for p, r in zip(prompts, responses, strict=True)])


def reversal(length: int, updates: int) -> Task:
    """All prompts of `length` tokens out of two, after one that marks the start: a rotary model knows no other place."""
    prompts = torch.tensor([(3, *tokens) for tokens in product((1, 2), repeat=length)])
    return Task(f"reversal {length}", 4, prompts, length, lambda p, r: torch.equal(r, p[1:].flip(0)), updates)


def forced(updates: int) -> Task:
    return Task("forced", 16, torch.tensor([[1]]), 1, lambda p, r: int(r[0]) == 7, updates, batch=8, dim=32, depth=1)


MODES = torch.tensor([[1, 1, 2], [2, 3, 1], [3, 2, 2], [4, 4, 4]])


def modes(updates: int) -> Task:
    right = lambda p, r: bool((MODES == r).all(dim=-1).any())  # noqa: E731
    return Task("modes", 5, torch.tensor([[1]]), 3, right, updates, batch=16, dim=32, depth=1, measure="modes")


def shuffled(reward: Reward, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
    """The same rewards, to other answers."""
    scores = reward(prompts, responses)
    return scores[torch.randperm(len(scores))]


# what differs from the defaults, so that each is at its best here; no KL where the start is not worth keeping
SETTINGS = {
    "ppo": {"kl": 0.0},
    "grpo": {"kl": 0.0},
    "rloo": {"kl": 0.0},
    "reinforce_pp": {"kl": 0.0},
    "reinforce_pp_baseline": {"kl": 0.0},
    "gspo": {"eps_clip": 0.2, "eps_clip_high": 0.27},
    "flowrl": {"z_hidden": 64, "eps_clip": 0.2},
}


def build(task: Task, name: str, seed: int, control: bool, lr: float, epochs: int) -> OnPolicyTrainer:
    torch.manual_seed(seed)
    palm = PaLM(num_tokens=task.tokens, dim=task.dim, depth=task.depth, heads=2, dim_head=32, flash_attn=True)
    options = {"actor_optim": {"lr": lr}, "own_optim": {"lr": lr}, **SETTINGS.get(name, {})}
    cls = algorithm_class(name)
    if name == "flowrl":  # the mean over tokens in its loss sharpens the target by the length
        options["beta"] = 3.0 / task.length
        algorithm = cls(palm.dim, **options)
    else:
        algorithm = cls(**options)
    make = partial(ActorCritic, critic_lora=False, critic_dim_out=1) if name == "ppo" else Actor
    samples = algorithm.samples_per_prompt
    reward = partial(shuffled, task.reward) if control else task.reward
    return OnPolicyTrainer(
        make(palm, actor_lora=False),
        algorithm,
        reward,
        Prompts(task.prompts),
        learn_options=LearnOptions(task.batch * (8 if samples == 1 else samples), epochs=epochs, max_norm=1.0),
        seed=seed,
        accelerate_kwargs={"cpu": True},
    )


@torch.no_grad()
def measured(task: Task, trainer: OnPolicyTrainer, count: int = 512) -> float:
    """Of freshly sampled answers: the share that is right; of modes, e^entropy of the right ones (4 at best, 1 when
    one is left, 0 when none is right).
    """
    rows = torch.randint(len(task.prompts), (count,))
    prompts = task.prompts[rows]
    total = prompts.shape[1] + task.length
    answers = trainer.palm.generate(
        total, prompts, filter_logits_fn=None, finetune_scope=trainer.actor_critic.actor_lora_scope
    )
    if task.measure == "right":
        return float(task.reward(list(prompts), list(answers)).mean())
    counts = (answers[:, None] == MODES).all(dim=-1).sum(dim=0).double()
    if counts.sum() == 0:
        return 0.0
    share = counts / counts.sum()
    return float(torch.special.entr(share).sum().exp())


def learn(task: Task, name: str, seed: int, control: bool, lr: float, epochs: int) -> tuple[float, float, list[float]]:
    """-> the measure before and after, and the reward of each update."""
    trainer = build(task, name, seed, control, lr, epochs)
    before = measured(task, trainer)
    many = 8 if trainer.algorithm.samples_per_prompt == 1 else 1  # as many answers for all
    trainer.train(
        task.updates, task.batch * many, task.batch * many, task.batch * many, task.prompts.shape[1] + task.length
    )
    return before, measured(task, trainer), [row["reward"] for row in trainer.history]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=("forced", "reversal", "modes"))
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--length", type=int, default=7, help="tokens to reverse")
    parser.add_argument("--updates", type=int, help="instead of each task's own number")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--no-control", action="store_true", help="without shuffled rewards")
    parser.add_argument("--plot", type=Path, help="where to draw the curves of rewards (.png)")
    options = parser.parse_args()
    make = {
        "forced": lambda: forced(options.updates or 60),
        "reversal": lambda: reversal(options.length, options.updates or 1000),
        "modes": lambda: modes(options.updates or 200),
    }
    curves: dict[str, list[list[float]]] = {}
    print("| task | algorithm | before | after: mean (of seeds) | shuffled rewards |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name in options.tasks:
        task = make[name]()
        for algorithm in options.algorithms:
            results = {}
            for control in (False,) if options.no_control else (False, True):
                runs = [
                    learn(task, algorithm, seed, control, options.lr, options.epochs)
                    for seed in tqdm(range(options.seeds), desc=f"{task.name} {algorithm}", disable=None)
                ]
                results[control] = runs
                curves[f"{task.name} {algorithm}{' shuffled' * control}"] = [run[2] for run in runs]
            after = [run[1] for run in results[False]]
            before = statistics.mean(run[0] for run in results[False])
            spread = ", ".join(f"{value:.3f}" for value in sorted(after))
            control = f"{statistics.mean(run[1] for run in results[True]):.3f}" if True in results else ""
            print(
                f"| {task.name} | {algorithm} | {before:.3f} | {statistics.mean(after):.3f} ({spread}) | {control} |",
                flush=True,
            )
    if options.plot:
        draw(curves, options.plot)


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Mean reward over seeds, a line for each task and algorithm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for name, runs in curves.items():
        mean = torch.tensor(runs).mean(dim=0)
        axis.plot(mean, label=name, linestyle=":" if "shuffled" in name else "-", linewidth=1)
    axis.set_xlabel("update")
    axis.set_ylabel("mean reward")
    axis.legend(fontsize=6, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
