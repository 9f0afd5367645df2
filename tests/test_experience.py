from dataclasses import fields, replace

import pytest
import torch
from tiny import TOKENS, made_up, rolled, tiny_actor_critic, tiny_ppo

from palm_rlhf_pytorch import ops
from palm_rlhf_pytorch.experience import Experience


def full():
    return tiny_ppo().target(made_up(responses=(3, 1, 4), prompts=(2, 4, 1)))


def test_no_field_has_a_vocabulary_axis():
    actor_critic = tiny_actor_critic()
    e = tiny_ppo().judge(actor_critic, rolled(actor_critic))
    e = tiny_ppo().target(e)
    b, n = e.sequence.shape
    assert n != TOKENS
    for name, t in e.tensors().items():
        assert t.shape in ((b, n), (b,)), name
    later = {"raw_scores", "token_rewards", "loss_shares", "extra"}
    assert set(e.tensors()) == {field.name for field in fields(Experience)} - later
    # 8 B of ids, 2 masks of 1 B, 5 float32 a token; score 4 B, finished 1 B, group 8 B a sequence
    assert e.nbytes == b * n * (8 + 2 + 5 * 4) + b * (4 + 1 + 8)


def test_floats_are_zero_outside_the_response():
    actor_critic = tiny_actor_critic()
    e = tiny_ppo().target(tiny_ppo().judge(actor_critic, rolled(actor_critic)))
    for name in ("log_probs", "ref_log_probs", "values", "advantages"):
        t = getattr(e, name)
        assert t.dtype == torch.float32 and (t[~e.response_mask] == 0).all() and (t[e.response_mask] != 0).all(), name


def test_rows_are_cut_to_their_longest():
    e = full()  # five tokens in each row
    e = replace(e, response_mask=e.response_mask & (torch.tensor([[3], [5], [4]]) > torch.arange(5)))
    part = e[torch.tensor([2, 0])]
    assert part.sequence.shape == (2, 4) and part.scores.tolist() == e.scores[[2, 0]].tolist()
    for name, t in part.tensors().items():
        whole = getattr(e, name)[[2, 0]]
        assert torch.equal(t, whole[:, :4] if t.ndim == 2 else whole), name
    assert e[:1].sequence.shape == (1, 3) and e[slice(1, 3)].sequence.shape == (2, 5)


def test_cat_pads_and_keeps_rows():
    e = full()
    e = replace(e, response_mask=e.response_mask & (torch.tensor([[3], [5], [4]]) > torch.arange(5)))
    parts = [e[:1], e[1:3]]
    whole = Experience.cat(parts)
    assert len(whole) == 3 and whole.sequence.shape == (3, 5)
    for name in set(e.tensors()) - {"sequence"}:
        t = getattr(whole, name)
        expected = getattr(e, name)
        real = (e.prompt_mask | e.response_mask) if t.ndim == 2 else torch.ones(3, dtype=torch.bool)
        assert torch.equal(t[real], expected[real]), name
    assert not (whole.prompt_mask | whole.response_mask)[0, 3:].any()
    assert Experience.cat([replace(e, values=None)]).values is None


def test_cat_keeps_groups_of_different_parts_apart():
    one = replace(made_up(), group_ids=torch.tensor([0, 0, 1]))
    two = replace(made_up(), group_ids=torch.tensor([5, 4, 4]))
    assert Experience.cat([one, two, one]).group_ids.tolist() == [0, 0, 1, 3, 2, 2, 4, 4, 5]
    assert one.group_ids.tolist() == [0, 0, 1]


def test_lengths_and_kl():
    e = made_up()
    assert e.lengths.tolist() == [3, 1, 4]
    by_hand = [(e.log_probs[i] - e.ref_log_probs[i])[e.response_mask[i]].sum() for i in range(3)]
    torch.testing.assert_close(e.kl, torch.stack(by_hand))


def test_to_moves_every_tensor():
    moved = full().to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}


def test_the_references_readme_fits():
    """dim 512, 20,000 tokens, 5,000 rollouts of 2,048: the reference keeps 819 GB of distributions, we under 400 MB."""
    b, n = 5000, 2048
    a_token = sum(t.element_size() for t in full().tensors().values() if t.ndim == 2)
    assert a_token * b * n < 400e6 < b * n * 20000 * 4


RESPONSES, PROMPTS = (3, 20, 1, 4, 19, 2, 1, 30), (2, 10, 1, 2, 9, 3, 2, 1)


@pytest.mark.parametrize("max_tokens", [None, 1, 40])
@pytest.mark.parametrize("least", [1, 10**6])
def test_by_length_is_the_whole_at_once_in_the_same_order(monkeypatch, least, max_tokens):
    monkeypatch.setitem(ops.LEAST_TOKENS, "cpu", least)
    e = made_up(RESPONSES, PROMPTS)
    e = replace(e, values=None)
    sizes = []

    def compute(part):
        """Something that needs the whole row, the row's number, and every position."""
        sizes.append(part.sequence.shape)
        assert part.mask.sum(-1).max() == part.sequence.shape[1]
        values = part.log_probs.cumsum(-1) * part.response_mask + part.group_ids[:, None] * part.response_mask
        return replace(part, values=values, scores=part.scores * 2)

    sorted_out = e.by_length(compute, max_tokens)
    groups, sizes = list(sizes), []
    whole = compute(e)
    assert set(sorted_out.tensors()) == set(whole.tensors())
    for name, t in whole.tensors().items():
        torch.testing.assert_close(getattr(sorted_out, name), t, msg=name)
    assert sum(rows for rows, _ in groups) == len(e)
    if max_tokens is not None:
        assert all(rows * n <= max_tokens or rows == 1 for rows, n in groups)
    if least == 1:
        assert sum(rows * n for rows, n in groups) <= 1.12 * e.mask.sum() < 0.6 * e.sequence.numel()
    elif max_tokens is None:
        assert groups == [(8, 31)]


def test_by_length_keeps_columns_behind_the_longest_row():
    e = made_up()
    wide = replace(e, **{name: torch.nn.functional.pad(t, (0, 3)) for name, t in e.tensors().items() if t.ndim == 2})
    assert wide.by_length(lambda part: part).sequence.shape == wide.sequence.shape
