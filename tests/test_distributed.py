"""Two processes with half of an experience each take the step that one takes with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import EOS, PROMPTS, ROLL, count_even, shake, tiny_palm
from torch.optim import SGD

from palm_rlhf_pytorch.algorithms import algorithm_class
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.keyword_trainer import KeywordTrainer

NAMES = ("ppo", "grpo", "reinforce_pp_baseline", "tpo")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")


def trainer_of(name):
    """Starts the same in every process."""
    torch.manual_seed(0)
    palm = tiny_palm()
    options = {} if name == "ppo" else {"samples_per_prompt": 2}
    algorithm = algorithm_class(name).for_policy(palm, own_optim={"lr": 1.0}, **options)
    trainer = KeywordTrainer(
        algorithm, palm=palm, reward_model=count_even, prompt_token_ids=PROMPTS.repeat(2, 1), actor_lr=1.0,
        optimizer_class=SGD, minibatch_size=100, seed=0, accelerate_kwargs={"cpu": True},
    )  # fmt: skip
    shake(trainer.actor_critic.actor_parameters())
    return trainer


def weights_of(trainer):
    return [p.detach() for group in trainer.optimizer.param_groups for p in group["params"]]


def one_of_two(folder):
    """What each process does: learn from its half, then train, and write what became of the weights."""
    rank = int(os.environ["RANK"])
    for name in NAMES:
        trainer = trainer_of(name)
        assert trainer.accelerate.num_processes == 2
        half = Experience.of(torch.load(folder / f"{name}.pt"))[torch.arange(rank * 4, rank * 4 + 4)]
        trainer.learn(half)
        torch.save(weights_of(trainer), folder / f"{name}_{rank}.pt")
        trainer.train(8, 1, 8, 4, 9, EOS)
        torch.save((weights_of(trainer), trainer.history[-1]["reward"]), folder / f"{name}_{rank}_trained.pt")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """-> name -> the experience, and the folder in which two processes left their weights."""
    folder = tmp_path_factory.mktemp("two")
    experiences = {}
    for name in NAMES:
        trainer = trainer_of(name)
        e = experiences[name] = trainer.roll_out(8 // trainer.algorithm.samples_per_prompt, 8, ROLL)
        assert len(e.lengths.unique()) > 2 and e.lengths[:4].sum() != e.lengths[4:].sum()
        torch.save(e.tensors(), folder / f"{name}.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return experiences, folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_take_the_step_of_one(learned, name):
    experiences, folder = learned
    trainer = trainer_of(name)
    before = [w.clone() for w in weights_of(trainer)]
    trainer.learn(experiences[name])
    first, second = (torch.load(folder / f"{name}_{rank}.pt") for rank in range(2))
    moved = 0.0
    for old, one, a, b in zip(before, weights_of(trainer), first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, atol=1e-5, rtol=1e-4)
        moved += float((one - old).abs().sum())
    assert moved > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_stay_alike_and_log_the_same(learned, name):
    _, folder = learned
    (a, reward), (b, same) = (torch.load(folder / f"{name}_{rank}_trained.pt") for rank in range(2))
    assert all(map(torch.equal, a, b)) and reward == same


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
