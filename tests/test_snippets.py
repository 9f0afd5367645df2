"""The three snippets that everybody copies from the reference's README, as they stand but for sizes."""

import pytest
import torch

from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer


def test_pretraining_and_generation():
    palm = PaLM(num_tokens=200, dim=32, depth=2, flash_attn=True)
    seq = torch.randint(0, 200, (1, 64))
    loss = palm(seq, return_loss=True)
    loss.backward()
    assert loss.ndim == 0 and all(p.grad is not None for p in palm.parameters())
    generated = palm.generate(64)
    assert generated.shape == (1, 64)


def test_reward_model():
    seq = torch.randint(0, 200, (1, 64))
    prompt_mask = torch.zeros(1, 64).bool()
    prompt_mask[:, :20] = True
    labels = torch.randint(0, 5, (1,))

    palm = PaLM(num_tokens=200, dim=32, depth=2, causal=False)
    reward_model = RewardModel(palm, num_binned_output=5)
    loss = reward_model(seq, prompt_mask=prompt_mask, labels=labels)
    loss.backward()
    reward = reward_model(seq, prompt_mask=prompt_mask)
    assert reward.shape == (1,) and 0 <= int(reward) < 5


def test_rlhf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = dict(num_tokens=200, dim=32, depth=2)
    torch.save(PaLM(**sizes).state_dict(), "./palm.pt")
    torch.save(RewardModel(PaLM(**sizes), num_binned_output=5).state_dict(), "./reward_model.pt")

    palm = PaLM(**sizes)
    palm.load("./palm.pt")
    reward_model = RewardModel(palm, num_binned_output=5)
    reward_model.load("./reward_model.pt")
    prompts = torch.randint(0, 200, (50, 12))
    trainer = RLHFTrainer(palm=palm, reward_model=reward_model, prompt_token_ids=prompts)
    trainer.train(num_episodes=1, max_timesteps=4, update_timesteps=2, max_seq_len=24)
    answer = trainer.generate(24, prompt=prompts[0], num_samples=10)
    assert answer.ndim == 1 and len(answer) <= 24
    assert torch.equal(answer[:12], prompts[0])


def test_all_three_in_one_namespace(tmp_path, monkeypatch):
    """As in a notebook: the third snippet then meets the second one's encoder, which is made causal."""
    monkeypatch.chdir(tmp_path)
    palm = PaLM(num_tokens=200, dim=32, depth=1)
    torch.save(palm.state_dict(), "./palm.pt")
    palm = PaLM(num_tokens=200, dim=32, depth=1, causal=False)
    reward_model = RewardModel(palm, num_binned_output=5)
    torch.save(reward_model.state_dict(), "./reward_model.pt")
    prompts = torch.randint(0, 200, (20, 8))

    palm.load("./palm.pt")
    reward_model.load("./reward_model.pt")
    with pytest.warns(UserWarning, match="made causal"):
        trainer = RLHFTrainer(palm=palm, reward_model=reward_model, prompt_token_ids=prompts)
    trainer.train(num_episodes=1, max_timesteps=2, update_timesteps=2, max_seq_len=12)
    assert len(trainer.generate(12, prompt=prompts[0], num_samples=2)) <= 12
