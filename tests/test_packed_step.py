"""A packed step is a plain step: the same tokens and log-probs, or the plain step itself."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from palm_rlhf_pytorch import decoder, generation, packed_step
from palm_rlhf_pytorch.attention import Attention
from palm_rlhf_pytorch.blocks import LayerNorm, Residual
from palm_rlhf_pytorch.decoder import choose
from palm_rlhf_pytorch.generation import Sampling
from palm_rlhf_pytorch.packed_step import PackedStep, can_pack
from palm_rlhf_pytorch.palm import PaLM

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

PROMPTS = torch.tensor([[3, 5, 7, 1, 9, 2], [4, 0, 0, 0, 0, 0], [8, 8, 6, 11, 0, 0], [2, 7, 0, 0, 0, 0]])
LENGTHS = torch.tensor([6, 1, 4, 2])

KINDS = {
    "xpos": {},
    "short xpos base": {"rotary_xpos_scale_base": 6},
    "no xpos": {"use_xpos": False},
    "two kv heads": {"kv_heads": 2},
    "all kv heads": {"kv_heads": 4, "use_xpos": False},
    "qk_rmsnorm": {"qk_rmsnorm": True, "kv_heads": 2},
    "qk_layernorm": {"qk_layernorm": True, "kv_heads": 2},
    "qk_layernorm, one kv head": {"qk_layernorm": True, "use_xpos": False, "norm_eps": 0.1, "depth": 3},
    "window": {"sliding_window": 4},
    "window 1": {"sliding_window": 1, "use_xpos": False},
    "window that prompts do not fill": {"sliding_window": 20},
    "window, a global layer": {"sliding_window": 5, "global_layers": [1], "kv_heads": 2, "use_xpos": False},
    "window, global layers": {"sliding_window": 5, "global_layers": [0, 1], "qk_layernorm": True},
    "logit scale and theta": {"logit_scale": 0.5, "rotary_theta": 50.0},
    "odd sizes": {"dim": 21, "heads": 3, "dim_head": 6, "ff_inner_dim": 13, "depth": 3, "norm_eps": 0.1},
}


@pytest.fixture
def packings(monkeypatch) -> list[int]:
    """For how many rows a PackedStep laid out its weights, each time it did."""
    pack, seen = PackedStep._pack, []
    monkeypatch.setattr(PackedStep, "_pack", lambda self: seen.append(self.rows) or pack(self))
    return seen


def answers(model, how, rows=4, seq_len=30, **keywords):
    keywords = {**keywords, "prompt_lengths": LENGTHS[:rows], "return_log_probs": True, "filter_logits_fn": None}
    return model.generate(seq_len, PROMPTS[:rows], 0.0, decoder=how, **keywords)


def assert_same(one, two):
    assert torch.equal(one.sequence, two.sequence) and torch.equal(one.response_mask, two.response_mask)
    torch.testing.assert_close(one.log_probs, two.log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_plain(make_palm, packings, kind, rows):
    model = make_palm(**KINDS[kind])
    plain = answers(model, "plain", rows)
    assert not packings
    assert_same(answers(model, "packed", rows), plain)
    assert packings == [rows]
    assert len(plain.sequence[plain.response_mask].unique()) > 3


@pytest.mark.parametrize("kind", ["short xpos base", "qk_rmsnorm", "window, a global layer"])
def test_in_a_cache_that_grows(make_palm, monkeypatch, packings, kind):
    model = make_palm(**KINDS[kind])
    plain = answers(model, "plain")
    for first_length in (1, 7):
        monkeypatch.setattr(decoder, "FIRST_LENGTH", first_length)
        assert_same(answers(model, "packed"), plain)
    assert packings == [4, 4]


@pytest.mark.parametrize("kind", ["xpos", "window, a global layer"])
@pytest.mark.parametrize("max_batch", [None, 1, 2, 3])
def test_while_rows_leave_and_come(make_palm, packings, max_batch, kind):
    model = make_palm(**KINDS[kind])
    free = answers(model, "plain")
    eos = free.sequence[torch.arange(3), LENGTHS[:3] + torch.tensor([1, 4, 9])].unique().tolist()
    plain = answers(model, "plain", eos_token=eos)
    assert len(plain.response_mask.sum(-1).unique()) > 2
    assert_same(answers(model, "packed", eos_token=eos, max_batch=max_batch), plain)
    assert packings == [max_batch or 4]


@pytest.mark.parametrize("lora_ff", [False, True])
def test_a_merged_adapter_is_packed(make_palm, packings, lora_ff):
    model = make_palm(finetune_scopes=["a"], lora_ff=lora_ff)
    plain = answers(model, "plain", finetune_scope="a")
    assert not torch.equal(plain.sequence, answers(model, "plain").sequence)
    assert_same(answers(model, "packed", finetune_scope="a"), plain)
    assert packings == [4]
    assert_same(answers(model, "packed"), answers(model, "plain"))


def test_a_single_row_needs_no_layout_where_mkl_is_good(make_palm, monkeypatch):
    model = make_palm()
    for onednn in (False, True):
        monkeypatch.setattr(packed_step, "onednn_is_faster", lambda faster=onednn: faster)
        one, two = (PackedStep(model, rows).to_logits for rows in (1, 2))
        assert two.packed and one.packed == onednn
        assert onednn or one.weight.data_ptr() == model.to_logits.weight.data_ptr()
        assert_same(answers(model, "packed", 1), answers(model, "plain", 1))


@torch.no_grad()
def test_step_by_step_and_slot_by_slot(make_palm):
    model = make_palm(kv_heads=2, qk_rmsnorm=True)
    tokens, step = torch.randint(0, 17, (3, 9)), PackedStep(model, 3)
    caches = [model.new_cache(3, 9) for _ in range(2)]
    for column in tokens.t():
        for cache in caches:
            cache.reserve(1)
        torch.testing.assert_close(step(column, caches[0]), model.next_logits(column, caches[1]), atol=1e-5, rtol=1e-5)
        for cache in caches:
            cache.advance(1, 1)
    torch.testing.assert_close(caches[0].memory, caches[1].memory, atol=1e-5, rtol=1e-5)


# weights that change


def log_probs_around(model, how, change):
    """Of every step; after the fourth the model is changed."""
    found, limits = [], torch.full((4,), 15)
    steps = generation.decode(model, PROMPTS, LENGTHS, limits, Sampling(0.0), return_log_probs=True, how=how)
    for i, step in enumerate(steps):
        found.append(step.log_probs)
        if i == 3:
            change(model)
    return torch.cat(found)


@pytest.mark.parametrize(
    "name",
    [
        "token_emb.weight",
        "norm.gamma",
        "layers.0.fn.norm.gamma",
        "layers.1.fn.fused_attn_ff_proj.weight",
        "layers.0.fn.attn_out.weight",
        "layers.1.fn.ff_out.2.weight",
        "layers.0.fn.q_scale",
        "layers.1.fn.k_scale",
        "layers.0.fn.q_norm.gamma",
        "layers.1.fn.k_norm.gamma",
    ],
)
def test_the_next_step_sees_weights_that_changed(make_palm, packings, name):
    def change(model):
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)

    kind = "qk_layernorm" if "_norm" in name else "qk_rmsnorm"
    model = make_palm(**{kind: True})
    runs = [log_probs_around(copy.deepcopy(model), how, change) for how in ("plain", "packed")]
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-5)
    untouched = log_probs_around(model, "packed", lambda model: None)
    assert torch.allclose(untouched[:16], runs[1][:16], atol=1e-5)
    assert not torch.allclose(untouched[16:20], runs[1][16:20], atol=1e-3)
    assert packings == [4, 4, 4]  # twice with the change, once without


def test_an_optimiser_s_step_and_loaded_weights_are_seen(make_palm):
    def learn(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        with torch.enable_grad():
            model(PROMPTS, return_loss=True).backward()
        optimizer.step()

    other = make_palm(qk_rmsnorm=True).state_dict()
    for change in (learn, lambda model: model.load_state_dict(other)):
        model = make_palm(qk_rmsnorm=True)
        runs = [log_probs_around(copy.deepcopy(model), how, change) for how in ("plain", "packed")]
        torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-5)


def test_weights_made_in_inference_mode_are_packed(make_palm, packings):
    with torch.inference_mode():
        model = make_palm()
    assert_same(answers(model, "packed"), answers(model, "plain"))
    assert packings == [4]


# what cannot be packed


class TanhLogits(PaLM):
    def logits_of(self, embeds):
        return super().logits_of(embeds).tanh()


class Tripled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class Doubled(LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Sharper(Attention):
    def forward(self, q, k, v, mask=None):
        return super().forward(2 * q, k, v, mask)


class Halved(Residual):
    def forward(self, x, *args, **kwargs):
        return super().forward(x / 2, *args, **kwargs)


def with_bias(linear):
    biased = nn.Linear(linear.in_features, linear.out_features)
    biased.weight = linear.weight
    return biased


def embed_thrice(model):
    model.token_emb.__class__ = Tripled


def bias_the_logits(model):
    model.to_logits = with_bias(model.to_logits)


def bias_the_attention(model):
    model.layers[0].fn.attn_out = with_bias(model.layers[0].fn.attn_out)


def double_the_last_norm(model):
    model.norm.__class__ = Doubled


def double_a_norm(model):
    model.layers[1].fn.norm.__class__ = Doubled


def sharpen(model):
    model.layers[1].fn.attend.__class__ = Sharper


def halve(model):
    model.layers[0].__class__ = Halved


def subclass(model):
    model.__class__ = TanhLogits


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model.layers[0].fn.attn_out)
    with torch.no_grad():
        model.layers[0].fn.attn_out.parametrizations.weight.original0.mul_(2)


def hook_a_linear(model):
    model.layers[0].fn.attn_out.register_forward_hook(lambda module, args, out: -out)


def hook_the_embedding(model):
    model.token_emb.register_forward_pre_hook(lambda module, args: (16 - args[0],))


CHANGES = [
    embed_thrice,
    bias_the_logits,
    bias_the_attention,
    double_the_last_norm,
    double_a_norm,
    sharpen,
    halve,
    subclass,
    parametrize,
    hook_a_linear,
    hook_the_embedding,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_made_otherwise_is_run_as_it_is(make_palm, packings, caplog, change):
    model = make_palm()
    untouched = answers(model, "plain")
    change(model)
    model.eval()
    answers(model, "auto")
    assert not caplog.records
    packed = answers(model, "packed")
    assert not packings and "decoder='packed' is not to be had here" in caplog.text
    assert_same(packed, answers(model, "plain"))
    assert not torch.allclose(packed.log_probs[0, 6], untouched.log_probs[0, 6], atol=1e-3)


def test_an_adapter_that_is_not_merged_is_not_forgotten(make_palm, packings, caplog):
    model, limits = make_palm(finetune_scopes=["a"]), torch.full((4,), 30)
    keywords = dict(return_log_probs=True, how="packed", finetune_scope="a")
    steps = list(generation.decode(model, PROMPTS, LENGTHS, limits, Sampling(0.0), **keywords))
    assert not packings and "plain steps" in caplog.text
    merged = answers(model, "plain", finetune_scope="a")
    for step in steps:
        expected = merged.log_probs[step.rows, step.positions]
        torch.testing.assert_close(step.log_probs, expected, atol=1e-4, rtol=1e-4)
    assert len(steps) == 29


@pytest.mark.parametrize("how", ["auto", "packed"])
@pytest.mark.parametrize("precision", ["bfloat16", "autocast", "float64"])
def test_other_precisions_are_plain(make_palm, packings, caplog, precision, how):
    model = make_palm()
    model = model if precision == "autocast" else model.to(getattr(torch, precision))
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
        assert_same(answers(model, how), answers(model, "plain"))
    assert not packings and bool(caplog.records) == (how == "packed")


def test_a_machine_without_the_layout_is_plain(make_palm, monkeypatch):
    model = make_palm()
    assert can_pack(model) and choose(model, 100, "packed") == "packed"
    monkeypatch.setattr(packed_step.torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(model) and choose(model, 100) == choose(model, 100, "packed") == "plain"


def test_many_rows_with_normalised_heads():
    """Enough numbers for C++ to turn the heads of a whole pass, but a step has another shape."""
    torch.manual_seed(0)
    palm = PaLM(num_tokens=50, dim=32, depth=1, heads=8, qk_rmsnorm=True).eval()
    prompts = torch.randint(1, 50, (40, 4))
    packed, plain = (palm.generate(8, prompts, temperature=0.0, decoder=decoder) for decoder in ("packed", "plain"))
    assert torch.equal(packed, plain)
