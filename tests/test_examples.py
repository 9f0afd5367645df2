import importlib.util
import random
import re
from pathlib import Path

import pytest

from palm_rlhf_pytorch.quickstart import grammar

ROOT = Path(__file__).parent.parent


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("RLHF_NOTEBOOK_SCALE", "0.01")
    notebook = nbformat.read(ROOT / "examples" / "rlhf.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "curves.png").is_file()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert re.search(r"before\s+true rating", printed) and re.search(r"after\s+true rating", printed)


def test_the_real_ratings_script_runs(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("tokenizers")
    rng = random.Random(0)
    rows = [f"{r.rating - 3 + rng.gauss(0, 0.3):.3f}\t{r.text}\n" for r in grammar.corpus(120, seed=0)]
    data = tmp_path / "ratings.tsv"
    data.write_text("rating\ttext\n" + "".join(rows))
    script = load_script(ROOT / "examples" / "movie_reviews.py")
    small = "--dim 16 --depth 1 --heads 2 --dim-head 8"
    result = script.main(
        [
            str(data),
            *("--out", str(tmp_path / "runs"), "--samples", "10"),
            *("--pretrain", f"--tokenizer bpe --vocab-size 300 {small} --steps 3"),
            *(
                "--reward",
                f"--tokenizer bpe {small} --encoder --no-lora --bins 0 --steps 3",
                "--vocabularies",
                "300",
                "320",
            ),
            *("--ppo", "--prompt-words 3 --updates 1 --rollouts 8 --max-seq-len 24"),
        ]
    )
    assert set(result["spearman"]) == {"reward-300", "reward-320", "mean of the reward models", "TF-IDF ridge"}
    assert set(result) >= {"gain_in_deviations", "distinct_2_kept"}
    assert (tmp_path / "runs" / "table.json").is_file()
    assert (tmp_path / "runs" / "ppo" / "model.safetensors").is_file()


def test_the_memory_script_counts_bytes():
    script = load_script(ROOT / "benchmarks" / "readme_example.py")
    # ids 8, two masks 1 + 1, five floats of 4 bytes a token; score 4, finished 1, group 8 a sequence
    assert script.experience_of(10, 7, "cpu").nbytes == 10 * 7 * (8 + 2 + 20) + 10 * (4 + 1 + 8)
    assert script.experience_of(10, 7, "meta").nbytes == script.experience_of(10, 7, "cpu").nbytes


def test_arithmetic_checks_answers_and_runs(tmp_path, monkeypatch, capsys):
    script = load_script(ROOT / "examples" / "arithmetic.py")
    learnt, held_out = script.problems(0)
    assert len(set(learnt) | set(held_out)) == 10_000 and len(held_out) == 1000
    prompts, answers = ["37+85="] * 5, ["122", "123", "22", "1222", ""]
    assert script.correct(prompts, answers) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert script.digits(prompts, answers) == pytest.approx([1.0, 2 / 3, 0.0, 0.0, 0.0])
    monkeypatch.setattr("sys.argv", ["arithmetic.py", "--start", "0", "--updates", "2", "--out", str(tmp_path)])
    script.main()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "report.json"}
    assert "after GRPO" in capsys.readouterr().out
