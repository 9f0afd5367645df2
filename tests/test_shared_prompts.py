import pytest
import torch
from tiny import shake

from palm_rlhf_pytorch import PaLM, shared_prompts
from palm_rlhf_pytorch.actor import response_log_probs
from palm_rlhf_pytorch.ops import lengths_to_mask

PROMPTS = torch.tensor([[3, 4, 5, 0], [3, 4, 0, 0], [6, 7, 8, 9], [5, 0, 0, 0]])
OF = [0, 2, 1, 0, 0, 2, 1, 3]  # rows of one prompt need not be neighbours
LENGTHS = torch.tensor([3, 4, 2, 3, 3, 4, 2, 1])
RESPONSES = torch.tensor([2, 5, 6, 1, 4, 2, 0, 3])  # the longest is not in the longest row


@pytest.fixture(autouse=True)
def share_whatever_is_saved(monkeypatch):
    monkeypatch.setitem(shared_prompts.LEAST_SAVED, "cpu", 0.0)


def batch(uniform: bool = False, seed: int = 0):
    """sequence and response_mask (8, n)."""
    generator = torch.Generator().manual_seed(seed)
    lengths, responses = (torch.full_like(LENGTHS, 4), RESPONSES.clamp(min=1)) if uniform else (LENGTHS, RESPONSES)
    n = int((lengths + responses).max())
    sequence = torch.randint(1, 12, (8, n), generator=generator)
    heads = PROMPTS[OF] + 1 if uniform else PROMPTS[OF]
    prompt_mask, real = lengths_to_mask(lengths, n), lengths_to_mask(lengths + responses, n)
    sequence[:, :4] = torch.where(prompt_mask[:, :4], heads, sequence[:, :4])
    return sequence.masked_fill(~real, 0), real & ~prompt_mask


def tiny(**keywords) -> PaLM:
    torch.manual_seed(0)
    return PaLM(**{"num_tokens": 12, "dim": 16, "depth": 3, "heads": 4, "dim_head": 8, **keywords})


def both_ways(palm, sequence, response_mask, monkeypatch, **keywords):
    """log-probs and the weights' gradients, shared and whole."""
    found = []
    for least in (0.0, 2.0):
        monkeypatch.setitem(shared_prompts.LEAST_SAVED, "cpu", least)
        palm.zero_grad()
        out = response_log_probs(palm, sequence, response_mask, **keywords)
        weights = torch.linspace(-1, 1, out.log_probs.numel()).view_as(out.log_probs)
        (out.log_probs * weights + 0.3 * out.entropy * weights).sum().backward()
        found.append((out, {name: p.grad.clone() for name, p in palm.named_parameters() if p.grad is not None}))
    monkeypatch.setitem(shared_prompts.LEAST_SAVED, "cpu", 0.0)
    return found


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"kv_heads": 2, "use_xpos": False},
        {"sliding_window": 3, "global_layers": [1]},
        {"qk_layernorm": True},
        {"gradient_checkpointing": True},
    ],
)
def test_shared_and_whole_agree(keywords, uniform, monkeypatch):
    palm = tiny(**keywords).train()
    sequence, mask = batch(uniform)
    assert shared_prompts.shared_prompts(sequence, mask).uniform is uniform
    (shared, its), (whole, theirs) = both_ways(palm, sequence, mask, monkeypatch, temperature=0.7)
    torch.testing.assert_close(shared.log_probs, whole.log_probs)
    torch.testing.assert_close(shared.entropy, whole.entropy)
    assert torch.equal(shared.predictions.targets, whole.predictions.targets)
    assert its.keys() == theirs.keys()
    for name in its:
        torch.testing.assert_close(its[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_with_adapters_and_in_half_precision(monkeypatch):
    palm = tiny(finetune_scopes=["actor"])
    shake(palm.finetune_parameters("actor"))
    palm.requires_grad_(False)
    for p in palm.finetune_parameters("actor"):
        p.requires_grad_(True)
    (shared, its), (whole, theirs) = both_ways(palm, *batch(), monkeypatch, scope="actor")
    torch.testing.assert_close(shared.log_probs, whole.log_probs)
    assert len(its) == len(palm.finetune_parameters("actor"))
    for name in its:
        torch.testing.assert_close(its[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        (shared, _), (whole, _) = both_ways(palm, *batch(), monkeypatch, scope="actor")
    torch.testing.assert_close(shared.log_probs, whole.log_probs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("uniform", [False, True])
def test_prompts_are_read_once(uniform):
    palm, read = tiny(), []
    palm.token_emb.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    response_log_probs(palm, *batch(uniform))
    assert read == [(4, 3), (8, 6)]  # four prompts but for their last token, six tokens of response


def test_where_there_is_nothing_to_share():
    sequence, mask = batch()
    shared_prompts.LEAST_SAVED["cpu"] = 0.1
    assert shared_prompts.shared_prompts(sequence, mask) is None  # 12 + 8 x 6 places instead of 8 x 8
    shared_prompts.LEAST_SAVED["cpu"] = 0.0
    alone = sequence[[0, 1, 2, 7]], mask[[0, 1, 2, 7]]
    assert shared_prompts.shared_prompts(*alone) is None
    one_token = torch.tensor([[1, 2, 3], [1, 3, 2]]), torch.tensor([[False, True, True]]).expand(2, 3)
    assert shared_prompts.shared_prompts(*one_token) is None
    assert shared_prompts.shared_prompts(sequence, torch.zeros_like(mask)) is None
    assert shared_prompts.shared_prompts(sequence[:, :1], mask[:, :1]) is None


def test_not_with_dropout():
    palm = tiny(attn_dropout=0.1)
    assert not shared_prompts.may_share(palm.train()) and shared_prompts.may_share(palm.eval())
    assert not shared_prompts.may_share(tiny(causal=False))


def test_rows_do_not_see_each_other(monkeypatch):
    palm = tiny()
    sequence, mask = batch()
    before = response_log_probs(palm, sequence, mask).log_probs
    changed = sequence.clone()
    changed[0, 3:5] = 11  # a response
    after = response_log_probs(palm, changed, mask).log_probs
    assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])
