"""palm-rlhf export: a run in, a directory that transformers, vLLM and others open out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import DTYPES
from palm_rlhf_pytorch.directories import staged
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.hub import located
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.run_directory import RunDirectory
from palm_rlhf_pytorch.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to write, and where"""

    model: str = required("directory of a run that trained a language model, or any other that --model takes")
    out: str = required("directory to write, which may not be there yet")
    format: str = option(
        "huggingface",
        "huggingface (CohereForCausalLM or Cohere2ForCausalLM, for transformers, vLLM, llama.cpp) or palm, our own",
        choices=("huggingface", "palm"),
    )
    adapter: str = option(
        "merge",
        "merge: whole weights; peft: only what a run trained by adapters on an imported model, for PEFT",
        choices=("merge", "peft"),
    )
    dtype: str = option("auto", "what the weights are written in (auto: as they are kept)", choices=("auto", *DTYPES))
    max_shard_size: str = option("5GB", "largest file of weights")


def run(options: ExportOptions) -> Path:
    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{str(out)!r} is already there: choose another --out")
    if options.adapter == "peft":
        copy_adapter(RunDirectory(options.model), out, options.format)
    else:
        palm = PaLM.from_pretrained(options.model, dtype=DTYPES.get(options.dtype))
        tokenizer = load_tokenizer(located(options.model))
        palm.save_pretrained(out, options.format, tokenizer=tokenizer, max_shard_size=options.max_shard_size)
    print(f"{options.model} is now in {out}/")
    return out


def copy_adapter(run: RunDirectory, out: Path, format: str) -> None:
    if format != "huggingface":
        raise ValueError("--adapter peft is of --format huggingface")
    if not run.adapter.is_dir():
        raise FileNotFoundError(
            f"{str(run.path)!r} holds no adapter: it was not trained by adapters on a model of Hugging Face; "
            "--adapter merge writes the whole model"
        )
    tokenizer = run.tokenizer()
    with staged(out) as staging:
        shutil.copytree(run.adapter, staging, dirs_exist_ok=True)
        tokenizer.save(staging)


OPTIONS = (ExportOptions,)
