import json

import pytest
import torch
from cohere import SHAPES, TOKENS, tiny_cohere
from safetensors.torch import load_file
from torch import nn

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.cohere_config import keywords_of

transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install .[hf]")

X = torch.randint(4, TOKENS, (2, 23), generator=torch.Generator().manual_seed(3))
MORE_SHAPES = {
    "wide heads": dict(head_dim=16, num_hidden_layers=1),
    "Cohere2, all global": dict(sliding_window=5, num_hidden_layers=2, layer_types=["full_attention"] * 2),
}


def theirs(shape: str) -> nn.Module:
    more = dict(rope_theta=5000.0, eos_token_id=[2, 3])  # transformers 4 spells it so; 5 knows it as rope_parameters
    return tiny_cohere(**more, **{**SHAPES, **MORE_SHAPES}[shape])


@pytest.fixture(params=[*SHAPES, *MORE_SHAPES])
def model(request):
    return theirs(request.param)


@torch.no_grad()
def test_logits_agree_both_ways(model, tmp_path):
    model.save_pretrained(tmp_path / "in")
    palm = PaLM.from_pretrained(tmp_path / "in")
    wanted = model(X).logits
    assert wanted.abs().max() > 0.5 and not palm.training
    torch.testing.assert_close(palm(X), wanted, atol=1e-4, rtol=0)
    assert sum(p.numel() for p in palm.parameters()) == sum(p.numel() for p in model.parameters())

    palm.save_pretrained(tmp_path / "out", format="huggingface")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(back) is type(model) and back.dtype == torch.float32
    torch.testing.assert_close(back(X).logits, wanted, atol=1e-4, rtol=0)
    found = back.config.to_dict()
    for name, value in model.config.to_dict().items():
        if not name.startswith("_") and name not in ("transformers_version", "architectures"):
            assert found[name] == value, name
    assert back.generation_config.eos_token_id == [2, 3]


@torch.no_grad()
def test_greedy_answers_to_ragged_prompts_agree(model, tmp_path):
    model.save_pretrained(tmp_path)
    palm = PaLM.from_pretrained(tmp_path)
    lengths = torch.tensor([7, 2, 4])
    prompts = [torch.randint(4, TOKENS, (int(n),)) for n in lengths]
    left = torch.stack([torch.cat((torch.zeros(7 - len(p), dtype=torch.long), p)) for p in prompts])
    right = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = torch.arange(7) >= 7 - lengths[:, None]
    how = dict(do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0)
    cached = getattr(model.config, "sliding_window", None) != 1  # transformers' cache keeps nothing of a window of 1
    found = model.generate(left, attention_mask=mask.long(), use_cache=cached, **how)
    answers = palm.generate(7 + 64, right, temperature=0.0, prompt_lengths=lengths)  # shorter prompts get more
    for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        assert answers[row, :64].tolist() == found[row, 7:].tolist()
        alone = palm.generate(int(n) + 64, prompt[None], temperature=0.0)
        assert alone[0].tolist() == found[row, 7:].tolist()


@pytest.mark.parametrize("shape", ["qk-norm, all kv heads", "Cohere2"])
def test_saved_again_the_files_are_the_same(shape, tmp_path):
    model = theirs(shape).bfloat16()
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len([*(tmp_path / "in").glob("*.safetensors")]) > 2
    for i in range(3):
        source = tmp_path / ("in" if i == 0 else f"out{i - 1}")
        PaLM.from_pretrained(source).save_pretrained(tmp_path / f"out{i}", "huggingface", max_shard_size="20KB")
    files = sorted(f.name for f in (tmp_path / "out0").iterdir())
    assert "model.safetensors.index.json" in files
    for name in files:
        first = (tmp_path / "out0" / name).read_bytes()
        assert all((tmp_path / f"out{i}" / name).read_bytes() == first for i in (1, 2)), name
    # what came in went out, bit by bit
    came, went = (
        {name: t for file in (tmp_path / folder).glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in ("in", "out0")
    )
    assert came.keys() == went.keys() and all(torch.equal(came[name], went[name]) for name in came)


@torch.no_grad()
def test_bfloat16_is_within_its_error(tmp_path):
    for i, shape in enumerate(("qk-norm, two kv heads", "Cohere2")):
        model = theirs(shape)
        model.save_pretrained(tmp_path / f"{i}")
        exact, half = model(X).logits, model.bfloat16()(X).logits.float()
        palm = PaLM.from_pretrained(tmp_path / f"{i}", dtype="bfloat16")
        assert palm.token_emb.weight.dtype == torch.bfloat16 and palm.norm.gamma.dtype == torch.float32
        error = (palm(X).float() - exact).abs().mean()
        assert 0 < error < 1.5 * (half - exact).abs().mean()


@torch.no_grad()
def test_with_transformers_4s_spelling(tmp_path):
    """rope_theta and sliding_window_pattern stand where 5 has rope_parameters and layer_types."""
    model = theirs("Cohere2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["layer_types"], config["dtype"]
    config |= dict(rope_theta=5000, rope_scaling=None, sliding_window_pattern=4, torch_dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(PaLM.from_pretrained(tmp_path)(X), model(X).logits, atol=1e-4, rtol=0)
    del config["sliding_window_pattern"]  # 4 is what is meant without it
    assert keywords_of(config)["global_layers"] == [3]
    assert keywords_of(config | {"layer_types": ["full_attention"] * 4})["global_layers"] == [0, 1, 2, 3]


GOOD = dict(
    model_type="cohere",
    vocab_size=8,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    rope_theta=10000.0,
)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'.*only 'silu'"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling=.*without scaling"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}), "rope_parameters=.*without scaling"),
        (dict(rope_parameters={"rope_theta": 1.0, "partial_rotary_factor": 0.5}), "rope_parameters="),
        (dict(rope_theta=None), "rope_theta=None"),
        (dict(rope_theta=0), "rope_theta=0, .*above 0"),
        (dict(layer_norm_eps=float("nan")), "layer_norm_eps=nan"),
        (dict(rope_parameters={"rope_theta": 7.0}), "rope_theta=10000.0, of which rope_parameters says .*7.0"),
        (dict(hidden_size=None), "hidden_size=None.*whole number"),
        (dict(num_attention_heads="2"), "num_attention_heads='2'"),
        (dict(vocab_size=True), "vocab_size=True"),
        (dict(logit_scale=None), "logit_scale=None"),
        (dict(model_type="cohere2", sliding_window=None), "sliding_window=None"),
        (dict(model_type="cohere2", sliding_window=4, layer_types=["chunked"]), "layer_types=\\['chunked'\\]"),
        (dict(model_type="cohere2", sliding_window=4, layer_types=["full_attention"] * 2), "each of the 1 layers"),
        (dict(model_type="cohere2", sliding_window=4, use_qk_norm=True), "use_qk_norm=True"),
    ],
)
def test_configs_that_no_palm_computes_are_refused_by_name(wrong, said):
    assert keywords_of(GOOD)["kv_heads"] == 2
    with pytest.raises(ValueError, match=said) as error:
        keywords_of({**GOOD, **wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keywords, said",
    [
        (dict(), "its positions are xpos"),
        (dict(use_xpos=False, causal=False), "it is an encoder"),
        (dict(use_xpos=False, qk_rmsnorm=True), "it has qk_rmsnorm"),
        (dict(use_xpos=False, qk_layernorm=True, sliding_window=4), "it has both qk_layernorm and sliding_window"),
    ],
)
def test_a_palm_that_is_no_cohere_says_why(make_palm, tmp_path, keywords, said):
    with pytest.raises(ValueError, match=f"because {said}.*format='palm' takes every model"):
        make_palm(**keywords).save_pretrained(tmp_path / "out", "huggingface")
    assert not (tmp_path / "out").exists() and not [*tmp_path.iterdir()]
    make_palm(**keywords).save_pretrained(tmp_path / "out")


@torch.no_grad()
def test_a_palm_of_ours_is_served_by_transformers(make_palm, tmp_path, said):
    x = X % 17
    for i, keywords in enumerate(
        (
            dict(dim_head=6),
            dict(dim_head=8, kv_heads=2, ff_mult=2.5, logit_scale=3),
            dict(dim_head=6, qk_layernorm=True, norm_eps=1e-3, rotary_theta=50),
            dict(dim_head=6, sliding_window=4, global_layers=[1]),
            dict(dim_head=8, sliding_window=4, global_layers=(0,)),
        )
    ):
        palm = make_palm(use_xpos=False, **keywords)
        palm.save_pretrained(tmp_path / f"{i}", "huggingface")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{i}").eval()
        torch.testing.assert_close(back(x).logits, palm(x), atol=1e-4, rtol=0)
        assert (back.config.pad_token_id, back.config.bos_token_id, back.config.eos_token_id) == (None, None, None)
        again = PaLM.from_pretrained(tmp_path / f"{i}")
        torch.testing.assert_close(again(x), palm(x), atol=1e-6, rtol=0)
    assert sum("is not dim" in message for message in said()) == 2
