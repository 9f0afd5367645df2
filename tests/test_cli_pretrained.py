"""The commands on a tiny random Cohere as transformers saves it, with a tokenizer and a chat template."""

import io
import json
import re
import sys

import pytest
import torch
from chat import BOS, END, EOS, PAD, assistant, chat_tokenizer, transformers_tokenizer, user
from cohere import tiny_cohere

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.cli import generate, main
from palm_rlhf_pytorch.cli.common import open_model, text_reward, with_roles
from palm_rlhf_pytorch.conversation import Conversation, checked_messages
from palm_rlhf_pytorch.data import Demonstration
from palm_rlhf_pytorch.metrics import read_metrics
from palm_rlhf_pytorch.run_directory import RunDirectory
from palm_rlhf_pytorch.tokenizer import ByteTokenizer, HFTokenizer
from palm_rlhf_pytorch.trainer import OnPolicyTrainer

transformers = pytest.importorskip("transformers", reason="needs the [hf] extra")

NOUNS, WORDS = ("soup", "film", "cake"), ("good", "bad", "fine", "grand")
TUNE = "--steps 3 --batch-size 4 --max-len 48 --log-every 1 --eval-every 3 --lora-r 2 --held-out 0.3"
RL = "--updates 2 --rollouts 4 --rollout-batch 4 --max-seq-len 24 --minibatch-size 4 --lora-r 2"


def run(command, **paths):
    return main([word.format(**paths) for word in command.split()])


@torch.no_grad()
def logits(model):
    """Of some ids, by a model of ours or of transformers."""
    found = model(torch.arange(3, 283).view(20, 14))
    return getattr(found, "logits", found)


def new_model(**changes):
    """A random Cohere, whose answers end with <END> or <EOS>."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=288, num_hidden_layers=2, max_position_embeddings=128)
    model = tiny_cohere(**sizes, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=END, **changes)
    model.generation_config.eos_token_id = [END, EOS]
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    where = tmp_path_factory.mktemp("pretrained")
    asked = [(f"how was the {noun}?", f"it was {word}") for noun in NOUNS for word in WORDS]
    tokenizer = transformers_tokenizer([text for pair in asked for text in pair])
    for name, changes in {"cohere": {}, "cohere2": {"sliding_window": 6}}.items():
        new_model(**changes).save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)
    records = {
        "messages": [{"messages": [user(q), assistant(a)]} for q, a in asked],
        "pairs": [{"prompt": [user(q)], "chosen": [assistant(a)], "rejected": [assistant("bad")]} for q, a in asked],
        "rated": [{"messages": [user(q), assistant(a)], "rating": 1 + len(a) % 3} for q, a in asked],
        "prompts": [{"prompt": [user(f"how was the {noun}?")]} for noun in NOUNS],
    }
    for name, rows in records.items():
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "plain.txt").write_text("".join(f"how was the {noun}?\n" for noun in NOUNS))
    (where / "rules.py").write_text(
        "def short(prompts, responses):\n"
        "    assert all(p.messages[0].role == 'user' and p == p.messages[0].content for p in prompts)\n"
        "    return [-float(len(r)) for r in responses]\n"
    )
    paths = {name: where / f"{name}.jsonl" for name in records}
    paths |= {name: where / name for name in ("cohere", "cohere2", "reward")}
    paths |= dict(plain=where / "plain.txt", rules=where / "rules.py")
    command = "reward --data {rated} --model {cohere} --out {reward} --bins 0 --steps 2 --batch-size 4 --lora-r 2"
    assert run(command, **paths) == 0
    return paths


TRAINING = {
    "sft": "sft --data {messages} " + TUNE,
    "dpo": "dpo --data {pairs} " + TUNE,
    "rejection": "rejection --prompts {prompts} --reward {reward} --samples 2 --max-seq-len 24 " + TUNE,
    "ppo": "ppo --prompts {prompts} --reward {reward} " + RL,
    "rl": "rl --prompts {plain} --chat --reward {rules}:short --samples-per-prompt 2 " + RL,
}


@pytest.mark.parametrize("name", TRAINING)
def test_an_imported_model_is_trained_and_opens_in_transformers(files, tmp_path, capsys, name):
    out, exported = tmp_path / "run", tmp_path / "exported"
    assert run(TRAINING[name] + " --model {cohere} --out {out}", **files, out=out) == 0
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in read_metrics(out / "metrics.jsonl"))
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert run("generate --model {out} --prompt hello --max-new-tokens 4 --seed 0", out=out) == 0
    assert run("export --model {out} --out {exported}", out=out, exported=exported) == 0
    assert f"{out} is now in {exported}/" in capsys.readouterr().out

    ours, tokenizer = open_model(str(out), torch.device("cpu"))
    theirs, before = (transformers.AutoModelForCausalLM.from_pretrained(d) for d in (exported, files["cohere"]))
    assert isinstance(theirs, transformers.CohereForCausalLM) and theirs.dtype == torch.float32
    found, learned, start = logits(theirs), logits(ours), logits(before)
    torch.testing.assert_close(found, learned, atol=1e-4, rtol=1e-4)
    assert (found - start).abs().max() > 1e-5  # it learned something
    opened = transformers.AutoTokenizer.from_pretrained(exported)
    messages = [user("how was the soup?")]
    rendered = opened.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<BOS><START><USER>how was the soup?<END><START><BOT>"
    assert opened.encode(rendered, add_special_tokens=False) == tokenizer.encode_chat(checked_messages(messages))
    assert theirs.generation_config.eos_token_id == [4, 2] and tokenizer.eos_ids == (4, 2)


@pytest.mark.parametrize("name", ["ppo", "rl"])
def test_rollouts_end_with_any_eos(files, tmp_path, monkeypatch, name):
    asked = {}

    def stop(self, **keywords):
        asked.update(keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(OnPolicyTrainer, "train", stop)
    assert run(TRAINING[name] + " --model {cohere} --out {out}", **files, out=tmp_path / "run") == 130
    assert asked["eos_token"] == (END, EOS)


def test_adapters_on_a_model_of_the_hub_are_exported_for_peft(files, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="needs peft")
    out, adapter, whole = tmp_path / "run", tmp_path / "adapter", tmp_path / "whole"
    flags = "--lora-alpha 5 --rslora --lora-ff"
    hub = {"us/tiny": files["cohere"]}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **settings: hub[name])
    assert run(f"{TRAINING['ppo']} {flags} --model us/tiny --out {{out}}", **files, out=out) == 0
    assert run("export --adapter peft --model {out} --out {adapter}", out=out, adapter=adapter) == 0
    assert run("export --model {out} --out {whole}", out=out, whole=whole) == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 5.0, True)
    assert config["base_model_name_or_path"] == "us/tiny"
    assert {"q_proj", "down_proj", "gate_proj"} <= set(config["target_modules"])
    base = transformers.AutoModelForCausalLM.from_pretrained(files["cohere"])
    found = logits(peft.PeftModel.from_pretrained(base, adapter).eval())
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(whole))
    torch.testing.assert_close(found, merged, atol=1e-4, rtol=1e-4)


def test_a_run_of_an_imported_model_can_be_resumed_and_gone_on_from(files, tmp_path):
    out = tmp_path / "run"
    assert run(TRAINING["ppo"] + " --model {cohere} --out {out}", **files, out=out) == 0
    assert run("ppo --resume --updates 3 --out {out}", out=out) == 0
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [1, 2, 3]
    notes = json.loads((out / "config.json").read_text())
    assert notes["max_position_embeddings"] == 128 and notes["eos_token_id"] == [4, 2]
    assert run(TRAINING["sft"] + " --model {model} --out {out}", **files, model=out, out=tmp_path / "sft") == 0
    again = RunDirectory(tmp_path / "sft")
    assert isinstance(again.tokenizer(), HFTokenizer) and again.notes()["max_position_embeddings"] == 128
    assert run("export --adapter peft --model {out} --out {x}", out=tmp_path / "sft", x=tmp_path / "x") == 2
    assert not (tmp_path / "x").exists()  # nobody else has the model that these adapters are on


def test_our_own_format_is_exported_and_taken_again(files, tmp_path):
    out = tmp_path / "own"
    assert run("export --model {cohere} --out {out} --format palm --dtype bf16", **files, out=out) == 0
    (ours, tokenizer), whole = open_model(str(out), torch.device("cpu")), PaLM.from_pretrained(files["cohere"])
    assert ours.token_emb.weight.dtype == torch.float32 and (logits(ours) - logits(whole)).abs().max() < 0.1
    assert PaLM.from_pretrained(out).token_emb.weight.dtype == torch.bfloat16
    assert tokenizer.eos_ids == (4, 2) and tokenizer.has_chat
    command = "sft --data {messages} --model {own} --out {out} " + TUNE
    assert run(command, **files, own=out, out=tmp_path / "run") == 0


def test_weights_in_bf16_take_adapters_in_float32(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(TRAINING["ppo"] + " --dtype bf16 --model {cohere} --out {out}", **files, out=out) == 0
    palm = PaLM.from_pretrained(out)
    assert palm.token_emb.weight.dtype == torch.bfloat16 and palm.norm.gamma.dtype == torch.float32
    assert open_model(str(out), torch.device("cpu"))[0].token_emb.weight.dtype == torch.float32
    command = TRAINING["dpo"] + " --dtype bf16 --no-lora --model {cohere} --out {out}"
    assert run(command, **files, out=tmp_path / "whole") == 2
    assert "--no-lora trains the weights themselves, which needs them in float32" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


def test_windows_survive_training(files, tmp_path):
    out, exported = tmp_path / "run", tmp_path / "exported"
    assert run(TRAINING["rl"] + " --model {cohere2} --out {out}", **files, out=out) == 0
    assert run("export --model {out} --out {exported}", out=out, exported=exported) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(theirs, transformers.Cohere2ForCausalLM) and theirs.config.sliding_window == 6
    torch.testing.assert_close(logits(theirs), logits(PaLM.from_pretrained(out)), atol=1e-4, rtol=1e-4)


def test_only_imported_weights_are_made_bf16_unasked_and_only_on_a_gpu(files, bytes_run, monkeypatch):
    asked = []
    monkeypatch.setattr(PaLM, "from_pretrained", lambda place, dtype, device: asked.append(dtype))
    for place in (files["cohere"], bytes_run):
        for device in ("cuda", "cpu"):
            for dtype in ("auto", "fp32", "bf16"):
                open_model(str(place), torch.device(device), dtype)
    fp32, bf16 = torch.float32, torch.bfloat16
    assert asked == [bf16, fp32, bf16, fp32, fp32, bf16, None, fp32, bf16, fp32, fp32, bf16]


# chats


def test_generate_answers_a_user(files, capsys):
    command = "generate --model {cohere} --prompt soup --max-new-tokens 6 --temperature 0"
    assert run(command, **files) == 0
    answer = capsys.readouterr().out
    assert run(command + " --chat", **files) == 0
    assert capsys.readouterr().out == answer
    assert run(command + " --no-chat", **files) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("soup") and not answer.startswith("soup")
    assert run(command + " --system short", **files) == 0
    assert capsys.readouterr().out != answer
    # what was drawn follows the chat template's prompt
    palm, tokenizer = open_model(str(files["cohere"]), torch.device("cpu"))
    prompt = torch.tensor(tokenizer.encode_chat(checked_messages([user("soup")])))
    drawn = palm.generate(len(prompt) + 6, prompt, temperature=0, eos_token=tokenizer.eos_ids)
    assert answer == tokenizer.decode(drawn) + "\n"


def test_a_chat_remembers_with_roles(files, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("soup\nfilm\n"))
    monkeypatch.setattr(generate, "pieces", lambda palm, tokenizer, prompt, options: asked.append(prompt) or ["fine"])
    assert run("generate --model {cohere} --remember", **files) == 0
    assert [m.role for m in asked[1].messages] == ["user", "assistant", "user"]
    assert [m.content for m in asked[1].messages] == ["soup", "fine", "film"]
    assert capsys.readouterr().out == "fine\nfine\n"


def test_prompts_become_messages_where_asked(capsys):
    tokenizer, talk = chat_tokenizer(), Conversation([user("hi")])
    assert with_roles(["a", talk], True, tokenizer) == [Conversation([user("a")]), talk]
    found = with_roles([Demonstration("a", "b"), Demonstration(talk, "c")], False, tokenizer)
    assert [type(item.prompt) for item in found] == [str, str] and found[1] == ("hi", "c")
    assert with_roles(["a", talk], None, tokenizer)[1] is talk
    assert capsys.readouterr().out == ""
    assert not isinstance(with_roles(["a"], None, tokenizer)[0], Conversation)
    assert "with --chat each prompt would be a user's message" in capsys.readouterr().out
    with_roles(["a"], None, ByteTokenizer())
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="no chat template"):
        with_roles([talk], None, ByteTokenizer())
    with pytest.raises(ValueError, match="empty content"):
        with_roles([""], True, tokenizer)


def test_a_reward_sees_roles_where_it_learned_from_them(files, tmp_path):
    command = "reward --data {rated} --no-chat --model {cohere} --out {out} --bins 0 --steps 1 --batch-size 4"
    assert run(command, **files, out=tmp_path / "plain") == 0
    device = torch.device("cpu")
    for places, chat in (([files["reward"]], [True]), ([tmp_path / "plain", files["reward"]], [False, True])):
        reward = text_reward([str(place) for place in places], device, None, 24)
        assert reward.chat == chat and not reward.whole
    assert all(model.palm.num_tokens == 288 for model, _ in reward.members)


# mistakes


@pytest.mark.parametrize(
    "command, message",
    [
        ("sft --data {messages} --model {bytes} --out {nowhere}", "the tokenizer has no chat template"),
        ("ppo --prompts {prompts} --model {cohere} --reward {bytes} --out {nowhere}", "does not hold a reward model"),
        ("rl --prompts {prompts} --model {bytes} --reward {rules}:short --out {nowhere}", "no chat template"),
        ("generate --model {bytes} --prompt a --chat", "the tokenizer has no chat template"),
        ("generate --model {bytes} --prompt a --system b", "--system needs --chat"),
        ("generate --model {cohere}/model.safetensors --prompt a", "model.safetensors' is a file"),
        ("export --model {cohere} --out {cohere}", "is already there: choose another --out"),
        ("export --model {bytes} --out {nowhere}", "its positions are xpos"),
        ("export --model {cohere} --out {nowhere} --adapter peft", "holds no adapter"),
        ("export --model {cohere} --out {nowhere} --adapter peft --format palm", "is of --format huggingface"),
        ("sft --data {wrong} --model {cohere} --out {nowhere}", "does not take these messages"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_one_sentence(files, bytes_run, tmp_path, capsys, command, message):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"messages": [user("refuse me"), assistant("b")]}) + "\n")
    paths = {**files, "bytes": bytes_run, "wrong": wrong, "nowhere": tmp_path / "nowhere"}
    assert run(command, **paths) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"palm-rlhf {command.split()[0]}: .*\n", error) and message in error
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory):
    """A run with a tokenizer of bytes, which has no chat template."""
    where = tmp_path_factory.mktemp("bytes")
    (where / "text.txt").write_text("the soup was good\n" * 4)
    sizes = "--dim 16 --depth 1 --heads 2 --dim-head 8 --seq-len 8 --batch-size 2 --steps 1"
    assert run("pretrain --data {data} --lines --out {out} " + sizes, data=where / "text.txt", out=where / "run") == 0
    return where / "run"


def test_without_a_template_messages_can_be_plain_text(files, bytes_run, tmp_path):
    command = "sft --data {messages} --no-chat --model {model} --out {out} " + TUNE
    assert run(command, **files, model=bytes_run, out=tmp_path / "run") == 0
