"""Models on the Hugging Face hub: fetched without code or pickles, pushed with a card that says what trained them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from palm_rlhf_pytorch.directories import read_object
from palm_rlhf_pytorch.version import __version__

FETCHED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")  # no .bin, no .py
# how what was pushed is used
USE_OWN = """
from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.hub import located
from palm_rlhf_pytorch.tokenizer import load_tokenizer

palm = PaLM.from_pretrained("{repo_id}")
tokenizer = load_tokenizer(located("{repo_id}"))
prompt = tokenizer(["Once upon a time"])
print(tokenizer.decode(palm.generate(128, prompt, eos_token=tokenizer.eos_ids)[0]))
"""
USE_SERVED = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
prompt = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=128)[0], skip_special_tokens=True))
"""
USE_ADAPTER = """
from palm_rlhf_pytorch import PaLM

palm = PaLM.from_pretrained("{base}")
palm.load_adapter("{repo_id}", "tuned")  # then palm.generate(..., finetune_scope="tuned")
"""
USE_REWARD = """
import torch

from palm_rlhf_pytorch import RewardModel

reward_model = RewardModel.from_pretrained("{repo_id}")
ids = torch.cat((prompt, response))[None]  # token ids of the tokenizer beside it
print(reward_model.score(ids, prompt_mask=torch.arange(ids.shape[1])[None] < len(prompt)))
"""

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
LIBRARY = "palm-rlhf-pytorch"


def located(path_or_repo_id: str | Path, revision: str | None = None) -> Path:
    """A file or directory as it is, or where the hub's repository of this name was fetched to."""
    path = Path(path_or_repo_id)
    if path.exists():
        return path
    name = os.fspath(path_or_repo_id)
    if not REPOSITORY.fullmatch(name):
        raise FileNotFoundError(
            f"there is no file or directory {name!r}, and it is no name of a repository on the hub (owner/name)"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub's own, and those of whichever library carries the bytes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"there is no file or directory {name!r} here, and the hub's repository of this name could not be fetched: "
            f"check name, network and login ({reason})"
        ) from None


def push(directory: Path, repo_id: str, token: str | bool | None, private: bool | None, **upload: Any) -> str:
    """Make the repository if it is not there, and upload all files of a directory in one commit; its address."""
    api = huggingface_hub.HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo.repo_id, folder_path=directory, **upload)
    return str(repo)


class HubMixin:
    """`push_to_hub` for a model with `save_pretrained` and a `usage` to show.

    huggingface_hub's own mixin keeps books of the constructor and knows one format: only `HfApi` and `ModelCard` of
    it are used.
    """

    pipeline = "text-generation"  # what the hub calls the model's task

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | Path | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = f"Weights and card by {LIBRARY}",
        **saving: Any,
    ) -> str:
        """Save as `save_pretrained` does (its keywords: format, tokenizer, ...), with a model card, to owner/name on
        the hub; gives the address. run: the run directory that the card tells of.
        """
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / "model"
            self.save_pretrained(directory, **saving)
            self.model_card(repo_id, run=run, **saving).save(directory / "README.md")
            upload = dict(revision=revision, create_pr=create_pr, commit_message=commit_message)
            return push(directory, repo_id, token, private, **upload)

    def model_card(self, repo_id: str, run: str | Path | None = None, **saving: Any) -> huggingface_hub.ModelCard:
        """What the model is, what trained it, its last metrics and how it is used."""
        origin = self.pretrained.get("base_model")
        opened_by = "peft" if saving.get("adapters") == "peft" else "transformers"
        library = opened_by if saving.get("format") == "huggingface" else LIBRARY
        return model_card(repo_id, self.usage(repo_id, **saving), run, origin, library, self.pipeline)


def model_card(
    repo_id: str,
    usage: str,
    run: str | Path | None = None,
    base_model: str | None = None,
    library: str = LIBRARY,
    pipeline: str = HubMixin.pipeline,
) -> huggingface_hub.ModelCard:
    """A card with what config.json and metrics.jsonl of a run say. library: what loads the model."""
    notes = {} if run is None else read_object(Path(run) / "config.json")
    command = notes.get("command")
    data = huggingface_hub.ModelCardData(
        library_name=library,
        base_model=base_model,
        tags=[LIBRARY, "rlhf", *([command] if command else [])],
        pipeline_tag=pipeline,
    )
    parts = [f"# {repo_id.rpartition('/')[2]}", trained_by(command, notes, base_model)]
    if command:
        parts += ["## Training", table(options_of(notes))]
    metrics = {} if run is None else last_metrics(Path(run) / "metrics.jsonl")
    if metrics:
        parts += ["## Metrics", "At the end of training:", table(metrics)]
    parts += ["## Usage", f"```python\n{usage.strip()}\n```"]
    return huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def trained_by(command: str | None, notes: Mapping[str, Any], base_model: str | None) -> str:
    by = f"`palm-rlhf {command}` of [{LIBRARY}](https://pypi.org/project/{LIBRARY}/) {notes.get('version', '')}".strip()
    start = f", starting from {base_model}" if base_model else ""
    return f"Trained by {by}{start}." if command else f"Saved by {LIBRARY} {__version__}{start}."


def options_of(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The run's options that say something."""
    groups = [group for group in notes.values() if isinstance(group, dict)]
    return {name: public(value) for group in groups for name, value in group.items() if value is not None}


def public(value: Any) -> Any:
    """Of paths the last part, because anyone may read a card; names on the hub (owner/name) whole."""
    if isinstance(value, list | tuple):
        return ", ".join(str(public(one)) for one in value)
    is_path = isinstance(value, str) and os.sep in value and not REPOSITORY.fullmatch(value)
    return Path(value).name if is_path else value


def last_metrics(path: Path) -> dict[str, Any]:
    """The last value of everything that metrics.jsonl counts."""
    found: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # a run that was killed while it wrote
            continue
        found |= {name: value for name, value in row.items() if type(value) in (int, float)}
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found.items()}


def table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])
