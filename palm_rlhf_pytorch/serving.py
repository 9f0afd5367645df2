"""What serves a model beside its weights: the tokenizer in transformers' format, special ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from palm_rlhf_pytorch.extras import require
from palm_rlhf_pytorch.tokenizer import SPECIALS, BPETokenizer, ByteTokenizer, HFTokenizer, Tokenizer

if TYPE_CHECKING:
    from palm_rlhf_pytorch.palm import PaLM


def serving_of(palm: PaLM, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What serving a model needs beside its keywords: special ids, of the tokenizer where there is one, and so on."""
    serving = dict(palm.pretrained)
    if tokenizer is not None:
        if tokenizer.num_tokens > palm.num_tokens:
            raise ValueError(f"the tokenizer has {tokenizer.num_tokens} tokens, the model only {palm.num_tokens}")
        eos = list(tokenizer.eos_ids)
        serving |= {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "pad_token_id": tokenizer.pad_id,
        }
    return serving


def of_ours(tokenizer: Any) -> Tokenizer | None:
    """A tokenizer of transformers as one of ours."""
    return tokenizer if tokenizer is None or isinstance(tokenizer, Tokenizer) else HFTokenizer(tokenizer)


def save_tokenizer(tokenizer: Tokenizer | None, directory: Path) -> None:
    if tokenizer is not None:
        tokenizer.save(directory)


def as_served(tokenizer: Tokenizer | None) -> Tokenizer | None:
    """A tokenizer that transformers can load and that gives the same ids; of a whole text, as at the start of one."""
    if not isinstance(tokenizer, BPETokenizer | ByteTokenizer):
        return tokenizer
    lib, how = require("tokenizers", "hf"), {"model_input_names": ["input_ids", "attention_mask"]}
    if isinstance(tokenizer, ByteTokenizer):
        vocab = {token: i for i, token in enumerate((*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))))}
        made = lib.Tokenizer(lib.models.BPE(vocab, [], byte_fallback=True))  # no character is known, so all fall back
        made.decoder = lib.decoders.Sequence([lib.decoders.ByteFallback(), lib.decoders.Fuse()])
    else:
        made = lib.Tokenizer.from_str(tokenizer.tokenizer.to_str())
        if tokenizer.space_first:
            made.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=True)
            how["add_prefix_space"] = True
    how |= {f"{name}_token": made.id_to_token(getattr(tokenizer, f"{name}_id")) for name in ("pad", "bos", "eos")}
    return HFTokenizer(require("transformers", "hf").PreTrainedTokenizerFast(tokenizer_object=made, **how))
