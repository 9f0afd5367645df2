"""What only a GPU can show."""

import copy

import pytest
import torch

from palm_rlhf_pytorch import PaLM, RLHFTrainer, shared_prompts
from palm_rlhf_pytorch.actor import response_log_probs
from palm_rlhf_pytorch.devices import accelerator_on
from palm_rlhf_pytorch.language_modelling import CorpusOptions, build_corpus, train_language_model
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.vocabulary import linear_cross_entropy, linear_log_probs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def make_palm(**kwargs) -> PaLM:
    torch.manual_seed(0)
    return PaLM(**{"num_tokens": 50, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, **kwargs})


WINDOW = {"heads": 4, "kv_heads": 2, "sliding_window": 16, "global_layers": [1], "qk_layernorm": True}


@pytest.mark.parametrize("keywords", [{}, {"kv_heads": 2}, WINDOW])
def test_the_same_logits_as_on_the_cpu(keywords):
    palm = make_palm(**keywords)
    ids, mask = torch.randint(0, 50, (3, 40)), torch.arange(40) >= torch.tensor([[0], [7], [30]])
    there = copy.deepcopy(palm).cuda()
    assert torch.allclose(there(ids.cuda()).cpu(), palm(ids), atol=1e-3)
    assert torch.allclose(there(ids.cuda(), mask=mask.cuda()).cpu()[mask], palm(ids, mask=mask)[mask], atol=1e-3)


@pytest.mark.parametrize("keywords", [{}, {"heads": 4, "kv_heads": 2}, WINDOW])
@pytest.mark.parametrize("lengths", [[40, 33, 37], [30, 30, 30], [0, 0, 0]])
def test_the_last_layer_at_wanted_places(keywords, lengths):
    palm, ids = make_palm(**keywords).cuda(), torch.randint(0, 50, (3, 40), device="cuda")
    at = torch.arange(40, device="cuda")
    wanted, found = (at >= 20) & (at < torch.tensor(lengths, device="cuda")[:, None]), []
    for embeds in (
        palm(ids, return_only_embedding=True, places=wanted),
        palm(ids, return_only_embedding=True)[wanted],
    ):
        found.append((embeds, *torch.autograd.grad(embeds.sin().sum(), palm.palm_parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("decoder", ["plain", "compiled"])
def test_windows_and_adapters_beside_bf16_generate(decoder):
    """A cached step's log-probs are those of the whole sequence, within what bfloat16 rounds."""
    palm = make_palm(**WINDOW, finetune_scopes=["a"], lora_ff=True).cuda().bfloat16()
    for p in palm.finetune_parameters("a"):
        assert p.dtype == torch.float32
        torch.nn.init.normal_(p, std=0.1)
    ids, lengths = torch.randint(1, 50, (3, 20), device="cuda"), torch.tensor([20, 5, 12], device="cuda")
    keywords = dict(filter_logits_fn=None, finetune_scope="a", return_log_probs=True, decoder=decoder, seed=0)
    out = palm.generate(48, ids, prompt_lengths=lengths, **keywords)
    whole = response_log_probs(palm, out.sequence, out.response_mask, scope="a").log_probs
    assert (whole - out.log_probs).abs().max() < 0.1


@pytest.mark.parametrize("keywords", [{}, {"heads": 4, "kv_heads": 2}, WINDOW])
@pytest.mark.parametrize("uniform", [True, False])
def test_shared_prompts_in_bf16(keywords, uniform, monkeypatch):
    """Learned from together they are what they are apart, and gradients as well, within what bfloat16 rounds."""
    palm = make_palm(**keywords).cuda()
    lengths = torch.full((8,), 20) if uniform else torch.tensor([20, 12]).repeat_interleave(4)
    sequence = torch.randint(1, 50, (2, 32)).repeat_interleave(4, dim=0)
    sequence[:, 20:] = torch.randint(1, 50, (8, 12))
    mask = torch.arange(32) >= lengths[:, None]
    sequence, mask = sequence.cuda(), mask.cuda()
    assert shared_prompts.shared_prompts(sequence, mask).uniform is uniform
    found = []
    for pays in (True, False):
        monkeypatch.setattr(shared_prompts.SharedPrompts, "pays", lambda *_, pays=pays: pays)
        with torch.autocast("cuda", torch.bfloat16):
            log_probs = response_log_probs(palm, sequence, mask).log_probs
        (gradient,) = torch.autograd.grad(log_probs.mean(), palm.token_emb.weight)
        found.append((log_probs.detach(), gradient))
    (shared, its), (whole, theirs) = found
    assert (shared - whole).abs().max() < 0.1
    assert (its - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("rows", [40, 3000])
def test_log_probs_of_half_precision_are_those_of_float32(rows):
    """The products' sums are handed out in float32, whole and in chunks, and so are their gradients' sources."""
    weight = torch.randn(5000, 64, device="cuda").mul(2).bfloat16()
    embeds, targets = torch.randn(rows, 64, device="cuda").bfloat16(), torch.randint(0, 5000, (rows,), device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        e = embeds.to(dtype).requires_grad_()
        log_probs, entropy = linear_log_probs(e, weight.to(dtype), targets, 0.3)
        loss = linear_cross_entropy(e, weight.to(dtype), targets, 0.3)
        found.append((log_probs, entropy, loss, torch.autograd.grad(loss + log_probs.mean() + entropy.mean(), e)[0]))
    for ours, exact in zip(*(numbers[:3] for numbers in found), strict=True):
        torch.testing.assert_close(ours, exact, atol=2e-3, rtol=1e-4)
    ours, exact = (numbers[3].float() for numbers in found)
    assert (ours - exact).norm() < 0.02 * exact.norm()


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
