"""A tiny tokenizer of transformers with a chat template like Cohere's, and messages to it."""

import pytest

from palm_rlhf_pytorch.tokenizer import HFTokenizer

SPECIALS = ["<PAD>", "<BOS>", "<EOS>", "<START>", "<END>", "<USER>", "<BOT>", "<SYSTEM>"]
PAD, BOS, EOS, START, END, USER, BOT, SYSTEM = range(8)
TEMPLATE = (
    "{% if messages[0]['content'] == 'refuse me' %}{{ raise_exception('no') }}{% endif %}"
    "<BOS>{% for m in messages %}<START>"
    "{{ {'user': '<USER>', 'assistant': '<BOT>', 'system': '<SYSTEM>'}[m['role']] }}{{ m['content'].strip() }}<END>"
    "{% endfor %}{% if add_generation_prompt %}<START><BOT>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def transformers_tokenizer(texts=(), vocab_size=280, chat_template=TEMPLATE, **specials):
    transformers = pytest.importorskip("transformers", reason="needs the [hf] extra")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the [hf] extra")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    specials = {"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<END>", **specials}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **specials)


def chat_tokenizer(eos_ids=(), **keywords) -> HFTokenizer:
    return HFTokenizer(transformers_tokenizer(**keywords), eos_ids)
