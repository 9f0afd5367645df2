"""One directory a run: what was asked for, the tokenizer, weights, metrics and curves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from palm_rlhf_pytorch.extras import require
from palm_rlhf_pytorch.files import write_json
from palm_rlhf_pytorch.metrics import MetricsLog
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.plots import plot_curves
from palm_rlhf_pytorch.reward import RewardModel
from palm_rlhf_pytorch.tokenizer import Tokenizer, load_tokenizer
from palm_rlhf_pytorch.version import __version__


def fresh_directory(path: str | Path) -> Path:
    """`path`, or where that is taken, the first of path-2, path-3, ... that is not."""
    path, count = Path(path), 1
    fresh = path
    while fresh.exists():
        count += 1
        fresh = path.with_name(f"{path.name}-{count}")
    return fresh


class RunDirectory:
    """config.json, tokenizer.json, model.safetensors or reward.safetensors, metrics.jsonl, curves.png, state.pt;
    adapter/ where an imported model was trained by adapters.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def weights(self) -> Path:
        return self / "model.safetensors"

    @property
    def reward_weights(self) -> Path:
        return self / "reward.safetensors"

    @property
    def state(self) -> Path:
        return self / "state.pt"

    @property
    def adapter(self) -> Path:
        return self / "adapter"

    @property
    def reference(self) -> Path:
        return self / "reference.safetensors"

    def is_imported(self) -> bool:
        """Whether the directory is no run but a model of Hugging Face."""
        return (self / "config.json").is_file() and "architectures" in self.notes()

    def adapter_of(self, model: str) -> Path | None:
        """Where the adapters that a run trains on `model` are kept as PEFT's: only those on a model of Hugging Face,
        here or on the hub, because PEFT could not find another run's.
        """
        return self.adapter if not Path(model).exists() or RunDirectory(model).is_imported() else None

    def claim(self, resume: bool) -> None:
        """Refuse a directory that another run is in, before any work is done. Gone on with it is only on request."""
        if resume:
            self._need(self / "config.json", "a run to resume")
        elif (self / "config.json").is_file():
            raise FileExistsError(f"{str(self.path)!r} already holds a run: add --resume, or choose another --out")

    def has_state(self) -> bool:
        """Whether there is a checkpoint to go on from; says so where there is none."""
        if not self.state.is_file():
            print(f"{str(self.path)!r} holds no checkpoint yet: starting from the beginning")
        return self.state.is_file()

    def start(self, command: str, resume: bool, tokenizer: Tokenizer, **options: Any) -> MetricsLog:
        """Write the tokenizer and config.json, and open the metrics. When a run is gone on with, changed options are
        said, and written only by `finish`: they may not fit the checkpoint.
        """
        self.claim(resume)
        groups = {name: dataclasses.asdict(value) for name, value in options.items()}
        self.config = {"command": command, "version": __version__, **groups}
        if resume:
            self._say_changes(command, groups)
        else:
            tokenizer.save(self.path)
            write_json(self / "config.json", self.config)
        return MetricsLog(self / "metrics.jsonl")

    def _say_changes(self, command: str, groups: dict[str, dict[str, Any]]) -> None:
        before = self.options(command)
        for name, value in (item for options in groups.values() for item in options.items()):
            if before.get(name) != json.loads(json.dumps(value)):
                print(f"resuming with --{name.replace('_', '-')} {value} (was {before.get(name)})")

    def options(self, command: str) -> dict[str, Any]:
        """All options that a run of this command was started with."""
        config = self.notes("a run to resume")
        if config.get("command") != command:
            raise ValueError(f"{str(self.path)!r} holds a run of {config.get('command')}, not of {command}")
        return {name: value for group in config.values() if isinstance(group, dict) for name, value in group.items()}

    def notes(self, what: str = "a run") -> dict[str, Any]:
        """What config.json says."""
        there = self / "config.json"
        self._need(there, what)
        try:
            return json.loads(there.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(there)!r} is not JSON ({error})") from None

    def tokenizer(self) -> Tokenizer:
        self._need(self / "config.json", "a run")
        return load_tokenizer(self.path)

    def palm(self) -> PaLM:
        self._need(self.weights, "a language model (from pretrain, sft, ppo, ...)")
        return PaLM.from_checkpoint(self.weights).eval()

    def reward_model(self, device: torch.device | str = "cpu") -> RewardModel:
        """In float32, on a GPU in what it was saved in."""
        self._need(self.reward_weights, "a reward model (from reward)")
        dtype = None if torch.device(device).type == "cuda" else torch.float32
        return RewardModel.from_pretrained(self.reward_weights, dtype, device)

    def _need(self, path: Path, what: str) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{str(self.path)!r} does not hold {what}: {path.name} is missing")

    def finish(self, log: MetricsLog, title: str, columns: tuple[str, ...] = ()) -> None:
        """Draw the curves where matplotlib is there, and say where everything lies."""
        write_json(self / "config.json", self.config)
        try:
            require("matplotlib", "plot")
            plot_curves(log.history, self / "curves.png", title, columns)
        except ImportError:
            print('no curves.png was drawn: it needs matplotlib (pip install "palm-rlhf-pytorch[plot]")')
        print(f"{title}: everything is in {self.path}/")
