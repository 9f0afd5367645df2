import gc

import pytest
import torch
from tiny import shake

from palm_rlhf_pytorch import PaLM, shared_prompts
from palm_rlhf_pytorch.actor import response_log_probs
from palm_rlhf_pytorch.ops import lengths_to_mask

PROMPTS = torch.tensor([[3, 4, 5, 0], [3, 4, 0, 0], [6, 7, 8, 9], [5, 0, 0, 0]])
OF = [0, 2, 1, 1, 0, 2, 1, 3]  # rows of one prompt need not be neighbours
LENGTHS = torch.tensor([3, 4, 2, 2, 3, 4, 2, 1])
RESPONSES = torch.tensor([2, 5, 6, 1, 4, 2, 0, 3])  # the longest is not in the longest row


@pytest.fixture(autouse=True)
def shared_wherever_possible(monkeypatch):
    monkeypatch.setattr(shared_prompts.SharedPrompts, "pays", lambda *_: True)


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
    for pays in (True, False):
        monkeypatch.setattr(shared_prompts.SharedPrompts, "pays", lambda *_, pays=pays: pays)
        palm.zero_grad()
        out = response_log_probs(palm, sequence, response_mask, **keywords)
        weights = torch.linspace(-1, 1, out.log_probs.numel()).view_as(out.log_probs)
        (out.log_probs * weights + 0.3 * out.entropy * weights).sum().backward()
        found.append((out, {name: p.grad.clone() for name, p in palm.named_parameters() if p.grad is not None}))
    return found


def assert_close(shared, whole, its, theirs, **tolerance):
    torch.testing.assert_close(shared.log_probs, whole.log_probs, **tolerance)
    torch.testing.assert_close(shared.entropy, whole.entropy, **tolerance)
    assert torch.equal(shared.predictions.targets, whole.predictions.targets)
    assert its.keys() == theirs.keys()
    for name in its:
        torch.testing.assert_close(its[name], theirs[name], msg=name, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


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
    assert_close(shared, whole, its, theirs)


@pytest.mark.parametrize("ff", [False, True])
def test_with_adapters(ff, monkeypatch):
    palm = tiny(finetune_scopes=["actor"], lora_ff=ff)
    shake(palm.finetune_parameters("actor"))
    palm.requires_grad_(False)
    for p in palm.finetune_parameters("actor"):
        p.requires_grad_(True)
    (shared, its), (whole, theirs) = both_ways(palm, *batch(), monkeypatch, scope="actor")
    assert len(its) == len(palm.finetune_parameters("actor"))
    assert_close(shared, whole, its, theirs)


@pytest.mark.parametrize("uniform", [False, True])
def test_in_other_precisions(uniform, monkeypatch):
    (shared, its), (whole, theirs) = both_ways(tiny().double(), *batch(uniform), monkeypatch)
    assert_close(shared, whole, its, theirs, rtol=1e-9, atol=1e-9)
    with torch.autocast("cpu", torch.bfloat16):
        (shared, its), (whole, theirs) = both_ways(tiny(), *batch(uniform), monkeypatch)
    assert_close(shared, whole, its, theirs, rtol=0.05, atol=0.05)
    (shared, _), (whole, _) = both_ways(tiny().bfloat16(), *batch(uniform), monkeypatch)
    torch.testing.assert_close(shared.log_probs, whole.log_probs, rtol=0.05, atol=0.05)


def test_responses_in_several_spans(monkeypatch):
    """As where several turns of one conversation are learned from."""
    sequence, mask = batch()
    mask[1, 5:7] = mask[4, 4] = False
    mask[2, 3:7] = False
    (shared, its), (whole, theirs) = both_ways(tiny(), sequence, mask, monkeypatch)
    assert_close(shared, whole, its, theirs)


@pytest.mark.parametrize("uniform", [False, True])
def test_prompts_are_read_once(uniform):
    palm, read = tiny(), []
    palm.token_emb.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    response_log_probs(palm, *batch(uniform))
    # prompts but for their last token, six tokens of response; what has no response goes with the longest
    assert read == [(4 if uniform else 5, 3), (8, 6)]


def test_where_there_is_nothing_to_share():
    sequence, mask = batch()
    assert shared_prompts.shared_prompts(sequence, mask) is not None
    alone = sequence[[0, 1, 2, 7]], mask[[0, 1, 2, 7]]
    assert shared_prompts.shared_prompts(*alone) is None
    one_token = torch.tensor([[1, 2, 3], [1, 3, 2]]), torch.tensor([[False, True, True]]).expand(2, 3)
    assert shared_prompts.shared_prompts(*one_token) is None
    assert shared_prompts.shared_prompts(sequence, torch.zeros_like(mask)) is None
    for empty in (sequence[:, :0], mask[:, :0]), (sequence[:0], mask[:0]):
        assert shared_prompts.shared_prompts(*empty) is None


def same_prompts(b: int, p: int, r: int, ragged: bool = False):
    sequence = torch.randint(1, 12, (b, p + r))
    sequence[:, :p] = sequence[0, :p]
    lengths = p - torch.arange(b)[:, None] // (b // 2) * ragged
    return sequence, torch.arange(p + r) >= lengths


@pytest.mark.parametrize(
    "shape, dim, pays",
    [
        ((16, 17, 64), 256, True),  # 81 positions a row become 65
        ((16, 4, 64), 256, False),  # too little is saved
        ((8, 6, 20), 32, False),  # too small for two passes
        ((8, 250, 1750), 256, False),  # under a mask attention costs more than is saved
        ((8, 1200, 800), 256, True),
        ((8, 1200, 800, True), 256, False),  # as many masks as rows: larger than all else
    ],
)
def test_where_it_pays(shape, dim, pays, monkeypatch):
    monkeypatch.undo()
    keywords = {"num_tokens": 12, "dim": dim, "heads": max(1, dim // 64), "dim_head": min(dim, 64)}
    sequence, mask = same_prompts(*shape)
    for depth, so in ((4, pays), (1, False)):  # the last layer is computed behind the prompts alone either way
        assert shared_prompts.shared_prompts(sequence, mask).pays(PaLM(depth=depth, **keywords), sequence) is so


def test_not_with_dropout():
    palm = tiny(attn_dropout=0.1)
    assert not shared_prompts.may_share(palm.train()) and shared_prompts.may_share(palm.eval())
    assert not shared_prompts.may_share(tiny(causal=False))


def test_not_while_compiling():
    """Which rows have the same prompt is not known to a compiler."""
    whole = torch.compile(
        lambda palm, *batch: response_log_probs(palm, *batch).log_probs, backend="eager", fullgraph=False
    )
    palm, read = tiny(), []
    palm.token_emb.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    sequence, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(whole(palm, sequence, mask), response_log_probs(palm, sequence, mask).log_probs)
    assert read[0] == (8, 8) and read[-2:] == [(5, 3), (8, 6)]


def test_rows_do_not_see_each_other(monkeypatch):
    palm = tiny()
    sequence, mask = batch()
    before = response_log_probs(palm, sequence, mask).log_probs
    changed = sequence.clone()
    changed[0, 3:5] = 11  # a response
    after = response_log_probs(palm, changed, mask).log_probs
    assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])


def test_prompts_keep_their_keys_and_values_alone():
    palm = tiny(depth=4)
    sequence, mask = same_prompts(2, 50, 3)
    shared, kept = shared_prompts.shared_prompts(sequence, mask), []
    hand_over = shared_prompts.PromptPass.hand_over
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prompts.PromptPass, "hand_over", lambda self: kept.extend(hand_over(self)) or kept)
        shared.embeds(palm)
    sizes = [t.untyped_storage().nbytes() for pair in kept for t in pair]
    assert sizes == [49 * palm.dim_head * 4] * 8

    assert first_pass(shared).kept is None


def first_pass(shared):
    """One that has handed over, and then computes a layer again."""
    made = shared_prompts.PromptPass(shared)
    made.hand_over()
    made.extend(0, torch.zeros(1), torch.zeros(1), None, True)
    return made


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_never_gone_back_through_is_freed(recompute):
    palm = tiny(gradient_checkpointing=recompute)
    for _ in range(3):
        out = response_log_probs(palm, *batch())
        torch.autograd.grad(out.log_probs.sum(), palm.norm.gamma)  # not to the bottom
        del out
    gc.collect()
    kinds = (shared_prompts.PromptPass, shared_prompts.ResponsePass)
    assert not [thing for thing in gc.get_objects() if type(thing) in kinds]


@pytest.mark.parametrize("rows, width", [(128, 6), (127, 5)])
def test_the_last_token_stays_where_rows_come_out_even_with_it(monkeypatch, rows, width):
    monkeypatch.setattr(shared_prompts, "may_share", lambda palm: False)
    palm, seen = PaLM(num_tokens=9, dim=16, depth=2, dim_head=8, heads=2), []
    palm.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    sequence, mask = torch.arange(rows * 6).view(rows, 6) % 9, torch.arange(6).expand(rows, 6) > 2
    sequence[:, 0] = torch.arange(rows) % 9
    found = shared_prompts.predicting_embeds(palm, sequence, mask)
    expected = palm(sequence, return_only_embedding=True)[:, 2:5].flatten(0, 1)
    assert seen[0] == width
    torch.testing.assert_close(found, expected)
