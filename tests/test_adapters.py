import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import shake

X = torch.randint(4, 17, (2, 9), generator=torch.Generator().manual_seed(3))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEEDFORWARD = ["gate_proj", "up_proj", "down_proj"]


def cohere_like(make_palm, **keywords):
    return make_palm(**{**dict(use_xpos=False, dim_head=6, kv_heads=2), **keywords})


def with_scope(make_palm, **lora):
    palm = cohere_like(make_palm)
    palm.add_finetune_params("s", 3, **lora)
    shake(palm.finetune_parameters("s"))
    return palm


LORA = [dict(), dict(lora_alpha=7), dict(lora_alpha=5, lora_rslora=True, lora_ff=True)]


@pytest.mark.parametrize("lora", LORA)
def test_an_adapter_comes_back_and_is_written_alike_again(make_palm, tmp_path, lora):
    palm = with_scope(make_palm, **lora)
    palm.save_pretrained(tmp_path / "0", "huggingface", finetune_scope="s", adapters="peft")
    assert sorted(f.name for f in (tmp_path / "0").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    targets = ATTENTION + (FEEDFORWARD if lora.get("lora_ff") else [])
    assert config["target_modules"] == sorted(targets) and config["r"] == 3
    assert config["lora_alpha"] == lora.get("lora_alpha", 3) and config["use_rslora"] == lora.get("lora_rslora", False)

    other = cohere_like(make_palm)
    other.load_state_dict({**palm.state_dict()}, strict=False)
    assert other.load_adapter(tmp_path / "0", "again") is other
    assert torch.equal(other(X, finetune_scope="again"), palm(X, finetune_scope="s"))
    other.save_pretrained(tmp_path / "1", "huggingface", finetune_scope="again", adapters="peft")
    for file in (tmp_path / "0").iterdir():
        assert (tmp_path / "1" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="the finetune scope 'again' is already there"):
        other.load_adapter(tmp_path / "0", "again")


def test_a_base_from_the_hub_is_named(make_palm, tmp_path):
    palm = with_scope(make_palm)
    palm.pretrained = {"base_model": "someone/base"}
    palm.save_pretrained(tmp_path, "huggingface", finetune_scope="s", adapters="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"


def test_in_half_precision_adapters_stay_whole(make_palm, tmp_path):
    palm = with_scope(make_palm).bfloat16()
    palm.save_pretrained(tmp_path, "huggingface", finetune_scope="s", adapters="peft")
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("lora", LORA)
def test_peft_serves_what_was_trained_here(make_palm, tmp_path, lora):
    peft = pytest.importorskip("peft", reason="an independent implementation to compare with: pip install peft")
    transformers = pytest.importorskip("transformers")
    palm = with_scope(make_palm, **lora)
    palm.save_pretrained(tmp_path / "adapter", "huggingface", finetune_scope="s", adapters="peft")
    palm.save_pretrained(tmp_path / "base", "huggingface")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    served = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    wanted = palm(X, finetune_scope="s")
    assert (wanted - palm(X)).abs().max() > 0.1
    torch.testing.assert_close(served(X).logits, wanted, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ATTENTION, ["k_proj", "gate_proj"], ATTENTION + FEEDFORWARD])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_that_peft_made_are_taken_over(make_palm, tmp_path, targets, rslora):
    peft = pytest.importorskip("peft", reason="an independent implementation to compare with: pip install peft")
    transformers = pytest.importorskip("transformers")
    palm = cohere_like(make_palm)
    palm.save_pretrained(tmp_path / "base", "huggingface")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = peft.LoraConfig(r=2, lora_alpha=6, use_rslora=rslora, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config).eval()
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "adapter")
    palm.load_adapter(tmp_path / "adapter")
    assert (theirs(X).logits - palm(X)).abs().max() > 0.1
    torch.testing.assert_close(palm(X, finetune_scope="default"), theirs(X).logits, atol=1e-4, rtol=0)
    assert palm.lora_options["default"].scale == (6 / 2**0.5 if rslora else 3)
    assert len(palm.finetune_modules["default"][0]) == (7 if {*targets} & {*FEEDFORWARD} else 4)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(use_dora=True), "use_dora=True: adapters here are without it"),
        (dict(rank_pattern={"q_proj": 4}), "rank_pattern={'q_proj': 4}"),
        (dict(bias="all"), "bias='all'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save="),
        (dict(peft_type="IA3"), "peft_type='IA3': only 'LORA'"),
        (dict(r=0), "r=0"),
        (dict(r=True), "r=True"),
        (dict(use_rslora="no"), "use_rslora='no'"),
        (dict(r=10**15), r"of another shape: \S+k_proj.lora_A.weight \(is \(3, 24\), should be \(1000000000000000, 24"),
        (dict(lora_alpha="8"), "lora_alpha='8'"),
        (dict(r=4), r"of another shape: \S+k_proj.lora_A.weight \(is \(3, 24\), should be \(4, 24\)\)"),
    ],
)
def test_configs_that_do_not_fit_are_refused_by_name(make_palm, tmp_path, change, said):
    palm = with_scope(make_palm)
    palm.save_pretrained(tmp_path, "huggingface", finetune_scope="s", adapters="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=said) as error:
        palm.load_adapter(tmp_path, "new")
    assert "\n" not in str(error.value) and list(palm.finetune_modules) == ["s"]


def test_tensors_that_do_not_fit_are_refused_by_name(make_palm, tmp_path):
    palm = with_scope(make_palm)
    palm.save_pretrained(tmp_path, "huggingface", finetune_scope="s", adapters="peft")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    one = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

    def refused(changed, said):
        save_file(changed, file)
        with pytest.raises(ValueError, match=said):
            palm.load_adapter(tmp_path, "new")
        assert list(palm.finetune_modules) == ["s"]

    refused({k: t for k, t in tensors.items() if k != one}, f"missing: {one}")
    refused({**tensors, one.replace("layers.1", "layers.7"): tensors[one].clone()}, "left over: .*layers.7")
    refused({**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(3, 3)}, "changes .*lm_head.* may change")
    refused({**tensors, one.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)}, "changes .*magnitude")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is not a whole weights file"):
        palm.load_adapter(tmp_path, "new")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="does not hold a PEFT adapter: adapter_config.json is missing"):
        palm.load_adapter(tmp_path, "new")


def test_a_palm_that_is_no_cohere_says_why(make_palm, tmp_path):
    palm = make_palm(finetune_scopes=["s"])
    with pytest.raises(ValueError, match="its positions are xpos"):
        palm.save_pretrained(tmp_path / "out", "huggingface", finetune_scope="s", adapters="peft")
    with pytest.raises(KeyError, match="there is no finetune scope 'x'"):
        cohere_like(make_palm).save_pretrained(tmp_path / "out", "huggingface", finetune_scope="x", adapters="peft")
    assert not [*tmp_path.iterdir()]
