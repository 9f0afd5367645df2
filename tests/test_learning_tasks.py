"""The learning benchmark's tasks, its control, its pairs, and the command at a tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import learning  # noqa: E402
import learning_tasks  # noqa: E402
import preferences  # noqa: E402


def test_what_is_right():
    task = learning_tasks.reversal(3)
    assert len(task.prompts) == 8 and task.prompts[:, 0].eq(2).all()  # the mark
    prompt = torch.tensor([2, 0, 1, 1])
    answers = [torch.tensor(a) for a in ([1, 1, 0], [1, 3, 2], [0, 1, 1], [1, 1, 3])]
    assert task.reward([prompt] * 4, answers).tolist() == [1.0, 1.0, 0.0, 0.0]
    modes = learning_tasks.modes()
    assert modes.reward([modes.prompts[0]] * 5, [*modes.modes, torch.tensor([1, 1, 1])]).tolist() == [1, 1, 1, 1, 0]


def test_own_options_take_the_place_of_the_task_s():
    task = learning_tasks.modes()
    trainer = learning_tasks.build(task, "ppo", 0, False, dict([learning.name_and_value("kl=0.2")]))
    assert trainer.algorithm.options.kl == 0.2 and learning.name_and_value("kl_in=loss") == ("kl_in", "loss")
    assert learning_tasks.build(task, "ppo", 0, False).algorithm.options.kl == 0.0


def test_the_control_gives_the_same_rewards_to_others():
    rewards = torch.arange(64.0)
    shuffled = learning_tasks.Shuffled(lambda prompts, responses: rewards, seed=0)
    first, second = shuffled([], []), shuffled([], [])
    assert first.sort().values.equal(rewards) and not first.equal(rewards) and not first.equal(second)


def test_true_reward_and_turned_labels():
    truth = preferences.TrueReward()
    by_hand = sum(truth.letters["abcdefgh".index(x)] for x in "abcdefgh")
    by_hand += sum(truth.neighbours[i, i + 1] for i in range(7))
    scores = truth(["abcdefgh", "abc", "abcdefghi"])
    torch.testing.assert_close(scores[0], (by_hand - truth.mean) / truth.std)
    assert scores[1] == scores[2] == (truth.least - truth.mean) / truth.std  # neither is eight letters long
    generator = torch.Generator().manual_seed(0)
    texts = preferences.any_texts(4000, generator)
    every = truth(texts)
    assert abs(float(every.mean())) < 0.05 and abs(float(every.std()) - 1) < 0.05
    clean, turned = (preferences.new_pairs(texts, truth, flips, generator) for flips in (0.0, 0.25))
    assert all(truth([pair.chosen]) >= truth([pair.rejected]) for pair in clean[:50])
    share = sum(a.chosen != b.chosen for a, b in zip(clean, turned, strict=True)) / len(clean)
    assert abs(share - 0.25) < 0.03


def test_best_of_n_by_hand():
    truth, texts = preferences.TrueReward(), preferences.any_texts(8, torch.Generator().manual_seed(1))
    point = preferences.best_of(4, texts, truth, lambda prompts, responses: truth(responses))
    scores = truth(texts).view(2, 4)
    assert point.true == point.proxy == float(scores.amax(dim=1).mean())
    assert abs(point.kl - 0.636294) < 1e-5  # log 4 - 3 / 4


def test_the_command_goes_on_where_it_was(tmp_path):
    out = tmp_path / "runs.jsonl"
    asked = ["forced", "--algorithms", "grpo", "tpo", "--seeds", "1", "--updates", "2", "--batch", "2", "--jobs", "1"]
    command = [sys.executable, str(BENCHMARKS / "learning.py"), *asked, "--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["algorithm"], row["shuffled"], len(row["rewards"])) for row in rows] == [
        ("grpo", False, 2),
        ("grpo", True, 2),
        ("tpo", False, 2),
        ("tpo", True, 2),
    ]
    assert first.count("| forced |") == 2
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == first
    assert len(out.read_text().splitlines()) == 4


def test_the_mean_and_each_seed():
    assert learning.mean_of([0.5, 0.25]) == "0.375 (0.250, 0.500)" and learning.mean_of([]) == ""
