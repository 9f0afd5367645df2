import json
import sys

import pytest
import torch
from chat import (
    BOS,
    BOT,
    END,
    EOS,
    PAD,
    START,
    SYSTEM,
    TEMPLATE,
    USER,
    assistant,
    chat_tokenizer,
    system,
    transformers_tokenizer,
    user,
)

from palm_rlhf_pytorch.conversation import checked_messages
from palm_rlhf_pytorch.extras import require
from palm_rlhf_pytorch.files import atomic_path, write_json
from palm_rlhf_pytorch.tokenizer import BPETokenizer, ByteTokenizer, HFTokenizer, load_tokenizer

CORPUS = ["the cat sat on the mat.", "the dog sat on the cat!", "A cat and a dog, 42 times.\n"] * 4
TRICKY = [
    "héllo wörld",
    "😀👩‍👩‍👧 flag 🇩🇪",
    " lead, trail  \t\r\n\n",
    "e\u0301 vs é",
    "\x00\ufeff\u2028",
    "a <eos> <pad> b",
]


def make_bpe() -> BPETokenizer:
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(CORPUS, vocab_size=300)


def make_hf() -> HFTokenizer:
    transformers = pytest.importorskip("transformers")
    tokenizer = make_bpe().tokenizer
    return HFTokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")
    )


@pytest.fixture(params=[ByteTokenizer, make_bpe, make_hf], ids=["byte", "bpe", "hf"])
def tokenizer(request):
    return request.param()


@pytest.mark.parametrize("text", [*CORPUS[:3], *TRICKY])
def test_every_string_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(torch.tensor(ids)) == text
    # Specials written in a text are text: a prompt cannot end a sequence.
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_byte_ids_are_the_bytes_after_three_specials():
    tokenizer = ByteTokenizer()
    assert tokenizer.num_tokens == 259
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.encode("Aé") == [0x41 + 3, 0xC3 + 3, 0xA9 + 3]


def test_invalid_bytes_decode_to_replacement_characters():
    half_of_e_acute = 0xC3 + 3
    assert ByteTokenizer().decode([half_of_e_acute, ord("A") + 3]) == "\ufffdA"
    bpe = make_bpe()
    assert bpe.decode(bpe.encode("é")[:1]) == "\ufffd"


def test_decode_drops_specials_and_unknown_ids_and_stops_at_nothing(tokenizer):
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    ids = [tokenizer.bos_id, *a, tokenizer.eos_id, tokenizer.pad_id, -1, 10**6, *b, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode([]) == ""


def test_decode_refuses_a_batch(tokenizer):
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        tokenizer.decode(torch.zeros(2, 3, dtype=torch.long))


def test_call_pads_on_the_right(tokenizer):
    short, long = tokenizer.encode("q"), tokenizer.encode("q w e r t y")
    ids = tokenizer(["q", "q w e r t y"])
    assert ids.dtype == torch.long and ids.shape == (2, len(long))
    assert ids[0].tolist() == short + [tokenizer.pad_id] * (len(long) - len(short))
    assert ids[1].tolist() == long


@pytest.mark.parametrize(
    ("texts", "error", "says"),
    [
        ([], ValueError, "no texts"),
        (["a", ""], ValueError, r"texts\[1\] is empty"),
        ("abc", TypeError, "one str"),
    ],
)
def test_call_refuses(tokenizer, texts, error, says):
    with pytest.raises(error, match=says):
        tokenizer(texts)


def test_save_and_load(tokenizer, tmp_path):
    directory = tmp_path / "new" / "tokenizer"
    tokenizer.save(directory)
    tokenizer.save(directory)  # over an old one
    loaded = load_tokenizer(directory)
    assert type(loaded) is type(tokenizer)
    for name in ("num_tokens", "pad_id", "bos_id", "eos_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for text in [*CORPUS, *TRICKY]:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert not [file for file in directory.iterdir() if file.name.startswith((".", "tmp"))]


def test_bpe_learns_merges_within_its_size():
    tokenizer = make_bpe()
    assert 259 < tokenizer.num_tokens <= 300
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert tokenizer.encode("cat") == BPETokenizer.train(CORPUS, vocab_size=300).encode("cat")


def test_bpe_lowercase():
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(CORPUS, vocab_size=259, lowercase=True)
    assert tokenizer.decode(tokenizer.encode("Ça VA 😀")) == "ça va 😀"


def test_bpe_train_refuses():
    with pytest.raises(ValueError, match="at least 259.*got 100"):
        BPETokenizer.train(CORPUS, vocab_size=100)
    with pytest.raises(TypeError, match="one str"):
        BPETokenizer.train("one text", vocab_size=300)


def bare_file(path, specials: list[str]):
    """A tokenizer.json as others publish it: no config, their names, padding and truncation switched on."""
    lib = pytest.importorskip("tokenizers")
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    alphabet = lib.pre_tokenizers.ByteLevel.alphabet()
    trainer = lib.trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer=trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))


def test_bare_tokenizer_file_with_neox_names(tmp_path):
    bare_file(tmp_path / "tokenizer.json", ["<|endoftext|>", "<|padding|>"])
    for path in (tmp_path / "tokenizer.json", tmp_path):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (1, 0, 0)
        assert tokenizer.decode(tokenizer.encode("a long text")) == "a long text"
        assert len(tokenizer.encode("a")) == 1


def test_pad_falls_back_to_eos_and_a_missing_eos_is_refused(tmp_path):
    bare_file(tmp_path / "eos.json", ["</s>"])
    assert load_tokenizer(tmp_path / "eos.json").pad_id == 0
    bare_file(tmp_path / "none.json", ["<other>"])
    with pytest.raises(ValueError, match="pass eos_id"):
        load_tokenizer(tmp_path / "none.json")
    assert BPETokenizer.from_file(tmp_path / "none.json", eos_id=0).eos_id == 0


def test_hf_pad_falls_back_to_eos_and_a_missing_eos_is_refused():
    transformers = pytest.importorskip("transformers")
    tokenizer = make_hf()
    assert tokenizer.pad_id == tokenizer.eos_id == 2
    with pytest.raises(ValueError, match="no eos"):
        HFTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=make_bpe().tokenizer))


def test_load_refuses_what_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"kind": "morse"}))
    with pytest.raises(ValueError, match="'morse'.*byte or bpe"):
        load_tokenizer(tmp_path)
    pytest.importorskip("tokenizers")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json is not a readable tokenizer.json"):
        load_tokenizer(tmp_path / "other.json")
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer at .*empty"):
        load_tokenizer(tmp_path / "empty")


def test_missing_extra_names_the_install_command(monkeypatch, tmp_path):
    bare_file(tmp_path / "tokenizer.json", ["<eos>"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # import now fails as if it were not installed
    for needs_it in (
        lambda: BPETokenizer.train(CORPUS, vocab_size=300),
        lambda: load_tokenizer(tmp_path / "tokenizer.json"),
    ):
        with pytest.raises(ImportError, match=r'needs tokenizers.*pip install "palm-rlhf-pytorch\[hf\]"'):
            needs_it()
    with pytest.raises(ImportError, match=r"\[plot\]"):
        require("no_such_module", "plot")
    assert require("json", "plot") is json


def test_atomic_path_replaces_only_on_success(tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".safetensors"
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_write_json_keeps_the_old_file_when_the_value_is_no_json(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"name": "é"})
    with pytest.raises(TypeError):
        write_json(path, {"name": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "é"}
    assert list(tmp_path.iterdir()) == [path]


# chat templates and special ids


def test_a_chat_template_makes_ids():
    tokenizer = chat_tokenizer()
    messages = checked_messages([system("be"), user(" a "), assistant("b"), user("c")])
    a, b, c, be = (tokenizer.encode(text) for text in ("a", "b", "c", "be"))
    turns = [[START, SYSTEM, *be, END], [START, USER, *a, END], [START, BOT, *b, END], [START, USER, *c, END]]
    expected = [BOS, *sum(turns, [])]
    assert tokenizer.has_chat
    assert tokenizer.encode_chat(messages) == [*expected, START, BOT]
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == expected


def test_without_a_template_messages_are_refused(tokenizer):
    assert not tokenizer.has_chat
    with pytest.raises(ValueError, match="no chat template for messages with roles: .* --no-chat"):
        tokenizer.encode_chat(checked_messages([user("a")]))


def test_what_a_template_refuses_is_said():
    with pytest.raises(ValueError, match="chat template does not take these messages: no"):
        chat_tokenizer().encode_chat(checked_messages([user("refuse me")]))


def test_an_answer_may_end_in_several_ways():
    assert ByteTokenizer().eos_ids == (2,)
    tokenizer = chat_tokenizer(eos_ids=[EOS, END])
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (END, (END, EOS))
    also = tokenizer.encode("b")
    ends_with_b = chat_tokenizer(eos_ids=also)
    assert ends_with_b.decode([*tokenizer.encode("a"), *also, END]) == "a"


def test_a_model_s_files_say_its_special_ids(tmp_path):
    transformers_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_ids == (END,)
    write_json(tmp_path / "config.json", {"model_type": "cohere", "eos_token_id": 4, "pad_token_id": 6})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 7]})
    found = load_tokenizer(tmp_path)
    assert found.eos_ids == (END, 2, 7) and found.pad_id == PAD  # the tokenizer's own count first
    found.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.eos_ids, again.pad_id, again.bos_id, again.has_chat) == ((END, 2, 7), PAD, BOS, True)


def test_special_ids_are_numbers(tmp_path):
    transformers_tokenizer().save_pretrained(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, "7"]})
    with pytest.raises(
        ValueError, match=r"generation_config.json says eos_token_id=\[2, '7'\]: expected a whole number"
    ):
        load_tokenizer(tmp_path)


def test_a_model_s_ids_stand_in_for_missing_ones(tmp_path):
    transformers_tokenizer(pad_token=None, bos_token=None, eos_token=None).save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {"eos_token_id": 2, "pad_token_id": 0})
    found = load_tokenizer(tmp_path)
    assert (found.eos_id, found.pad_id, found.bos_id) == (2, 0, 2)


def test_templates_by_name_are_saved(tmp_path):
    templates = {"default": TEMPLATE, "other": "x"}
    tokenizer = chat_tokenizer(chat_template=templates)
    messages = checked_messages([user("a")])
    for _ in range(2):  # over what is there
        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path).encode_chat(messages) == chat_tokenizer().encode_chat(messages)


def test_no_code_beside_a_tokenizer_is_run(tmp_path):
    transformers_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": [None, "evil.Evil"]}
    write_json(tmp_path / "tokenizer_config.json", {**config, "tokenizer_class": "Evil", "auto_map": auto_map})
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    try:
        load_tokenizer(tmp_path)
    except ValueError as error:
        assert "no tokenizer at" in str(error)
