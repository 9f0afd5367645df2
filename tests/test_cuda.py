"""What only a GPU can show."""

import copy

import pytest
import torch

from palm_rlhf_pytorch import PaLM, RLHFTrainer
from palm_rlhf_pytorch.devices import accelerator_on
from palm_rlhf_pytorch.language_modelling import CorpusOptions, build_corpus, train_language_model
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def make_palm(**kwargs) -> PaLM:
    torch.manual_seed(0)
    return PaLM(**{"num_tokens": 50, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, **kwargs})


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_same_logits_as_on_the_cpu(kv_heads):
    palm = make_palm(kv_heads=kv_heads)
    ids = torch.randint(0, 50, (3, 40))
    assert torch.allclose(copy.deepcopy(palm).cuda()(ids.cuda()).cpu(), palm(ids), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_greedy_generation_is_each_alone(dtype):
    palm = make_palm().cuda().to(dtype)
    ids, lengths = torch.randint(0, 50, (3, 9), device="cuda"), torch.tensor([9, 4, 1], device="cuda")
    together = palm.generate(24, ids, 0.0, prompt_lengths=lengths, return_log_probs=True)
    assert together.sequence.is_cuda and together.response_mask.sum(dim=-1).tolist() == [15, 20, 23]
    if dtype == torch.float32:
        for i, n in enumerate(lengths.tolist()):
            assert torch.equal(
                together.sequence[i], palm.generate(24, ids[i, :n], 0.0, return_seq_without_prompt=False)
            )


def test_an_update_runs_there():
    palm = make_palm()
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=lambda prompts, responses: [float((r == 5).float().mean()) for r in responses],
        prompt_token_ids=torch.randint(1, 50, (8, 4)),
        critic_num_pred_bins=1,
        minibatch_size=4,
    )
    trainer.train(num_episodes=1, max_timesteps=8, update_timesteps=8, max_seq_len=12)
    assert trainer.palm.device.type == "cuda" and trainer.history[0]["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_are_each_alone(dtype):
    palm = make_palm().cuda()
    ids = torch.randint(0, 50, (2, 43), device="cuda")
    segment_ids = (torch.arange(43, device="cuda") // 15).expand(2, -1)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        packed = palm(ids, segment_ids=segment_ids)
        alone = torch.cat([palm(part) for part in ids.split(15, dim=-1)], dim=1)
    assert torch.allclose(packed, alone, atol=1e-3 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("compile", [False, True])
def test_pretraining_in_bf16(compile, said):
    tokenizer = ByteTokenizer()
    palm = make_palm(num_tokens=tokenizer.num_tokens)
    corpus = build_corpus(["abcabcabc"] * 50, ["abcabcabc"], tokenizer, CorpusOptions(seq_len=64, batch_size=8))
    options = FitOptions(steps=60, lr=1e-2, warmup=5, eval_every=30, log_every=10)
    accelerator = accelerator_on(torch.device("cuda"), "auto")
    history = train_language_model(palm, corpus, options, 8, accelerator=accelerator, compile=compile)
    assert accelerator.mixed_precision == "bf16" and history[-1]["held_out_loss"] < 1.0
    assert all(p.is_cuda and p.dtype == torch.float32 for p in palm.parameters())
    assert any("compiled the training step" in line for line in said()) is compile
