import json
from pathlib import Path

import huggingface_hub
import pytest
import torch

from palm_rlhf_pytorch import PaLM, RewardModel, hub
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

X = torch.tensor([[3, 5, 7, 1]])


class Api:
    """huggingface_hub.HfApi without a network: what was asked of it, and the files that were uploaded."""

    def __init__(self, **made):
        self.made, self.files = made, {}
        Api.last = self

    def create_repo(self, repo_id, private, exist_ok):
        self.created = (repo_id, private, exist_ok)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, repo_id, folder_path, **how):
        self.uploaded, self.how = repo_id, how
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


@pytest.fixture
def run(tmp_path):
    """A run directory as the command line writes it."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "command": "ppo",
        "version": "9",
        "options": {"model": "/home/me/base", "out": None, "reward": ["a/b", "../me/c"]},
        "fit": {"lr": 1e-4},
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": 1, "reward": 0.1, "kl": 0.02}, {"step": 2, "reward": 0.56789}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "rew')
    return folder


@pytest.mark.parametrize("format", ["palm", "huggingface"])
def test_push_to_hub(make_palm, tmp_path, api, run, format):
    if format == "huggingface":
        pytest.importorskip("tokenizers")
    palm = make_palm(num_tokens=259, use_xpos=False, dim_head=6)
    palm.pretrained = {"base_model": "someone/base"}
    keywords = dict(format=format, tokenizer=ByteTokenizer(), run=run, private=True, token="t", create_pr=True)
    url = palm.push_to_hub("me/mine", **keywords)
    pushed = api.last
    assert url == "https://huggingface.co/me/mine" and pushed.created == ("me/mine", True, True)
    assert pushed.made["token"] == "t" and pushed.uploaded == "me/mine" and pushed.how["create_pr"] is True
    assert {"config.json", "model.safetensors", "README.md", "tokenizer_config.json"} <= {*pushed.files}
    for name, data in pushed.files.items():
        (tmp_path / name).write_bytes(data)
    assert torch.equal(PaLM.from_pretrained(tmp_path)(X), palm(X))

    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == ("transformers" if format == "huggingface" else "palm-rlhf-pytorch")
    assert card.data.base_model == "someone/base" and {"rlhf", "ppo"} <= {*card.data.tags}
    for text in ("# mine", "`palm-rlhf ppo`", "starting from someone/base", "| lr | 0.0001 |", "| reward | 0.5679 |"):
        assert text in card.text
    assert (
        "| kl | 0.02 |" in card.text
        and "| model | base |" in card.text
        and "| reward | a/b, c |" in card.text
        and "/home/me" not in card.text
    )
    snippet = card.text.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert 'from_pretrained("me/mine"' in snippet and ("AutoModel" in snippet) == (format == "huggingface")


def test_a_cards_snippet_runs(make_palm, tmp_path, capsys):
    make_palm(num_tokens=259).save_pretrained(tmp_path, tokenizer=ByteTokenizer())
    exec(make_palm().usage(str(tmp_path)), {})
    assert capsys.readouterr().out


def test_cards_of_adapters_rewards_and_without_a_run(make_palm, tmp_path, api):
    palm = make_palm(use_xpos=False, dim_head=6, finetune_scopes=["a"])
    palm.push_to_hub("me/mine", format="huggingface", finetune_scope="a", adapters="peft")
    assert {*api.last.files} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert (
        b'load_adapter("me/mine"' in api.last.files["README.md"]
        and b"library_name: peft" in api.last.files["README.md"]
    )
    palm.pretrained = {"base_model": "their/base"}
    reward = RewardModel(palm)
    reward.push_to_hub("me/reward")
    assert {*api.last.files} == {"README.md", "reward.safetensors", "config.json"}
    text = api.last.files["README.md"].decode()
    assert "base_model: their/base" in text
    assert "RewardModel.from_pretrained" in text and "## Training" not in text and "Saved by" in text


# fetching


def test_a_name_is_fetched_from_the_hub_without_pickles_or_code(make_palm, tmp_path, monkeypatch):
    make_palm().save_pretrained(tmp_path / "snapshot")
    asked = {}

    def fetch(name, **how):
        asked.update(how, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    palm = PaLM.from_pretrained("someone/model", revision="v1")
    assert (asked["name"], asked["revision"]) == ("someone/model", "v1")
    assert palm.pretrained["base_model"] == "someone/model"
    palm.save_pretrained(tmp_path / "mine")
    assert PaLM.from_pretrained(tmp_path / "mine").pretrained["base_model"] == "someone/model"

    names = "model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json config.json tokenizer.json"
    from fnmatch import fnmatch

    def wanted(name):
        return any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])

    assert all(map(wanted, [*names.split(), "chat_template.jinja", "tokenizer_config.json"]))
    assert not any(map(wanted, ["pytorch_model.bin", "modeling_x.py", "model.pt", "x.pkl", "model.gguf", "a.msgpack"]))


def test_without_a_network_it_is_said_in_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for load in (PaLM.from_pretrained, RewardModel.from_pretrained, hub.located):
        with pytest.raises(FileNotFoundError, match="could not be fetched: check name, network and login") as error:
            load("someone/model")
        assert "\n" not in str(error.value) and "no route to host" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no name of a repository on the hub"):
        hub.located("not/a/repository")
