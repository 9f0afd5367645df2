import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cohere import SHAPES, TOKENS, as_palm, halves, tiny_cohere

from palm_rlhf_pytorch.palm import LayerNorm, PaLM, SwiGLU

REFERENCE_NAMES = {
    "token_emb.weight",
    "to_logits.weight",
    "norm.gamma",
    "norm.beta",
    *(
        f"layers.{i}.fn.{name}"
        for i in range(2)
        for name in (
            "norm.gamma",
            "norm.beta",
            "fused_attn_ff_proj.weight",
            "attn_out.weight",
            "ff_out.2.weight",
            "rotary_emb.inv_freq",
            "rotary_emb.scale",
        )
    ),
}


def tokens(b=2, n=9):
    return torch.randint(1, 17, (b, n))


# parts


def test_layer_norm_by_hand():
    norm = LayerNorm(2, eps=0.0)
    torch.nn.init.constant_(norm.gamma, 0.5)  # gain 1.5
    assert norm(torch.tensor([[1.0, 3.0]])).tolist() == [[-1.5, 1.5]]
    wide = LayerNorm(2, eps=3.0)  # variance 1 + 3: half as long
    assert wide(torch.tensor([[1.0, 3.0]])).tolist() == [[-0.5, 0.5]]


def test_swiglu_by_hand():
    x = torch.tensor([[2.0, 3.0, 0.0, 1.0]])
    assert SwiGLU()(x).tolist() == [[0.0, pytest.approx(3 / (1 + math.exp(-1)))]]


# the whole


WRITTEN_OUT = [
    {}, {"kv_heads": 2}, {"kv_heads": 4}, {"qk_rmsnorm": True}, {"use_xpos": False},
    {"qk_layernorm": True}, {"qk_layernorm": True, "kv_heads": 2}, {"sliding_window": 1}, {"sliding_window": 4},
    {"sliding_window": 3, "global_layers": [1], "use_xpos": False, "kv_heads": 4, "qk_layernorm": True},
    {"lora_ff": True, "kv_heads": 2}, {"lora_alpha": 3}, {"lora_alpha": 0.5, "lora_rslora": True, "lora_ff": True},
    {"lora_rslora": True, "ff_inner_dim": 7, "lora_ff": True},
]  # fmt: skip


def plain_palm(model: PaLM, x: torch.Tensor, scope: str | None = None) -> torch.Tensor:
    """PaLM as reference_api describes it, written out again with everything expanded."""
    d, h, kv, n = model.dim_head, model.heads, model.kv_heads, x.shape[1]
    angle = torch.arange(n)[:, None] * 10000.0 ** -(torch.arange(0, d, 2) / d)
    scale = ((torch.arange(0, d, 2) + 0.4 * d) / (1.4 * d)) ** ((torch.arange(n)[:, None]) / 512)
    if not model.rotary_emb.use_xpos:
        scale = torch.ones(())

    def turn(t, scale):
        a, b = t.chunk(2, dim=-1)
        return torch.cat(((a * angle.cos() - b * angle.sin()) * scale, (b * angle.cos() + a * angle.sin()) * scale), -1)

    def scaled(adapter):
        alpha, r = model.config["lora_alpha"] or adapter.A.shape[1], adapter.A.shape[1]
        return adapter.A @ adapter.B * (alpha / (r**0.5 if model.config["lora_rslora"] else r))

    def norm(t, gamma):
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * (gamma + 1)

    hidden = model.token_emb.weight[x]
    for i, layer in enumerate(model.layers):
        block = layer.fn
        normed = norm(hidden, block.norm.gamma)
        fused = normed @ block.fused_attn_ff_proj.weight.t()
        parts = list(fused.split([h * d, kv * d, kv * d, fused.shape[-1] - (h + 2 * kv) * d], dim=-1))
        lora = model.finetune_modules[scope][i] if scope else None
        beside = [scaled(a) for a in lora] if lora else []
        if lora:
            parts[:3] = [part + normed @ a for part, a in zip(parts[:3], beside[:3], strict=True)]
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in parts[:3])
        if block.qk_rmsnorm:
            q = q / q.norm(dim=-1, keepdim=True) * block.q_scale
            k = k / k.norm(dim=-1, keepdim=True) * block.k_scale
        if block.qk_layernorm:
            q, k = norm(q, block.q_norm.gamma[:, None]), norm(k, block.k_norm.gamma[:, None])
        if i not in model.config["global_layers"]:
            q, k = turn(q, scale), turn(k, 1 / scale)
        k, v = (t.repeat_interleave(h // kv, dim=1) for t in (k, v))
        window = model.sliding_window if i not in model.config["global_layers"] else None
        visible = torch.tensor([[y <= z and (window is None or y > z - window) for y in range(n)] for z in range(n)])
        scores = (q @ k.transpose(-1, -2) / d**0.5).masked_fill(~visible, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        out = attended @ block.attn_out.weight.t()
        if lora:
            out = out + attended @ beside[3]
        value, gate = parts[3].chunk(2, dim=-1)
        if len(beside) > 4:
            value, gate = value + normed @ beside[4], gate + normed @ beside[5]
        inner = F.silu(gate) * value
        hidden = hidden + out + inner @ block.ff_out[2].weight.t()
        if len(beside) > 4:
            hidden = hidden + inner @ beside[6]
    return norm(hidden, model.norm.gamma) @ model.token_emb.weight.t()


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("keywords", WRITTEN_OUT)
def test_is_the_architecture_written_out(make_palm, keywords, flash_attn):
    model, x = make_palm(flash_attn=flash_attn, finetune_scopes=["a"], **keywords), tokens()
    torch.testing.assert_close(model(x), plain_palm(model, x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(x, finetune_scope="a"), plain_palm(model, x, "a"), atol=1e-4, rtol=1e-4)


def test_names_are_the_references_and_embeddings_are_tied(make_palm):
    model = make_palm()
    assert set(model.state_dict()) == REFERENCE_NAMES
    assert model.to_logits.weight is model.token_emb.weight
    names = set(make_palm(qk_layernorm=True, lora_ff=True, finetune_scopes=["s"]).state_dict()) - REFERENCE_NAMES
    assert names == {
        *(f"layers.{i}.fn.{name}_norm.gamma" for i in range(2) for name in "qk"),
        *(f"finetune_modules.s.{i}.{j}.{m}" for i in range(2) for j in range(7) for m in "AB"),
    }
    names = set(make_palm(qk_rmsnorm=True, finetune_scopes=["s"]).state_dict()) - REFERENCE_NAMES
    assert names == {
        *(f"layers.{i}.fn.{name}_scale" for i in range(2) for name in "qk"),
        *(f"finetune_modules.s.{i}.{j}.{m}" for i in range(2) for j in range(4) for m in "AB"),
    }


def test_outputs_asked_for(make_palm):
    model, x = make_palm(), tokens()
    logits, embeds = model(x, return_logits_with_embedding=True)
    assert torch.equal(logits, model(x)) and logits.shape == (2, 9, 17)
    assert torch.equal(embeds, model(x, return_only_embedding=True)) and embeds.shape == (2, 9, 24)
    extra = torch.randn(2, 9, 24)
    shifted = make_palm()
    shifted.load_state_dict(model.state_dict())
    hidden = model.token_emb(x) + extra
    shifted.token_emb.register_forward_hook(lambda *_: hidden)
    torch.testing.assert_close(model(x, extra_embed=extra), shifted(x))


@pytest.mark.parametrize("ignore", [0, 5, -1])
def test_loss_by_hand(make_palm, ignore):
    model, x = make_palm(cross_entropy_ignore_index=ignore), torch.randint(0, 17, (3, 12))
    log_probs = model(x).log_softmax(-1)
    terms = [-log_probs[b, t, x[b, t + 1]].item() for b in range(3) for t in range(11) if x[b, t + 1].item() != ignore]
    assert len(terms) < 33 or ignore == -1
    assert model(x, return_loss=True).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("ignore", [0, -1])
def test_padding_adds_nothing_to_the_loss(make_palm, ignore):
    model, x = make_palm(cross_entropy_ignore_index=ignore), tokens()
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    log_probs = model(x).log_softmax(-1)
    terms = [-log_probs[b, t, x[b, t + 1]] for b, n in enumerate((9, 4)) for t in range(n - 1)]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(model(x, return_loss=True, mask=mask), expected)
    torch.testing.assert_close(model(x.masked_fill(~mask, -1), return_loss=True), expected)
    torch.testing.assert_close(model(x.flip(0), return_loss=True, mask=mask.flip(0)), expected)
    left, left_mask = pad_left(x, [9, 4])
    torch.testing.assert_close(model(left, return_loss=True, mask=left_mask), expected)


def test_loss_takes_extra_embeddings_of_the_whole_sequence(make_palm):
    model, x, extra = make_palm(), tokens(), torch.randn(2, 9, 24)
    logits = model(x, extra_embed=extra)[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), x[:, 1:])
    torch.testing.assert_close(model(x, return_loss=True, extra_embed=extra), expected)


def test_the_loss_is_of_float32_logits(make_palm):
    model = make_palm().bfloat16()
    assert model(tokens()).dtype == torch.bfloat16
    assert model(tokens(), return_loss=True).dtype == torch.float32
    assert model.rotary_emb.inv_freq.dtype == torch.float32


# padding


WINDOWS = [
    {"sliding_window": 4}, {"sliding_window": 4, "use_xpos": False, "global_layers": [0]},
    {"sliding_window": 3, "global_layers": (1,), "kv_heads": 2, "qk_layernorm": True},
    {"sliding_window": 1}, {"sliding_window": 3, "global_layers": [0, 1]},
]  # fmt: skip


def pad_left(x, lengths):
    n = x.shape[1]
    rows = [F.pad(row[:length], (n - length, 0), value=3) for row, length in zip(x, lengths, strict=True)]
    return torch.stack(rows), torch.arange(n) >= n - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("keywords", [{}, {"kv_heads": 2}, {"use_xpos": False}, {"qk_rmsnorm": True}, *WINDOWS])
def test_left_padded_is_right_padded_is_alone(make_palm, keywords):
    model, x, lengths = make_palm(**keywords), tokens(3), [9, 2, 6]
    left, mask = pad_left(x, lengths)
    shifted = model(left, mask=mask)
    right = model(x)
    right_masked = model(x, mask=torch.arange(9) < torch.tensor(lengths)[:, None])
    for i, length in enumerate(lengths):
        alone = model(x[i : i + 1, :length])[0]
        for padded in (shifted[i, 9 - length :], right[i, :length], right_masked[i, :length]):
            torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_left_padded_gradients_are_those_of_rows_alone(make_palm):
    model, x, lengths = make_palm(), tokens(2), [9, 4]
    left, mask = pad_left(x, lengths)
    parameters = model.palm_parameters()
    model(left, mask=mask, return_only_embedding=True)[mask].sin().sum().backward()
    padded = [p.grad.clone() for p in parameters]
    model.zero_grad()
    sum(model(x[i : i + 1, :n], return_only_embedding=True).sin().sum() for i, n in enumerate(lengths)).backward()
    for ours, alone in zip(padded, parameters, strict=True):
        torch.testing.assert_close(ours, alone.grad, atol=1e-4, rtol=1e-4)


def test_an_encoder_sees_the_future_but_no_padding(make_palm):
    model, x = make_palm(causal=False), tokens()
    assert not model.rotary_emb.use_xpos
    changed = x.clone()
    changed[:, -1] = 1 + changed[:, -1] % 16
    assert not torch.allclose(model(x)[:, 0], model(changed)[:, 0])
    padded = F.pad(x, (0, 3), value=-1)
    torch.testing.assert_close(model(padded)[:, :9], model(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(F.pad(x, (4, 0), value=-1))[:, 4:], model(x), atol=1e-5, rtol=1e-5)
    mask = (padded >= 0) & (torch.arange(12) > 0)
    garbage = torch.where(mask, padded, 7)
    torch.testing.assert_close(model(garbage, mask=mask)[:, 1:9], model(x[:, 1:]), atol=1e-5, rtol=1e-5)
    assert model(torch.full((1, 4), -1)).isfinite().all()


# packed rows


ROWS = [(4, 1, 5), (7, 2)]  # the lengths of the documents in each row, before padding


def packed_rows(width=12):
    """Ids (2, width), -1 at padding, their segment ids, and where each document lies: (row, start, stop)."""
    ids, segment_ids, places = torch.full((2, width), -1), torch.full((2, width), -1), []
    for row, lengths in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths):
            places.append((row, start, start + length))
            segment_ids[row, start : start + length] = number
            start += length
        ids[row, :start] = torch.randint(1, 17, (start,))
    return ids, segment_ids, places


PACKED = [
    {}, {"kv_heads": 2}, {"use_xpos": False}, {"rotary_xpos_scale_base": 4}, {"qk_rmsnorm": True}, {"causal": False},
    {"causal": False, "use_xpos": True}, {"gradient_checkpointing": True}, {"qk_layernorm": True}, *WINDOWS,
]  # fmt: skip


@pytest.mark.parametrize("keywords", PACKED)
def test_packed_documents_are_each_alone(make_palm, keywords):
    model, (ids, segment_ids, places) = make_palm(**keywords), packed_rows()
    packed = model(ids, segment_ids=segment_ids)
    assert packed.isfinite().all()
    for row, start, stop in places:
        alone = model(ids[row : row + 1, start:stop])[0]
        torch.testing.assert_close(packed[row, start:stop], alone, atol=1e-5, rtol=1e-5)
    assert model.sliding_window == 1 or not torch.allclose(packed, model(ids), atol=1e-3)


def test_packed_padding_may_be_said_by_a_mask(make_palm):
    for causal in (True, False):
        model, (ids, segment_ids, _) = make_palm(causal=causal), packed_rows()
        mask = ids >= 0
        garbage, joined = torch.where(mask, ids, 7), torch.where(mask, segment_ids, 0)
        expected = model(ids, segment_ids=segment_ids)[mask]
        torch.testing.assert_close(model(garbage, mask=mask, segment_ids=joined)[mask], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keywords", [{}, {"gradient_checkpointing": True}, {"logit_scale": 0.5}])
def test_packed_loss_and_gradients_are_those_of_documents_alone(make_palm, keywords):
    model, (ids, segment_ids, places) = make_palm(cross_entropy_ignore_index=-1, **keywords), packed_rows()
    model.train()
    loss = model(ids, return_loss=True, segment_ids=segment_ids)
    loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    counts = [stop - start - 1 for _, start, stop in places]
    parts = [
        model(ids[row : row + 1, start:stop], return_loss=True) * n
        for (row, start, stop), n in zip(places, counts, strict=True)
        if n
    ]
    expected = sum(parts) / sum(counts)  # 3 + 0 + 4 + 6 + 1 next tokens, none across documents
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for ours, alone in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(ours, alone.grad, atol=1e-5, rtol=1e-4)


def test_packed_rows_under_autocast(make_palm):
    model, (ids, segment_ids, _) = make_palm(), packed_rows()
    with torch.autocast("cpu", torch.bfloat16):
        reduced = model(ids, segment_ids=segment_ids).detach()
    expected = model(ids, segment_ids=segment_ids).detach()
    assert 0 < float((reduced - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_one_mask_serves_all_layers(make_palm, monkeypatch):
    seen, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, **keywords):
        seen.append(keywords["attn_mask"])
        return attention(q, k, v, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model, (ids, segment_ids, _) = make_palm(), packed_rows()
    model(ids, segment_ids=segment_ids)
    assert len(seen) == 2 and seen[0] is seen[1] and seen[0].dtype == torch.float32 and seen[0].shape == (2, 1, 12, 12)


def test_packed_rows_have_no_cache(make_palm):
    model, (ids, segment_ids, _) = make_palm(), packed_rows()
    with pytest.raises(ValueError, match="one document a row"):
        model(ids, segment_ids=segment_ids, cache=model.new_cache(2, 12))


def test_a_causal_model_does_not_see_the_future(make_palm):
    model, x = make_palm(), tokens()
    changed = x.clone()
    changed[:, 5:] = tokens()[:, 5:]
    assert torch.equal(model(x)[:, :5], model(changed)[:, :5])


# keywords beyond the reference


def test_beyond_the_reference_defaults_change_nothing(make_palm):
    spelled_out = dict(
        kv_heads=1,
        rotary_theta=10000,
        use_xpos=True,
        ff_inner_dim=24 * 4,
        norm_eps=1e-5,
        logit_scale=1.0,
        gradient_checkpointing=False,
        qk_layernorm=False,
        sliding_window=None,
        global_layers=(),
        lora_alpha=None,
        lora_rslora=False,
        lora_ff=False,
    )
    model, other = make_palm(), make_palm(**spelled_out)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x := tokens()), other(x))


def test_logit_scale_in_forward_and_loss(make_palm):
    model = make_palm()
    scaled = make_palm(logit_scale=0.25)
    scaled.load_state_dict(model.state_dict())
    x = tokens()
    torch.testing.assert_close(scaled(x), model(x) * 0.25)
    expected = F.cross_entropy((model(x[:, :-1]) * 0.25).transpose(1, 2), x[:, 1:])
    torch.testing.assert_close(scaled(x, return_loss=True), expected)
    torch.testing.assert_close(scaled(x, return_logits_with_embedding=True)[0], scaled(x))


def test_sizes_and_constants(make_palm):
    block = make_palm(ff_inner_dim=10, kv_heads=2, norm_eps=0.5, ff_mult=99).layers[0].fn
    assert block.fused_attn_ff_proj.weight.shape == (4 * 8 + 2 * 8 + 2 * 8 + 2 * 10, 24)
    assert block.ff_out[2].weight.shape == (24, 10)
    model = make_palm(rotary_theta=100, norm_eps=0.5)
    assert model.norm.eps == model.layers[1].fn.norm.eps == 0.5
    assert model.rotary_emb.inv_freq.tolist() == pytest.approx([100 ** -(i / 8) for i in (0, 2, 4, 6)])
    assert make_palm(causal=False, use_xpos=True).rotary_emb.use_xpos


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"depth": 0}, "depth must be 1 or more, got 0"),
        ({"heads": 4, "kv_heads": 3}, "must be a multiple of kv_heads"),
        ({"kv_heads": 0}, "kv_heads must be 1 or more"),
        ({"dim_head": 7}, "dim_head must be even"),
    ],
)
def test_impossible_sizes_are_refused(make_palm, keywords, message):
    with pytest.raises(ValueError, match=message):
        make_palm(**keywords)


@pytest.mark.parametrize("keywords", [{}, {"sliding_window": 3, "qk_layernorm": True, "lora_ff": True}])
@pytest.mark.parametrize("scope", [None, "a"])
def test_gradient_checkpointing_changes_no_number(make_palm, scope, keywords):
    keywords = dict(attn_dropout=0.3, ff_dropout=0.3, finetune_scopes=["a"], **keywords)
    plain, frugal = (make_palm(gradient_checkpointing=frugal, **keywords).train() for frugal in (False, True))
    frugal.load_state_dict(plain.state_dict())
    calls = []
    frugal.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x, losses = tokens(), []
    for model in (plain, frugal):
        torch.manual_seed(3)
        losses.append(model(x, return_loss=True, finetune_scope=scope))
        losses[-1].backward()
    assert losses[0] == losses[1] and len(calls) == 2
    for ours, theirs in zip(frugal.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        frugal(x)
    assert len(calls) == 3  # nothing to remember without gradient


# dropout


@pytest.mark.parametrize("flash_attn", [False, True])
def test_set_dropout_reaches_the_attention(make_palm, flash_attn):
    model, x = make_palm(flash_attn=flash_attn, attn_dropout=0.1), tokens()
    expected = model(x)
    mute = make_palm(flash_attn=flash_attn)
    mute.load_state_dict(model.state_dict())
    for layer in mute.layers:
        torch.nn.init.zeros_(layer.fn.attn_out.weight)
    assert model.set_dropout(1.0) is model
    assert torch.equal(model(x), expected)  # in eval mode nothing is dropped
    for layer in model.layers:
        layer.fn.ff_out[1].p = 0.0
    for some in (x, x[:, :1]):
        torch.testing.assert_close(model.train()(some), mute(some))
    padded = torch.ones(2, 9, dtype=torch.bool)
    torch.testing.assert_close(model(x, mask=padded), mute(x))
    torch.testing.assert_close(model.set_dropout(0.0)(x), expected)


def test_dropout_differs_from_pass_to_pass(make_palm):
    for keywords in ({"attn_dropout": 0.5}, {"ff_dropout": 0.5}):
        model, x = make_palm(**keywords).train(), tokens()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


# adapters


def test_fresh_adapters_change_nothing(make_palm):
    model, x = make_palm(), tokens()
    base = model(x)
    model.add_finetune_params("actor", lora_r=3)
    assert torch.equal(model(x, finetune_scope="actor"), base)
    assert model.finetune_modules["actor"][0][0].A.shape == (24, 3)


def test_scopes_are_independent_and_can_be_disabled(make_palm):
    model, x = make_palm(finetune_scopes=["actor", "critic"]), tokens()
    base, actor, critic = model(x), model(x, finetune_scope="actor"), model(x, finetune_scope="critic")
    assert not torch.allclose(base, actor) and not torch.allclose(actor, critic)
    assert torch.equal(model(x, finetune_scope="actor", disable_lora=True), base)
    model.remove_finetune_params("critic")
    assert torch.equal(model(x, finetune_scope="actor"), actor)
    model.add_finetune_params("critic")
    assert torch.equal(model(x, finetune_scope="critic"), base)


@pytest.mark.parametrize("keywords", [{}, {"kv_heads": 2}, {"lora_ff": True, "lora_alpha": 2, "lora_rslora": True}])
def test_merged_is_unmerged(make_palm, keywords):
    model, x = make_palm(finetune_scopes=["actor", "critic"], **keywords), tokens()
    actor, critic = model(x, finetune_scope="actor"), model(x, finetune_scope="critic")
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    with model.merged("actor"):
        torch.testing.assert_close(model(x), actor, atol=1e-5, rtol=1e-5)
    for name, t in model.state_dict().items():
        assert torch.equal(t, weights[name])
    model.merge_finetune_params("actor")
    torch.testing.assert_close(model(x), actor, atol=1e-5, rtol=1e-5)
    assert list(model.finetune_modules) == ["critic"]
    assert not torch.allclose(model(x, finetune_scope="critic"), critic)  # it now stands on other weights


def test_weights_come_back_when_merging_or_the_work_in_it_fails(make_palm, monkeypatch):
    model = make_palm(finetune_scopes=["a"])
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), model.merged("a"):
        raise ZeroDivisionError
    assert all(map(torch.equal, weights, model.parameters()))

    def fail(lora):
        raise MemoryError

    monkeypatch.setattr(model.layers[1].fn, "merge_lora", fail)  # the first layer is merged by then
    with pytest.raises(MemoryError), model.merged("a"):
        pass
    assert all(map(torch.equal, weights, model.parameters()))


def test_unknown_and_doubled_scopes_are_refused(make_palm):
    model, x = make_palm(finetune_scopes=["a"]), tokens()
    calls = (
        lambda: model(x, finetune_scope="b"),
        lambda: model.merge_finetune_params("b"),
        lambda: model.remove_finetune_params("b"),
        lambda: model.finetune_parameters("b"),
        lambda: model.generate(4, x, finetune_scope="b"),
    )
    for call in calls:
        with pytest.raises(KeyError, match=r"no finetune scope 'b'; this model has \['a'\]"):
            call()
    with pytest.raises(ValueError, match="'a' is already there"):
        model.add_finetune_params("a")


def test_parameters_fall_into_trunk_and_adapters(make_palm):
    model = make_palm(finetune_scopes=["a", "b"])
    assert len(model.finetune_parameters("a")) == 2 * 4 * 2
    whole = {id(p) for p in model.parameters()}
    parts = [id(p) for ps in (model.palm_parameters(), *map(model.finetune_parameters, "ab")) for p in ps]
    assert whole == set(parts) and len(parts) == len(whole)
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for p in model.palm_parameters()]
    assert order == [name for name, _ in model.named_parameters() if "finetune" not in name]  # stable over runs


def test_frozen_trunk_gets_no_gradient(make_palm):
    model = make_palm(finetune_scopes=["a"])
    for p in model.palm_parameters():
        p.requires_grad_(False)
    model(tokens(), return_loss=True, finetune_scope="a").backward()
    assert all(p.grad is None for p in model.palm_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.finetune_parameters("a"))


# in half precision


def test_gammas_and_adapters_are_not_rounded(make_palm):
    model = make_palm(qk_layernorm=True, finetune_scopes=["a"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    for half in (model.bfloat16(), model.half(), model.to("cpu", torch.bfloat16)):
        for name, p in half.named_parameters():
            kept = name.endswith((".gamma", ".A", ".B"))
            assert p.dtype == (torch.float32 if kept else p.dtype) and (kept or p.dtype != torch.float32)
            assert not kept or torch.equal(p, before[name])
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


def test_adapters_are_float32_beside_half_precision(make_palm):
    for change, dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = make_palm().to(change)
        model.add_finetune_params("a")
        assert {p.dtype for p in model.finetune_parameters("a")} == {dtype}
        assert model(tokens(), finetune_scope="a").dtype == change


def test_gammas_and_adapters_are_made_in_float32_too(make_palm):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = make_palm(qk_layernorm=True, finetune_scopes=["a"])
    finally:
        torch.set_default_dtype(torch.float32)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith((".gamma", ".A", ".B")) else torch.bfloat16)
    assert model(tokens(), finetune_scope="a").isfinite().all()


HALF_KINDS = [
    {}, {"qk_layernorm": True, "kv_heads": 2}, {"lora_ff": True}, {"sliding_window": 4, "global_layers": [1]},
    {"qk_rmsnorm": True, "logit_scale": 0.25},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keywords", HALF_KINDS)
def test_half_precision_is_near_float32_on_every_path(make_palm, keywords, dtype):
    """The same weights, rounded to half precision, computed in float32 and in that."""
    model = make_palm(finetune_scopes=["a"], cross_entropy_ignore_index=-1, **keywords)
    half = copy.deepcopy(model).to(dtype)
    model.load_state_dict(half.state_dict())
    x = tokens(2, 12)

    def near(ours, exact, error=0.04):
        assert ours.dtype == dtype and 0 < (ours - exact).abs().max() < error * exact.abs().max()

    exact = model(x, finetune_scope="a")
    near(half(x, finetune_scope="a"), exact)
    near(half(x, finetune_scope="a", mask=torch.ones_like(x, dtype=torch.bool)), exact)
    segment_ids = torch.zeros_like(x)
    near(half(x, finetune_scope="a", segment_ids=segment_ids), exact)
    cache = half.new_cache(2, 12)
    near(half(x[:, :7], cache=cache, finetune_scope="a"), exact[:, :7])
    near(half(x[:, 7:], cache=cache, finetune_scope="a"), exact[:, 7:])
    with half.merged("a"):
        near(half(x), exact)
    embeds = half(x, return_only_embedding=True, extra_embed=torch.ones(2, 12, 24))  # of float32
    assert embeds.dtype == dtype

    losses = [some.train()(x, return_loss=True, finetune_scope="a") for some in (half, model)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses, atol=0.05, rtol=0.02)
    for some, loss in zip((half, model), losses, strict=True):
        some.requires_grad_(False).finetune_modules.requires_grad_(True)
        some(x, return_loss=True, finetune_scope="a").backward()
        assert loss.grad_fn is not None and all(p.grad is None for p in some.palm_parameters())
    ours, theirs = (torch.cat([p.grad.flatten() for p in some.finetune_parameters("a")]) for some in (half, model))
    assert ours.dtype == torch.float32 and F.cosine_similarity(ours, theirs, dim=0) > 0.99


@pytest.mark.parametrize("keywords", [{}, {"lora_ff": True}])
def test_merging_into_bfloat16_rounds_once_and_comes_back(make_palm, keywords):
    model = make_palm(finetune_scopes=["a"], **keywords).bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    block, lora = model.layers[1].fn, model.finetune_modules["a"][1]
    with torch.no_grad():
        q = (block.fused_attn_ff_proj.weight[:32].float() + (lora[0].A @ lora[0].B).t()).bfloat16()
    with model.merged("a"):
        assert torch.equal(block.fused_attn_ff_proj.weight[:32], q)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.merge_finetune_params("a")
    assert torch.equal(block.fused_attn_ff_proj.weight[:32], q) and not model.lora_options


# windows, and layers that see everything


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_what_lies_beyond_the_window_is_not_seen(make_palm, depth):
    """A change at j is seen by i up to depth * (window - 1) tokens later, and by none further on."""
    model, x, window = make_palm(sliding_window=3, depth=depth), tokens(1, 12), 3
    for j in range(12):
        changed = x.clone()
        changed[0, j] = 1 + changed[0, j] % 16
        differs = (model(x) != model(changed)).any(-1)[0]
        assert differs.nonzero().flatten().tolist() == list(range(j, min(12, j + depth * (window - 1) + 1)))
    far = make_palm(sliding_window=3, depth=depth, global_layers=list(range(depth)))
    assert not torch.equal(far(x)[0, -1], far(torch.cat((x[:, :1] % 16 + 1, x[:, 1:]), dim=1))[0, -1])


@torch.no_grad()
def test_global_layers_do_not_know_the_order(make_palm):
    """Without rotary what the last token sees is a set."""
    model = make_palm(sliding_window=5, global_layers=[0], depth=1)
    x = tokens(1, 9)
    shuffled = torch.cat((x[:, :-1].flip(1), x[:, -1:]), dim=1)
    torch.testing.assert_close(model(x)[:, -1], model(shuffled)[:, -1], atol=1e-5, rtol=1e-5)
    rotating = make_palm(depth=1)
    assert not torch.allclose(rotating(x)[:, -1], rotating(shuffled)[:, -1], atol=1e-3)


@torch.no_grad()
def test_a_window_that_is_not_full_is_the_plain_kernel(make_palm, monkeypatch):
    seen, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, **keywords):
        seen.append((keywords["attn_mask"], keywords["is_causal"]))
        return attention(q, k, v, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    plain, model, x = make_palm(depth=4), make_palm(depth=4, sliding_window=9, global_layers=[1]), tokens(2, 9)
    plain(x)
    assert seen == [(None, True)] * 4
    seen.clear()
    model(x)
    assert seen == [(None, True)] * 4
    seen.clear()
    model(tokens(2, 10))
    assert seen[1] == (None, True) and seen[0][0].shape == (1, 1, 10, 10)
    assert seen[0][0] is seen[2][0] is seen[3][0]  # one mask of each kind


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"sliding_window": 0}, "sliding_window .* must be 1 or more, got 0"),
        ({"sliding_window": 4, "causal": False}, "an encoder .* a sliding_window only the past"),
        ({"global_layers": [1]}, "without sliding_window every layer is global"),
        ({"sliding_window": 4, "global_layers": [2]}, r"layers from 0 to 1, got \[2\]"),
        ({"qk_layernorm": True, "qk_rmsnorm": True}, "not by both"),
        ({"lora_alpha": 0, "finetune_scopes": ["a"]}, "alpha must be above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(make_palm, keywords, message):
    with pytest.raises(ValueError, match=message):
        make_palm(**keywords)


def test_a_model_with_a_window_does_not_become_an_encoder(make_palm):
    model = make_palm(sliding_window=4)
    with pytest.raises(ValueError, match="an encoder .* a sliding_window only the past"):
        model.set_causal(False)
    assert model.causal


# adapters of the feedforward, their scale


@pytest.mark.parametrize("keywords", [{}, {"lora_rslora": True, "lora_alpha": 3.0}])
@pytest.mark.parametrize("ff_dropout", [0.0, 0.5])
def test_gradients_of_adapters_are_those_of_merged_weights(make_palm, keywords, ff_dropout):
    """With W + s A B dense, dA = s dW B^T and dB = s A^T dW; the trunk gets none."""
    model = make_palm(lora_ff=True, finetune_scopes=["a"], ff_dropout=ff_dropout, kv_heads=2, **keywords).train()
    model.requires_grad_(False).finetune_modules.requires_grad_(True)
    x = tokens()
    torch.manual_seed(5)
    model(x, return_loss=True, finetune_scope="a").backward()
    assert all(p.grad is None for p in model.palm_parameters())

    dense = copy.deepcopy(model).requires_grad_(True)
    dense.merge_finetune_params("a")
    torch.manual_seed(5)
    dense(x, return_loss=True).backward()
    for layer, lora in zip(dense.layers, model.finetune_modules["a"], strict=True):
        block = layer.fn
        q, k, v, value, gate = block.fused_attn_ff_proj.weight.grad.split([32, 16, 16, 96, 96])
        wholes = (q, k, v, block.attn_out.weight.grad, value, gate, block.ff_out[2].weight.grad)
        for adapter, whole in zip(lora, wholes, strict=True):
            expected = adapter.scale * whole.t() @ adapter.B.t(), adapter.scale * adapter.A.t() @ whole.t()
            for p, gradient in zip((adapter.A, adapter.B), expected, strict=True):
                torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)


def test_every_scope_keeps_its_options(make_palm, tmp_path):
    model = make_palm(lora_alpha=4, lora_r=2, finetune_scopes=["like the model"])
    model.add_finetune_params("wide", 5)
    model.add_finetune_params("own", 3, lora_alpha=7.0, lora_rslora=True, lora_ff=True)
    scopes = model.whole_config["finetune_scopes"]
    own = {"lora_r": 3, "lora_alpha": 7.0, "lora_rslora": True, "lora_ff": True}
    assert scopes == {"like the model": 2, "wide": 5, "own": own}
    for lora in model.finetune_modules.values():
        for p in lora.parameters():
            torch.nn.init.normal_(p)
    model.save(tmp_path / "palm.safetensors")
    loaded, x = PaLM.from_checkpoint(tmp_path / "palm.safetensors").eval(), tokens()
    assert loaded.whole_config == model.whole_config
    for scope in scopes:
        assert torch.equal(loaded(x, finetune_scope=scope), model(x, finetune_scope=scope))
    scales = [loaded.finetune_modules[scope][0][0].scale for scope in scopes]
    assert scales == [4 / 2, 4 / 5, pytest.approx(7 / 3**0.5)]
    model.remove_finetune_params("own")
    model.merge_finetune_params("wide")
    assert list(model.lora_options) == list(model.whole_config["finetune_scopes"]) == ["like the model"]


def test_all_new_options_come_back_from_a_file(make_palm, tmp_path):
    options = dict(qk_layernorm=True, sliding_window=3, global_layers=(1,), lora_ff=True, lora_rslora=True)
    model, x = make_palm(lora_alpha=5, finetune_scopes={"a": 2}, **options), tokens()
    model.save(tmp_path / "palm.safetensors")
    loaded = PaLM.from_checkpoint(tmp_path / "palm.safetensors").eval()
    assert loaded.whole_config == model.whole_config
    assert torch.equal(loaded(x, finetune_scope="a"), model(x, finetune_scope="a"))


# against another implementation: transformers' Cohere and Cohere2, see tests/cohere.py


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_cohere_of_the_same_weights_has_the_same_logits(shape):
    theirs = tiny_cohere(**SHAPES[shape])
    ours, x = as_palm(theirs), torch.randint(3, TOKENS, (2, 20))
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    mask = torch.arange(20) >= torch.tensor([[0], [11]])  # padded on the left
    padded = theirs(x, attention_mask=mask.long(), position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(ours(x, mask=mask)[mask], padded[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["qk-norm, two kv heads", "Cohere2"])
def test_cohere_of_the_same_weights_has_the_same_loss_and_gradients(shape):
    theirs = tiny_cohere(**SHAPES[shape])
    ours, x = as_palm(theirs), torch.randint(3, TOKENS, (2, 20))
    expected, loss = theirs(x, labels=x).loss, ours(x, return_loss=True)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    expected.backward()
    loss.backward()
    pairs = [(ours.token_emb.weight, theirs.model.embed_tokens.weight)]
    for layer, their in zip(ours.layers, theirs.model.layers, strict=True):
        pairs += [(layer.fn.attn_out.weight, their.self_attn.o_proj.weight)]
        pairs += [(layer.fn.ff_out[2].weight, their.mlp.down_proj.weight)]
        pairs += [(layer.fn.norm.gamma, their.input_layernorm.weight)]
    for mine, their in pairs:
        torch.testing.assert_close(mine.grad, their.grad, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["plain", "packed"])
@pytest.mark.parametrize("shape", ["one kv head", "qk-norm, two kv heads", "Cohere2", "Cohere2, global layers first"])
def test_cohere_says_the_same_to_ragged_prompts(shape, decoder):
    """64 tokens, greedily; theirs padded on the left, ours on the right."""
    theirs = tiny_cohere(**SHAPES[shape])
    ours, x, lengths = as_palm(theirs), torch.randint(3, TOKENS, (3, 9)), torch.tensor([9, 2, 6])
    mask = torch.arange(9) >= 9 - lengths[:, None]
    left = torch.zeros_like(x).masked_scatter(mask, x[mask.flip(1)])
    greedy = dict(do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(left, attention_mask=mask.long(), **greedy)[:, 9:]
    drawn = ours.generate(9 + 64, x, 0.0, prompt_lengths=lengths, decoder=decoder)
    assert torch.equal(drawn[:, :64], expected)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["qk-norm, two kv heads", "Cohere2"])
def test_cohere_in_bfloat16_is_as_near_as_theirs(shape):
    """Both round as they go; measured from the float32 model of the same weights, ours is no further off."""
    theirs = tiny_cohere(**SHAPES[shape]).bfloat16().float()  # weights that bfloat16 has
    ours, x = as_palm(theirs).bfloat16(), torch.randint(3, TOKENS, (4, 30))
    exact, reduced = theirs(x).logits, theirs.bfloat16()(x).logits.float()
    error = (ours(x).float() - exact).abs().mean()
    assert 0 < error < 1.2 * (reduced - exact).abs().mean()


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("lora_ff", [False, True])
def test_peft_s_adapters_beside_cohere_are_ours(lora_ff, rslora):
    peft = pytest.importorskip("peft")
    theirs = tiny_cohere(**SHAPES["qk-norm, two kv heads"])
    ours, x = as_palm(theirs), torch.randint(3, TOKENS, (2, 20))
    names = PROJECTIONS if lora_ff else PROJECTIONS[:4]
    options = dict(r=3, lora_alpha=5, use_rslora=rslora, target_modules=list(names), init_lora_weights=False)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    ours.add_finetune_params("a", 3, lora_alpha=5, lora_rslora=rslora, lora_ff=lora_ff)
    with torch.no_grad():
        for layer, lora in zip(theirs.model.layers, ours.finetune_modules["a"], strict=True):
            for name, adapter in zip(names, lora, strict=True):
                beside = getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name)
                up = beside.lora_B["default"].weight
                adapter.A.copy_(beside.lora_A["default"].weight.t())
                adapter.B.copy_((halves(up) if name[0] in "qk" else up).t())
    expected = adapted(x).logits
    torch.testing.assert_close(ours(x, finetune_scope="a"), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, ours(x), atol=1e-2)
    expected.sin().sum().backward()
    ours(x, finetune_scope="a").sin().sum().backward()
    for layer, lora in zip(theirs.model.layers, ours.finetune_modules["a"], strict=True):
        theirs_a = layer.self_attn.v_proj.lora_A["default"].weight.grad
        torch.testing.assert_close(lora[2].A.grad.t(), theirs_a, atol=1e-3, rtol=1e-3)
