import pytest
import torch

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.serving import as_served
from palm_rlhf_pytorch.tokenizer import BPETokenizer, ByteTokenizer, HFTokenizer, load_tokenizer

transformers = pytest.importorskip("transformers", reason="tokenizers are saved for transformers: pip install .[hf]")
TEXTS = ["One day a fox ran.", "  two  spaces\n\tand é, 漢字 🦊!", "x"]


def bpe(**how):
    return BPETokenizer.train([*TEXTS, "a fox ran and ran"] * 3, vocab_size=290, **how)


@pytest.mark.parametrize("make", [ByteTokenizer, bpe, lambda: bpe(lowercase=True)])
@pytest.mark.parametrize("format", ["huggingface", "palm"])
def test_transformers_gives_the_same_ids(make_palm, tmp_path, make, format):
    ours = make()
    palm = make_palm(num_tokens=300, use_xpos=False, dim_head=6)
    palm.save_pretrained(tmp_path, format, tokenizer=ours)
    again = load_tokenizer(tmp_path)
    assert (again.pad_id, again.bos_id, again.eos_ids) == (ours.pad_id, ours.bos_id, ours.eos_ids)
    assert again.num_tokens == ours.num_tokens
    for text in TEXTS:
        assert again.encode_start(text) == ours.encode_start(text)
        assert again.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    if format == "huggingface":
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in TEXTS:
            assert theirs.encode(text, add_special_tokens=False) == ours.encode_start(text)
        assert theirs.pad_token_id == 0 and theirs.eos_token_id == 2
        served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        prompt = theirs("One day", return_tensors="pt")
        out = served.generate(**prompt, max_new_tokens=8, do_sample=False)
        mine = palm.generate(len(prompt["input_ids"][0]) + 8, prompt["input_ids"], temperature=0.0, eos_token=2)
        assert out[0, -mine.shape[-1] :].tolist() == mine[0].tolist()


def test_a_tokenizer_of_transformers_is_taken_as_it_is(make_palm, tmp_path):
    theirs = as_served(ByteTokenizer()).tokenizer
    theirs.chat_template = "{{ messages[0].content }}"
    palm = make_palm(num_tokens=300, use_xpos=False, dim_head=6)
    for format in ("palm", "huggingface"):
        palm.save_pretrained(tmp_path / format, format, tokenizer=theirs)
        again = load_tokenizer(tmp_path / format)
        assert isinstance(again, HFTokenizer) and again.has_chat
        assert torch.equal(PaLM.from_pretrained(tmp_path / format).token_emb.weight, palm.token_emb.weight)


def test_several_eos_ids_come_along(make_palm, tmp_path):
    tokenizer = HFTokenizer(as_served(ByteTokenizer()).tokenizer, [2, 7])
    palm = make_palm(num_tokens=300, use_xpos=False, dim_head=6)
    for format in ("palm", "huggingface"):
        palm.save_pretrained(tmp_path / format, format, tokenizer=tokenizer)
        assert load_tokenizer(tmp_path / format).eos_ids == (2, 7)
        assert PaLM.from_pretrained(tmp_path / format).pretrained["eos_token_id"] == [2, 7]
