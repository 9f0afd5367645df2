import math

import pytest
import torch
import torch.nn.functional as F

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


def plain_palm(model: PaLM, x: torch.Tensor, scope: str | None = None) -> torch.Tensor:
    """PaLM as reference_api describes it, written out again with everything expanded."""
    d, h, kv, n = model.dim_head, model.heads, model.kv_heads, x.shape[1]
    angle = torch.arange(n)[:, None] * 10000.0 ** -(torch.arange(0, d, 2) / d)
    scale = ((torch.arange(0, d, 2) + 0.4 * d) / (1.4 * d)) ** ((torch.arange(n)[:, None]) / 512)

    def turn(t, scale):
        a, b = t.chunk(2, dim=-1)
        return torch.cat(((a * angle.cos() - b * angle.sin()) * scale, (b * angle.cos() + a * angle.sin()) * scale), -1)

    def norm(t, gamma):
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * (gamma + 1)

    hidden = model.token_emb.weight[x]
    for i, layer in enumerate(model.layers):
        block = layer.fn
        normed = norm(hidden, block.norm.gamma)
        fused = normed @ block.fused_attn_ff_proj.weight.t()
        parts = list(fused.split([h * d, kv * d, kv * d, fused.shape[-1] - (h + 2 * kv) * d], dim=-1))
        lora = model.finetune_modules[scope][i] if scope else None
        if lora:
            parts[:3] = [part + normed @ a.A @ a.B for part, a in zip(parts[:3], lora[:3], strict=True)]
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in parts[:3])
        if block.qk_rmsnorm:
            q = q / q.norm(dim=-1, keepdim=True) * block.q_scale
            k = k / k.norm(dim=-1, keepdim=True) * block.k_scale
        q, k = turn(q, scale), turn(k, 1 / scale)
        k, v = (t.repeat_interleave(h // kv, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) / d**0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        out = attended @ block.attn_out.weight.t()
        if lora:
            out = out + attended @ lora[3].A @ lora[3].B
        value, gate = parts[3].chunk(2, dim=-1)
        hidden = hidden + out + (F.silu(gate) * value) @ block.ff_out[2].weight.t()
    return norm(hidden, model.norm.gamma) @ model.token_emb.weight.t()


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"kv_heads": 2}, {"kv_heads": 4}, {"qk_rmsnorm": True}])
def test_is_the_architecture_written_out(make_palm, keywords, flash_attn):
    model, x = make_palm(flash_attn=flash_attn, finetune_scopes=["a"], **keywords), tokens()
    torch.testing.assert_close(model(x), plain_palm(model, x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(x, finetune_scope="a"), plain_palm(model, x, "a"), atol=1e-4, rtol=1e-4)


def test_names_are_the_references_and_embeddings_are_tied(make_palm):
    model = make_palm()
    assert set(model.state_dict()) == REFERENCE_NAMES
    assert model.to_logits.weight is model.token_emb.weight
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


def pad_left(x, lengths):
    n = x.shape[1]
    rows = [F.pad(row[:length], (n - length, 0), value=3) for row, length in zip(x, lengths, strict=True)]
    return torch.stack(rows), torch.arange(n) >= n - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("keywords", [{}, {"kv_heads": 2}, {"use_xpos": False}, {"qk_rmsnorm": True}])
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
    {"causal": False, "use_xpos": True}, {"gradient_checkpointing": True},
]  # fmt: skip


@pytest.mark.parametrize("keywords", PACKED)
def test_packed_documents_are_each_alone(make_palm, keywords):
    model, (ids, segment_ids, places) = make_palm(**keywords), packed_rows()
    packed = model(ids, segment_ids=segment_ids)
    assert packed.isfinite().all()
    for row, start, stop in places:
        alone = model(ids[row : row + 1, start:stop])[0]
        torch.testing.assert_close(packed[row, start:stop], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(packed, model(ids), atol=1e-3)


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


@pytest.mark.parametrize("scope", [None, "a"])
def test_gradient_checkpointing_changes_no_number(make_palm, scope):
    plain = make_palm(attn_dropout=0.3, ff_dropout=0.3, finetune_scopes=["a"]).train()
    frugal = make_palm(attn_dropout=0.3, ff_dropout=0.3, finetune_scopes=["a"], gradient_checkpointing=True).train()
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


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_merged_is_unmerged(make_palm, kv_heads):
    model, x = make_palm(kv_heads=kv_heads, finetune_scopes=["actor", "critic"]), tokens()
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


def test_adapters_take_the_models_dtype(make_palm):
    model = make_palm().bfloat16()
    model.add_finetune_params("a")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(tokens(), finetune_scope="a").dtype == torch.bfloat16


# against another implementation


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cohere_of_the_same_sizes_has_the_same_parameters_and_logits(kv_heads):
    transformers = pytest.importorskip("transformers")
    config = transformers.CohereConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        logit_scale=0.25,
        layer_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    theirs = transformers.CohereForCausalLM(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    ours = PaLM(
        dim=32,
        num_tokens=50,
        depth=3,
        dim_head=8,
        heads=4,
        kv_heads=kv_heads,
        ff_inner_dim=72,
        use_xpos=False,
        rotary_theta=5000,
        logit_scale=0.25,
        norm_eps=1e-5,
    ).eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

    def halves(weight):  # Cohere turns neighbours (0, 1), (2, 3), ..; PaLM the two halves of a head
        return weight.unflatten(0, (-1, 4, 2)).transpose(1, 2).flatten(0, 2)

    state = ours.state_dict()
    state["token_emb.weight"] = state["to_logits.weight"] = theirs.model.embed_tokens.weight
    state["norm.gamma"] = theirs.model.norm.weight - 1
    for i, layer in enumerate(theirs.model.layers):
        attention, mlp, name = layer.self_attn, layer.mlp, f"layers.{i}.fn."
        qk = (halves(attention.q_proj.weight), halves(attention.k_proj.weight))
        fused = (*qk, attention.v_proj.weight, mlp.up_proj.weight, mlp.gate_proj.weight)
        state[name + "fused_attn_ff_proj.weight"] = torch.cat(fused)
        state[name + "attn_out.weight"] = attention.o_proj.weight
        state[name + "ff_out.2.weight"] = mlp.down_proj.weight
        state[name + "norm.gamma"] = layer.input_layernorm.weight - 1
    ours.load_state_dict(state)

    x = torch.randint(0, 50, (2, 20))
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    prompt = x[:, :5]
    greedy = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_length=14, do_sample=False, eos_token_id=None
    )
    assert torch.equal(ours.generate(14, prompt, temperature=0.0, return_seq_without_prompt=False), greedy)
