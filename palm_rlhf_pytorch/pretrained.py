"""`PaLM.from_pretrained` and `save_pretrained`: Cohere's checkpoints, ours, and the reference's, in and out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from palm_rlhf_pytorch import cohere, cohere_config, hub
from palm_rlhf_pytorch.adapters import read_adapter, write_adapter
from palm_rlhf_pytorch.checkpoint import GENERATIONS, PRETRAINED, config_in, noted_in, save_weights
from palm_rlhf_pytorch.directories import WEIGHTS, read_object, staged, write_shards
from palm_rlhf_pytorch.files import write_json
from palm_rlhf_pytorch.hub import LIBRARY, HubMixin, located
from palm_rlhf_pytorch.serving import as_served, of_ours, save_tokenizer, serving_of
from palm_rlhf_pytorch.sources import FREE_LORA, Source, check_depth, chosen, load_into, source_of, state_layout, unmade
from palm_rlhf_pytorch.tensor_files import SafetensorsFiles

if TYPE_CHECKING:
    from palm_rlhf_pytorch.palm import PaLM
    from palm_rlhf_pytorch.reward import RewardModel

logger = logging.getLogger(__name__)

FORMATS, ADAPTERS = ("palm", "huggingface"), ("merge", "peft")
REWARD_WEIGHTS = "reward.safetensors"


def own_lora(palm: PaLM, options: Mapping[str, Any]) -> None:
    """Options for the scopes that will be added; those that are there keep theirs, by number where None would now mean
    another.
    """
    if options.get("lora_alpha") is not None:
        palm.lora_options = {scope: replace(o, alpha=o.alpha or o.r) for scope, o in palm.lora_options.items()}
    palm.config |= options
    palm.lora_r = palm.config["lora_r"]


def check_directory(directory: Path) -> None:
    """A run's config.json says what it was asked for: it is not written over."""
    config = directory / "config.json"
    if directory.is_file():
        raise NotADirectoryError(f"{str(directory)!r} is a file, a directory is needed (or palm.save)")
    if config.is_file() and "command" in read_object(config):
        raise FileExistsError(f"{str(directory)!r} holds a run of palm-rlhf: choose another directory to save to")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is one of {allowed}, got {value!r}")


class PretrainedMixin(HubMixin):
    """What PaLM knows of checkpoints in other formats than its own file."""

    pretrained: Mapping[str, Any] = {}  # what a loaded checkpoint's config.json said beyond the constructor's keywords

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        generation: str | None = None,
        **overrides: Any,
    ) -> PaLM:
        """The model at a path, or in a repository of the Hugging Face hub (owner/name), in eval mode.

        It may be a directory of Cohere or Cohere2 (config.json, safetensors in one or several files), one that
        `save_pretrained` or the command line wrote, a file of `save`, or a checkpoint of the reference, whose sizes are
        told by its shapes. Tensors are read piece by piece onto the device; dtype None is the stored one. overrides are
        keywords of the constructor that no weight depends on: LoRA (`finetune_scopes` that are not in the file are
        added), dropout, ...; for the reference's files any. Raises ValueError in one sentence for what does not fit.
        """
        path = located(path_or_repo_id, revision)
        one_of("generation", generation or GENERATIONS[0], GENERATIONS)
        unknown = overrides.keys() - inspect.signature(cls).parameters
        if unknown:
            raise TypeError(f"from_pretrained has no keyword {', '.join(sorted(unknown))}")
        scopes = overrides.pop("finetune_scopes", ())
        source = source_of(path, generation, overrides)
        keywords = chosen(source, overrides)
        check_depth(path, keywords.get("depth"), source.tensors)
        palm = unmade(path, lambda: cls(**keywords))
        load_into(palm, source, dtype, device)
        own_lora(palm, {name: overrides[name] for name in FREE_LORA if name in overrides})
        for scope, r in (scopes if isinstance(scopes, dict) else dict.fromkeys(scopes)).items():
            if scope not in palm.finetune_modules:
                palm.add_finetune_params(scope, **(r if isinstance(r, dict) else {"lora_r": r}))
        origin = {} if Path(path_or_repo_id).exists() else {"base_model": str(path_or_repo_id)}
        palm.pretrained = source.serving | origin
        return palm.eval()

    def load_adapter(self, directory: str | Path, scope: str = "default", revision: str | None = None) -> PaLM:
        """Add a LoRA scope with the adapters of PEFT in a directory or a repository of the hub."""
        read_adapter(self, located(directory, revision), scope)
        return self

    def save_pretrained(
        self,
        directory: str | Path,
        format: str = "palm",
        *,
        tokenizer: Any = None,
        finetune_scope: str | None = None,
        adapters: str = "merge",
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write a directory that `from_pretrained` reads; none of it is in place before all is written.

        format "palm" takes every model; "huggingface" is CohereForCausalLM, or Cohere2ForCausalLM where there is a
        sliding window, as transformers, vLLM and others serve it. finetune_scope: these adapters become part of the
        weights written, or with adapters="peft" are what is written, alone. Without it, "palm" keeps all adapters
        apart and "huggingface" leaves them out. tokenizer: one of ours or of transformers, saved too.
        """
        one_of("format", format, FORMATS)
        one_of("adapters", adapters, ADAPTERS)
        directory = Path(directory)
        check_directory(directory)
        tokenizer = of_ours(tokenizer) if format == "palm" else as_served(of_ours(tokenizer))
        serving = serving_of(self, tokenizer)
        if adapters == "peft":
            if format != "huggingface" or finetune_scope is None:
                raise ValueError("adapters='peft' needs format='huggingface' and the finetune_scope to write")
            cohere_config.refuse_what_is_in_the_way(self)
            with staged(directory) as staging:
                save_tokenizer(tokenizer, staging)
                write_adapter(self, finetune_scope, staging, serving.get("base_model"))
            return
        write = self._write_own if format == "palm" else self._write_huggingface
        with staged(directory) as staging, self.merged(finetune_scope):
            save_tokenizer(tokenizer, staging)
            write(staging, serving, finetune_scope, max_shard_size)

    def _write_own(self, staging: Path, serving: dict[str, Any], merged: str | None, _: Any) -> None:
        config, state = self.whole_config, self.state_dict()
        if merged is not None:
            config["finetune_scopes"] = {}
            state = {name: t for name, t in state.items() if not name.startswith("finetune_modules.")}
        save_weights(staging / WEIGHTS, state, config, serving)
        write_json(staging / "config.json", {"model_type": LIBRARY, **serving, "palm": config})

    def _write_huggingface(self, staging: Path, serving: dict[str, Any], merged: str | None, size: int | str) -> None:
        config = cohere_config.config_of(self, serving)
        if merged is None and len(self.finetune_modules):
            logger.warning(
                "The adapters %s are not in what is written: name one as finetune_scope.", [*self.finetune_modules]
            )
        write_shards(staging, cohere.layout(self)[0], self.token_emb.weight.dtype, size)
        write_json(staging / "config.json", config)
        ids = {name: serving[name] for name in serving if name.endswith("_token_id")}
        write_json(staging / "generation_config.json", ids)

    def usage(self, repo_id: str, **saving: Any) -> str:
        """How what `save_pretrained(**saving)` wrote is used."""
        if saving.get("adapters") == "peft":
            base = self.pretrained.get("base_model", "the model it was trained on")
            return hub.USE_ADAPTER.format(repo_id=repo_id, base=base)
        if saving.get("format") == "huggingface":
            return hub.USE_SERVED.format(repo_id=repo_id)
        return hub.USE_OWN.format(repo_id=repo_id)


class PretrainedReward(HubMixin):
    """The same for a RewardModel, in our format alone: what serves language models has no place for its head."""

    pipeline = "text-classification"

    @property
    def pretrained(self) -> Mapping[str, Any]:
        return self.palm.pretrained

    @pretrained.setter
    def pretrained(self, said: Mapping[str, Any]) -> None:
        self.palm.pretrained = said

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
    ) -> RewardModel:
        """The model in a file of `save`, a directory of `save_pretrained` or of a run, or a repository on the hub, in
        eval mode. dtype None is the stored one.
        """
        from palm_rlhf_pytorch.palm import PaLM  # which imports this file

        path = located(path_or_repo_id, revision)
        path = path / REWARD_WEIGHTS if path.is_dir() else path
        tensors = SafetensorsFiles([path])
        keywords = config_in(path, tensors.metadata) or {}
        if "palm" not in keywords:
            raise ValueError(f"{str(path)!r} does not hold a reward model of ours (see RewardModel.load for others)")
        palm = keywords.pop("palm")
        check_depth(path, palm.get("depth") if isinstance(palm, dict) else None, tensors)
        model = unmade(path, lambda: cls(PaLM(**palm), **keywords))
        load_into(model, Source(path, keywords, tensors, state_layout), dtype, device)
        bins = keywords.get("bin_values")
        values = torch.arange(len(model.bin_values)) if bins is None else torch.tensor(bins)
        model.bin_values.copy_(values)  # the one buffer that no file holds
        model.pretrained = (noted_in(path, tensors.metadata) or {}).get(PRETRAINED, {})
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, tokenizer: Any = None) -> None:
        """Write a directory that `from_pretrained` reads; none of it is in place before all is written."""
        check_directory(Path(directory))
        tokenizer = of_ours(tokenizer)
        with staged(directory) as staging:
            save_tokenizer(tokenizer, staging)
            config, serving = self.whole_config, serving_of(self.palm, tokenizer)
            save_weights(staging / REWARD_WEIGHTS, self.state_dict(), config, serving)
            write_json(staging / "config.json", {"model_type": f"{LIBRARY}-reward", **serving, "reward": config})

    def usage(self, repo_id: str, **saving: Any) -> str:
        return hub.USE_REWARD.format(repo_id=repo_id)
