"""Judging a policy by its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palm_rlhf_pytorch import generation
from palm_rlhf_pytorch.actor import response_log_probs
from palm_rlhf_pytorch.batches import encode_prompt, pad_sequences
from palm_rlhf_pytorch.palm import PaLM, seeded
from palm_rlhf_pytorch.rollout import ends_with_eos
from palm_rlhf_pytorch.tokenizer import Tokenizer


@dataclass(frozen=True)
class Samples:
    """One answer to each prompt: texts, whether each ended with eos, and its KL estimate to a reference (b,)."""

    prompts: list[str]
    responses: list[str]
    finished: list[bool]
    kl: Tensor | None

    @property
    def texts(self) -> list[str]:
        return [prompt + response for prompt, response in zip(self.prompts, self.responses, strict=True)]


def prompt_batch(tokenizer: Tokenizer, prompts: Sequence[str], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Prompts -> ids (b, n) as `encode_prompt` makes them, right padded, and lengths (b,)."""
    ids, mask = pad_sequences([encode_prompt(tokenizer, prompt) for prompt in prompts], tokenizer.pad_id)
    return ids.to(device), mask.sum(dim=-1).to(device)


@torch.no_grad()
def sample(
    palm: PaLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_seq_len: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    reference: PaLM | None = None,
    batch_size: int = 128,
) -> Samples:
    """Answer every prompt once; with a reference also estimate KL(palm || reference) by log-ratios of the samples."""
    palm.eval()
    generator = seeded(seed, palm.device)
    responses, finished, kl = [], [], []
    for start in range(0, len(prompts), batch_size):
        ids, lengths = prompt_batch(tokenizer, prompts[start : start + batch_size], palm.device)
        out = generation.generate(
            palm,
            ids,
            lengths,
            max_seq_len,
            generation.Sampling(temperature),
            tokenizer.pad_id,
            eos_token=tokenizer.eos_ids,
            generator=generator,
        )
        rows = [row[mask] for row, mask in zip(out.sequence, out.response_mask, strict=True)]
        responses += [tokenizer.decode(row) for row in rows]
        finished += ends_with_eos(out.sequence, out.mask, tokenizer.eos_ids).tolist()
        if reference is not None:
            mine, theirs = (
                response_log_probs(model, out.sequence, out.response_mask, temperature).log_probs
                for model in (palm, reference)
            )
            kl.append((mine - theirs).sum(dim=-1).cpu())
    return Samples(list(prompts), responses, finished, torch.cat(kl) if kl else None)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all of them: low where texts repeat. Li et al., 1510.03055, have all words below."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
