import base64
import json
import re

import pytest
import torch

from palm_rlhf_pytorch.cli import main
from palm_rlhf_pytorch.evaluation import Samples
from palm_rlhf_pytorch.quickstart import grammar, run
from palm_rlhf_pytorch.quickstart.report import write_report

TINY = "--corpus-size 300 --rated 200 --pretrain-steps 12 --reward-steps 8 --ppo-updates 1 --samples 12"


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(run, "PALM_SIZES", dict(dim=16, depth=1, heads=2, dim_head=8))


def table_of(text):
    """The numbers under a heading of the terminal's output."""
    return {
        name.strip(): (float(a), float(b))
        for name, a, b in re.findall(r"^(.+?) +([\d.na-]+) +([\d.na-]+)$", text, re.M)
    }


def test_it_runs_through_and_leaves_a_report(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "quickstart"
    assert main(["quickstart", "--out", str(out), *TINY.split()]) == 0
    text = capsys.readouterr().out
    names = (
        "true rating of those (1-5)",
        "accepted by the grammar",
        "distinct-2",
        "finished",
        "KL to the start (nats)",
    )
    table = table_of(text)
    assert set(names) <= set(table) and table["KL to the start (nats)"][0] == 0.0
    assert "spearman" in text and len(re.findall("^  (?:before|after ) ", text, re.M)) == 12

    page = (out / "report.html").read_text()
    for name in names:
        before, after = re.search(
            rf"<td>{re.escape(name)}</td><td class=n>(.+?)</td><td class=n>(.+?)</td>", page
        ).groups()
        assert (f"{table[name][0]:.3f}", f"{table[name][1]:.3f}") == (before, after)
    pictures = re.findall(r"base64,([^']+)'", page)
    assert len(pictures) == 3
    for name, picture in zip(("pretrain", "reward", "ppo"), pictures, strict=True):
        assert base64.b64decode(picture) == (out / name / "curves.png").read_bytes()
        assert json.loads((out / name / "config.json").read_text())["command"] == f"quickstart {name}"
        assert (out / name / "metrics.jsonl").is_file() and (out / name / "tokenizer_config.json").is_file()
    assert (out / "reward" / "reward.safetensors").is_file()

    # what it leaves is a run like any other
    assert main(f"generate --model {out}/ppo --prompt the --max-new-tokens 4 --reward {out}/reward".split()) == 0
    assert re.match(r"\[[\d.-]+\] the", capsys.readouterr().out)


def test_ratings_are_noisy_stars_of_whole_reviews():
    ratings = run.noisy_ratings(run.QuickstartOptions(rated=200))
    assert {r.rating for r in ratings} == {1, 2, 3, 4, 5}
    errors = [r.rating - grammar.rate(r.prompt + r.response) for r in ratings]
    assert 0.4 < sum(abs(e) for e in errors) / 200 < 0.9
    assert all(r.prompt == grammar.opening(r.prompt + r.response) for r in ratings)


def test_the_judge_is_the_grammar(monkeypatch):
    monkeypatch.setattr(run, "TextReward", lambda members: lambda prompts, responses: torch.tensor([1.0, 2.0, 6.0]))
    prompts, responses = ["truly", "the pasta", "the pasta"], [" delicious pasta.", " was bland.", " was fresh."]
    samples = Samples(prompts, responses, [True, True, False], torch.tensor([1.0, 2.0, 6.0]))
    found = run.judge(samples, None, None)
    assert [grammar.rate(text) for text in samples.texts] == [None, 2.2, 3.8]
    assert found["true rating of those (1-5)"] == pytest.approx(3.0)
    assert found["accepted by the grammar"] == pytest.approx(2 / 3) == found["finished"]
    # truly delicious, delicious pasta | the pasta, pasta was, was bland | the pasta, pasta was, was fresh
    assert found["distinct-2"] == 6 / 8 and found["distinct texts"] == 1.0
    assert found["KL to the start (nats)"] == found["reward model's rating"] == 3.0


def test_the_report_escapes_what_a_model_says(tmp_path):
    samples = Samples(["the <b>"], [" & 'soup'"], [True], None)
    table = {"before": {"a": 1.0}, "after": {"a": 2.0}}
    page = write_report(tmp_path / "report.html", table, {"held_out_x": 0.5}, samples, samples, [], {}).read_text()
    assert "<span class=prompt>the &lt;b&gt;</span> &amp; &#x27;soup&#x27;" in page and "<b>" not in page
    assert "<td>x</td><td class=n>0.500</td>" in page


def test_a_second_run_takes_a_directory_of_its_own(tmp_path):
    (tmp_path / "quickstart").mkdir()
    assert run.fresh_directory(tmp_path / "quickstart").name == "quickstart-2"
