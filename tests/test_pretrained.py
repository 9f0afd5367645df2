import json
import os
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import shake

from palm_rlhf_pytorch import PaLM, RewardModel
from palm_rlhf_pytorch.checkpoint import CONFIG
from palm_rlhf_pytorch.tokenizer import ByteTokenizer, load_tokenizer

X = torch.tensor([[3, 5, 7, 1, 9, 2, 6]])


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def cohere(make_palm, tmp_path):
    """A directory of a Cohere, of one file."""
    make_palm(use_xpos=False, dim_head=6).save_pretrained(tmp_path / "cohere", "huggingface")
    return tmp_path / "cohere"


@pytest.fixture
def sharded(make_palm, tmp_path):
    make_palm(use_xpos=False, dim_head=6).save_pretrained(tmp_path / "sharded", "huggingface", max_shard_size="5KB")
    return tmp_path / "sharded"


# our own format


@pytest.mark.parametrize(
    "keywords",
    [
        dict(),
        dict(causal=False, qk_rmsnorm=True),
        dict(sliding_window=3, global_layers=[1], kv_heads=2),
        dict(qk_layernorm=True, finetune_scopes={"a": 3, "b": {"lora_r": 2, "lora_alpha": 9, "lora_ff": True}}),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_save_load_save_gives_identical_files(make_palm, tmp_path, keywords, half):
    palm = make_palm(**keywords)
    palm = palm.bfloat16() if half else palm
    palm.save_pretrained(tmp_path / "0")
    for i in range(2):
        again = PaLM.from_pretrained(tmp_path / f"{i}")
        assert same(palm, again) and again.lora_options == palm.lora_options
        assert again.to_logits.weight is again.token_emb.weight
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in palm.parameters()]
        again.save_pretrained(tmp_path / f"{i + 1}")
        assert contents(tmp_path / f"{i + 1}") == contents(tmp_path / "0")
    assert torch.equal(again(X), palm(X))


def test_files_and_runs_are_loaded_too(make_palm, tmp_path):
    palm = make_palm()
    palm.save(tmp_path / "run" / "model.safetensors")
    palm.save(tmp_path / "palm.pt")  # the reference's name for what is safetensors
    (tmp_path / "run" / "config.json").write_text(json.dumps({"command": "sft", "version": "1"}))
    for place in ("run", "run/model.safetensors", "palm.pt"):
        assert same(PaLM.from_pretrained(tmp_path / place), palm)
    with pytest.raises(FileExistsError, match="holds a run of palm-rlhf: choose another directory"):
        palm.save_pretrained(tmp_path / "run")


def test_what_the_constructor_does_not_know_goes_through_a_run(make_palm, cohere, tmp_path):
    palm = PaLM.from_pretrained(cohere)
    palm.pretrained = known = {"max_position_embeddings": 77, "eos_token_id": [1, 2]}
    palm.save(tmp_path / "run" / "model.safetensors")
    for again in (
        PaLM.from_checkpoint(tmp_path / "run" / "model.safetensors"),
        PaLM.from_pretrained(tmp_path / "run"),
        PaLM.from_pretrained(tmp_path / "run").load(tmp_path / "run" / "model.safetensors"),
    ):
        assert again.pretrained == known and same(again, palm)
    again.save_pretrained(tmp_path / "out", "huggingface")
    assert known.items() <= json.loads((tmp_path / "out" / "config.json").read_text()).items()


def test_dtype_and_device(make_palm, tmp_path):
    palm = make_palm(finetune_scopes=["a"])
    palm.save_pretrained(tmp_path)
    half = PaLM.from_pretrained(tmp_path, dtype="bfloat16", device="cpu")
    assert same(half, palm.bfloat16())
    assert {half.token_emb.weight.dtype, half.norm.gamma.dtype} == {torch.bfloat16, torch.float32}
    with pytest.raises(ValueError, match="weights are float32, bfloat16, float16 or float64, got int8"):
        PaLM.from_pretrained(tmp_path, dtype="int8")


def test_keywords_that_no_weight_depends_on_may_be_chosen(make_palm, cohere, tmp_path):
    chosen = dict(gradient_checkpointing=True, attn_dropout=0.25, lora_r=3, lora_alpha=12, lora_ff=True)
    palm = PaLM.from_pretrained(cohere, finetune_scopes=["actor"], **chosen)
    assert {name: palm.config[name] for name in chosen} == chosen
    assert palm.lora_options["actor"].scale == 4 and len(palm.finetune_modules["actor"][0]) == 7
    assert float(palm.finetune_modules["actor"][0][0].A.detach().std()) > 0  # made for real, not on the meta device
    with pytest.raises(ValueError, match="dim cannot be 16: .* it is 24, leave it out"):
        PaLM.from_pretrained(cohere, dim=16)

    old = make_palm(finetune_scopes={"old": 2})
    old.save_pretrained(tmp_path / "own")
    palm = PaLM.from_pretrained(tmp_path / "own", lora_alpha=7, finetune_scopes={"old": 5, "new": 4})
    assert palm.lora_options["old"].r == 2 and palm.lora_options["new"].alpha == 7
    torch.testing.assert_close(palm(X, finetune_scope="old"), old(X, finetune_scope="old"))
    palm.save_pretrained(tmp_path / "both")
    again = PaLM.from_pretrained(tmp_path / "both")
    assert again.lora_options == palm.lora_options and again.lora_options["old"].scale == 1


def test_nothing_draws_random_numbers_or_keeps_gradients(cohere):
    before = torch.get_rng_state()
    palm = PaLM.from_pretrained(cohere)
    assert torch.equal(before, torch.get_rng_state())
    palm(X, return_loss=True).backward()
    assert palm.token_emb.weight.grad is not None and palm.layers[0].fn.norm.gamma.grad is not None


def test_adapters_are_kept_merged_or_said_to_be_left_out(make_palm, tmp_path, said):
    palm = make_palm(use_xpos=False, dim_head=6, finetune_scopes=["a", "b"])
    before = {name: t.clone() for name, t in palm.state_dict().items()}
    palm.save_pretrained(tmp_path / "own", finetune_scope="a")
    palm.save_pretrained(tmp_path / "theirs", "huggingface", finetune_scope="a")
    assert all(torch.equal(t, before[name]) for name, t in palm.state_dict().items())
    for name in ("own", "theirs"):
        merged = PaLM.from_pretrained(tmp_path / name)
        assert not merged.finetune_modules
        torch.testing.assert_close(merged(X), palm(X, finetune_scope="a"))
    assert not said()
    palm.save_pretrained(tmp_path / "bare", "huggingface")
    assert "['a', 'b'] are not in what is written" in said()[0]
    torch.testing.assert_close(PaLM.from_pretrained(tmp_path / "bare")(X), palm(X))


def test_tokenizer_and_special_ids_come_along(make_palm, tmp_path):
    pytest.importorskip("tokenizers")
    palm = make_palm(num_tokens=259, use_xpos=False, dim_head=6)
    for format in ("palm", "huggingface"):
        palm.save_pretrained(tmp_path / format, format, tokenizer=ByteTokenizer())
        config = json.loads((tmp_path / format / "config.json").read_text())
        assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
        again = PaLM.from_pretrained(tmp_path / format)
        assert again.pretrained["eos_token_id"] == 2
    assert isinstance(load_tokenizer(tmp_path / "palm"), ByteTokenizer)
    with pytest.raises(ValueError, match="the tokenizer has 259 tokens, the model only 17"):
        make_palm().save_pretrained(tmp_path / "no", tokenizer=ByteTokenizer())
    assert not (tmp_path / "no").exists()


# writing


def test_fewer_shards_leave_none_of_the_old_and_other_files_stay(make_palm, sharded):
    (sharded / "notes.txt").write_text("mine")
    assert len([*sharded.glob("model-*.safetensors")]) > 2
    palm = make_palm(use_xpos=False, dim_head=6)
    palm.save_pretrained(sharded, "huggingface")
    assert {f.name for f in sharded.iterdir()} == {
        "notes.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    torch.testing.assert_close(PaLM.from_pretrained(sharded)(X), palm(X))
    assert [*sharded.parent.iterdir()] == [sharded]


def test_a_directory_alone_on_its_disk_is_written_to(make_palm, cohere, monkeypatch):
    rename = os.replace

    def within_a_disk(source, target):
        assert str(source).startswith(str(cohere)), "cross-device link"
        rename(source, target)

    monkeypatch.setattr("os.replace", within_a_disk)
    palm = make_palm(use_xpos=False, dim_head=6)
    palm.save_pretrained(cohere, "huggingface")
    assert torch.equal(PaLM.from_pretrained(cohere).token_emb.weight, palm.token_emb.weight)


def test_a_failing_save_changes_nothing(make_palm, cohere, monkeypatch):
    before = contents(cohere)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("palm_rlhf_pytorch.pretrained.write_json", fail)
    for keywords in (dict(format="huggingface"), dict(format="palm")):
        with pytest.raises(OSError, match="no space left"):
            make_palm(use_xpos=False, dim_head=6).save_pretrained(cohere, **keywords)
        assert contents(cohere) == before and [*cohere.parent.iterdir()] == [cohere]


def test_what_is_asked_for_must_be_known(make_palm, tmp_path):
    palm = make_palm(use_xpos=False, dim_head=6, finetune_scopes=["a"])
    for keywords, message in (
        (dict(format="onnx"), r"format is one of \('palm', 'huggingface'\), got 'onnx'"),
        (dict(adapters="both"), "adapters is one of"),
        (dict(adapters="peft", finetune_scope="a"), "adapters='peft' needs format='huggingface'"),
        (dict(adapters="peft", format="huggingface"), "and the finetune_scope to write"),
        (dict(format="huggingface", max_shard_size="many"), "not supported|not in the right format"),
    ):
        with pytest.raises(ValueError, match=message):
            palm.save_pretrained(tmp_path / "out", **keywords)
    with pytest.raises(KeyError, match="there is no finetune scope 'b'"):
        palm.save_pretrained(tmp_path / "out", finetune_scope="b")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        palm.save_pretrained(tmp_path / "file")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_file_of_hugging_faces_and_keywords_of_nothing_are_told(make_palm, cohere):
    for load in (PaLM.from_pretrained, make_palm().load):
        with pytest.raises(ValueError, match="is a file of a Hugging Face model: PaLM.from_pretrained loads the dir"):
            load(cohere / "model.safetensors")
    with pytest.raises(TypeError, match="from_pretrained has no keyword device_map, torch_dtype$"):
        PaLM.from_pretrained(cohere, torch_dtype="bfloat16", device_map="auto")


def test_special_ids_may_stand_in_generation_config_alone(cohere, tmp_path):
    (cohere / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "pad_token_id": 0, "top_k": 7}))
    palm = PaLM.from_pretrained(cohere)
    assert palm.pretrained["eos_token_id"] == [2, 5] and "top_k" not in palm.pretrained
    for file in ("config.json", "generation_config.json"):
        palm.save_pretrained(tmp_path / "again", "huggingface")
        said = json.loads((tmp_path / "again" / file).read_text())
        assert (said["eos_token_id"], said["pad_token_id"]) == ([2, 5], 0)


# the reference's checkpoints


@pytest.mark.parametrize("generation", ["0.2", "0.8"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_references_files_are_told_by_their_shapes_and_gammas(make_palm, tmp_path, said, generation, suffix):
    palm = make_palm(heads=3, ff_mult=2.5, qk_rmsnorm=True, finetune_scopes={"x": 5}, dim_head=10)
    with torch.no_grad():
        for name, p in palm.named_parameters():
            if name.endswith("gamma"):
                p.mul_(0.2)
    state = OrderedDict(
        (name, t + 1 if generation == "0.2" and name.endswith("gamma") else t.clone())
        for name, t in palm.state_dict().items()
    )
    if suffix == ".pt":
        torch.save(state, tmp_path / "palm.pt")
    else:
        save_file(state, tmp_path / "palm.safetensors")
    again = PaLM.from_pretrained(tmp_path / f"palm{suffix}")
    assert f"generation {generation}" in said()[0] and len(said()) == 1
    torch.testing.assert_close(again(X), palm(X), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again(X, finetune_scope="x"), palm(X, finetune_scope="x"), atol=1e-5, rtol=1e-4)
    told = PaLM.from_pretrained(tmp_path / f"palm{suffix}", generation=generation, finetune_scopes=["y"])
    assert len(said()) == 1 and list(told.finetune_modules) == ["x", "y"]
    torch.testing.assert_close(told(X), again(X))
    with pytest.raises(ValueError, match="generation is one of"):
        PaLM.from_pretrained(tmp_path / f"palm{suffix}", generation="0.5")


def test_sizes_of_the_released_checkpoints():
    """palm_150m_8k_v0.pt and the others, on the meta device: the shapes give the sizes."""
    from palm_rlhf_pytorch.sources import sizes_of

    for dim, depth in ((768, 12), (1024, 24), (2048, 16), (2560, 24)):
        with torch.device("meta"):
            state = PaLM(num_tokens=50304, dim=dim, depth=depth, dim_head=128, heads=8).state_dict()
        shapes = {name: tuple(t.shape) for name, t in state.items()}
        for without in ((), ("layers.0.fn.rotary_emb.inv_freq",)):
            found = sizes_of("palm.pt", {k: v for k, v in shapes.items() if k not in without}, {})
            wanted = dict(num_tokens=50304, dim=dim, depth=depth, dim_head=128, heads=8, kv_heads=1)
            assert wanted.items() <= found.items() and found["ff_inner_dim"] == 4 * dim


def test_a_state_dict_of_ours_needs_no_guess(make_palm, tmp_path, said):
    palm = make_palm(kv_heads=2)
    torch.nn.init.constant_(palm.norm.gamma, 1.0)
    torch.save(palm.state_dict(), tmp_path / "palm.pt")
    torch.testing.assert_close(PaLM.from_pretrained(tmp_path / "palm.pt", use_xpos=True)(X), palm(X))
    assert not said()


# what does not fit


def edit(folder, change) -> None:
    """Change the tensors of a directory's one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing: model.layers.1.mlp.up_proj.weight$"),
        (lambda t: t.update(bias=torch.zeros(1)), "left over: bias$"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"of another shape: model.norm.weight \(is \(3,\), should be \(24,\)\)$",
        ),
        (lambda t: t.update({"lm_head.weight": torch.ones(17, 24)}), "keeps lm_head.weight apart from model.embed_tok"),
        (lambda t: t.update({"lm_head.weight": torch.ones(17, 23)}), "lm_head.weight .is .17, 23., should be .17, 24."),
        (
            lambda t: [t.pop(k) for k in [*t] if "layers.0" in k],
            r"missing: model.layers.0\.\S+, \S+, \S+ and 5 more",
        ),
        (
            lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if "embed" in k}),
            r"of another dtype: model.embed_tokens.weight \(torch.int8\)$",
        ),
        (
            lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items() if "1.mlp.up" in k}),
            r"of another dtype: model.layers.1.mlp.up_proj.weight \(torch.float8_e4m3fn\)$",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(cohere, change, said):
    edit(cohere, change)
    with pytest.raises(ValueError, match=said) as error:
        PaLM.from_pretrained(cohere)
    assert "\n" not in str(error.value)


def test_what_is_not_needed_or_repeated_is_fine(cohere):
    palm = PaLM.from_pretrained(cohere)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": palm.token_emb.weight}
    edit(cohere, lambda t: t.update({k: v.detach().clone() for k, v in extra.items()}))
    assert same(PaLM.from_pretrained(cohere), palm)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m, d: m.update({k: "model-00009-of-00009.safetensors" for k in [*m][:1]}), "which is not there"),
        (lambda m, d: m.update({k: "../outside.safetensors" for k in [*m][:1]}), "only .safetensors files beside it"),
        (lambda m, d: m.update({k: f"{d.parent}/outside.safetensors" for k in [*m][:1]}), "only .safetensors files"),
        (lambda m, d: m.update({k: "config.json" for k in [*m][:1]}), "only .safetensors files beside it are read"),
        (lambda m, d: m.update({[*m][0]: m[[*m][-1]]}), "do not agree on where these are: model.embed_tokens.weight$"),
        (lambda m, d: m.pop([*m][0]), "do not agree on where these are: model.embed_tokens.weight$"),
        (lambda m, d: m.update({"more": m[[*m][0]]}), "do not agree on where these are: more$"),
        (lambda m, d: m.update({[*m][0]: 7}), "has no weight_map"),
        (lambda m, d: m.clear(), "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(sharded, change, said):
    assert PaLM.from_pretrained(sharded).dim == 24
    save_file({"model.embed_tokens.weight": torch.zeros(17, 24)}, sharded.parent / "outside.safetensors")
    index = sharded / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    change(whole["weight_map"], sharded)
    index.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=said) as error:
        PaLM.from_pretrained(sharded)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "noted", [dict(dim="x"), dict(dim=None), dict(what=1), dict(finetune_scopes={"a": {"b": 1}}), dict(dim=10**30)]
)
def test_keywords_in_a_file_may_be_anything(make_palm, tmp_path, noted):
    make_palm().save(tmp_path / "palm.safetensors")
    config = make_palm().whole_config | noted
    save_file(load_file(tmp_path / "palm.safetensors"), tmp_path / "palm.safetensors", {CONFIG: json.dumps(config)})
    with pytest.raises(ValueError, match="does not say how its model is made: ") as error:
        PaLM.from_pretrained(tmp_path / "palm.safetensors")
    assert "\n" not in str(error.value)
    config = {"palm": config}
    save_file(load_file(tmp_path / "palm.safetensors"), tmp_path / "palm.safetensors", {CONFIG: json.dumps(config)})
    with pytest.raises(ValueError, match="does not say how its model is made: "):
        RewardModel.from_pretrained(tmp_path / "palm.safetensors")


def test_layers_without_tensors_for_them_are_not_made(make_palm, tmp_path):
    config = make_palm().whole_config | {"depth": 10**9}
    for load, noted in ((PaLM.from_pretrained, config), (RewardModel.from_pretrained, {"palm": config})):
        save_file({"x": torch.zeros(1)}, tmp_path / "palm.safetensors", {CONFIG: json.dumps(noted)})
        with pytest.raises(ValueError, match="says that there are 1000000000 layers, but holds 1 tensors"):
            load(tmp_path / "palm.safetensors")


@pytest.mark.parametrize("noted", ["[]", "7", "{", '"x"', "null"])
def test_metadata_may_be_anything(make_palm, tmp_path, noted):
    save_file(make_palm().norm.state_dict(), tmp_path / "palm.safetensors", {CONFIG: noted})
    for load in (PaLM.from_pretrained, PaLM.from_checkpoint, RewardModel.from_pretrained):
        with pytest.raises(ValueError) as error:
            load(tmp_path / "palm.safetensors")
        assert "\n" not in str(error.value)


def test_sizes_without_the_weights_for_them_take_no_memory(cohere):
    config = json.loads((cohere / "config.json").read_text())
    (cohere / "config.json").write_text(json.dumps(config | {"vocab_size": 10**12}))
    with pytest.raises(ValueError, match=r"embed_tokens.weight \(is \(17, 24\), should be \(1000000000000, 24\)\)"):
        PaLM.from_pretrained(cohere)
    (cohere / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="says that there are 1000000000 layers, but holds 18 tensors"):
        PaLM.from_pretrained(cohere)


def test_a_layer_of_any_number_is_left_over(make_palm, tmp_path):
    state = make_palm().state_dict()
    torch.save({k.replace("layers.1.", f"layers.{10**9}."): t for k, t in state.items()}, tmp_path / "palm.pt")
    with pytest.raises(ValueError, match=r"missing: layers.1\.\S+, .*; left over: layers.1000000000\."):
        PaLM.from_pretrained(tmp_path / "palm.pt")


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    save_file({**load_file(last), **load_file(first)}, last)
    with pytest.raises(ValueError, match="both hold model.embed_tokens.weight: one is too many"):
        PaLM.from_pretrained(sharded)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_corrupt_renamed_and_pickled_files_are_refused_and_nothing_runs(make_palm, cohere, tmp_path):
    trace, palm = tmp_path / "exploded", make_palm()
    weights = cohere / "model.safetensors"
    whole = weights.read_bytes()
    palm.save(tmp_path / "own.safetensors")
    own = (tmp_path / "own.safetensors").read_bytes()
    torch.save(palm.state_dict(), tmp_path / "state.pt")
    pickled = pickle.dumps({"token_emb.weight": Bomb(trace)})
    torch.save({"token_emb.weight": Bomb(trace)}, tmp_path / "bomb.pt")
    header = len(whole) - sum(t.nbytes for t in load_file(weights).values())
    broken = [whole[:n] for n in (0, 5, 8, header // 2, header, header + 1, len(whole) // 2, len(whole) - 1)]
    broken += [whole + b"\0", pickled, (tmp_path / "bomb.pt").read_bytes(), (tmp_path / "state.pt").read_bytes()]
    broken += [(2**62).to_bytes(8, "little") + whole[8:], whole[:8] + b"}" + whole[9:]]
    for data in broken:
        weights.write_bytes(data)
        with pytest.raises(ValueError, match="is not a whole weights file of tensors only") as error:
            PaLM.from_pretrained(cohere)
        assert "\n" not in str(error.value)
    for data in (pickled, (tmp_path / "bomb.pt").read_bytes(), own[: len(own) // 2], own[:7]):
        for name in ("some.pt", "some.safetensors", "some"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(ValueError, match="is not a whole weights file of tensors only") as error:
                PaLM.from_pretrained(tmp_path / name)
            assert "\n" not in str(error.value)
    assert not trace.exists()


def test_a_file_of_torch_with_one_byte_changed_is_refused(make_palm, tmp_path):
    palm, path = make_palm(), tmp_path / "state.pt"
    torch.save(palm.state_dict(), path)
    data = bytearray(path.read_bytes())
    place = data.index(palm.token_emb.weight.detach().numpy().tobytes())
    data[place + 2] ^= 1
    path.write_bytes(data)
    for load in (PaLM.from_pretrained, palm.load):
        with pytest.raises(ValueError, match="another checksum than when it was written"):
            load(path)


def test_directories_of_something_else_say_what_they_are(make_palm, tmp_path):
    def refused(error, said, **config):
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=said) as raised:
            PaLM.from_pretrained(tmp_path)
        assert "\n" not in str(raised.value)

    refused(FileNotFoundError, "does not hold a language model: model.safetensors is missing")
    refused(ValueError, r"holds a model of type 'llama': \['cohere', 'cohere2'\] and our own", model_type="llama")
    good = dict(model_type="cohere", vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    refused(FileNotFoundError, "there is no weights file", **good, intermediate_size=8, rope_theta=1.0)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(FileNotFoundError, r"there is no weights file .*; pickles \(.bin\) are not read")
    refused(ValueError, r"holds a model of type \['cohere'\]", **good | {"model_type": ["cohere"]})
    (tmp_path / "config.json").write_text(json.dumps(good))
    for text, said in (("{", "is not JSON"), ("[1]", "must hold a JSON object, got list"), ("[" * 10**5, "not JSON")):
        (tmp_path / "config.json").write_text(text)
        refused(ValueError, said)
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(ValueError, "holds an adapter: load the model that it belongs to, then palm.load_adapter")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").unlink()
    refused(ValueError, "is not a PaLM's weights: the tensors of its first layer are missing")
    RewardModel(make_palm()).save(tmp_path / "model.safetensors")
    refused(ValueError, "holds a reward model: RewardModel.from_pretrained loads it")
    with pytest.raises(FileNotFoundError, match="there is no file or directory .*no name of a repository"):
        PaLM.from_pretrained(tmp_path / "nothing")


# the reward model


@pytest.mark.parametrize(
    "keywords",
    [dict(num_binned_output=4, bin_values=[1.0, 2.5, 3.0, 9.0]), dict(use_lora=False), dict(num_binned_output=3)],
)
@pytest.mark.parametrize("half", [False, True])
def test_reward_models_come_and_go(make_palm, tmp_path, keywords, half):
    palm = make_palm(num_tokens=259, finetune_scopes=["other"], kv_heads=2)
    model = RewardModel(palm.bfloat16() if half else palm, **keywords).eval()
    shake(model.finetune_parameters())
    mask = torch.tensor([[True, True, False, False, False, False, False]])
    model.save_pretrained(tmp_path / "0", tokenizer=ByteTokenizer())
    for i in range(2):
        again = RewardModel.from_pretrained(tmp_path / f"{i}")
        assert same(model, again) and again.config == model.config and not again.training
        assert torch.equal(again.bin_values, model.bin_values)
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
        assert torch.equal(again.score(X, mask), model.score(X, mask))
        again.save_pretrained(tmp_path / f"{i + 1}", tokenizer=load_tokenizer(tmp_path / "0"))
        assert contents(tmp_path / f"{i + 1}") == contents(tmp_path / "0")
    own = [model.prompt_embed, model.bin_values, *model.to_pred.parameters()]
    assert {t.dtype for t in own} == {torch.float32}
    again = RewardModel.from_pretrained(tmp_path / "0")
    again.save_pretrained(tmp_path / "alone")  # special ids come along without their tokenizer
    for file in ("config.json", "reward.safetensors"):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "0" / file).read_bytes()
    if half:
        return
    assert RewardModel.from_pretrained(tmp_path / "0", dtype="bfloat16").palm.token_emb.weight.dtype == torch.bfloat16
    palm.save(tmp_path / "palm.safetensors")
    with pytest.raises(ValueError, match="does not hold a reward model of ours"):
        RewardModel.from_pretrained(tmp_path / "palm.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no weights file"):
        RewardModel.from_pretrained(tmp_path)
