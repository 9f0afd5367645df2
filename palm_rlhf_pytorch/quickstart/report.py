"""What the quickstart shows: a table on the terminal, and a page with curves and samples."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from palm_rlhf_pytorch.evaluation import Samples
from palm_rlhf_pytorch.files import atomic_path
from palm_rlhf_pytorch.quickstart import grammar

Table = dict[str, dict[str, float]]
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums } th { text-align: left } img { max-width: 100% }
.prompt { color: #888 } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
"""


def print_table(table: Table, held_out: dict[str, float]) -> None:
    """The judgement before and after, and how good the reward model is."""
    print("\nThe reward model on held-out reviews with noisy ratings:")
    for name, value in held_out.items():
        print(f"  {name.removeprefix('held_out_'):<24}{value:8.3f}")
    print(f"\n{'judged by the grammar':<26}{'before':>9}{'after':>9}")
    for name in table["before"]:
        print(f"{name:<26}{table['before'][name]:9.3f}{table['after'][name]:9.3f}")


def print_samples(before: Samples, after: Samples, count: int = 6) -> None:
    """Completions of the same openings, side by side."""
    print("\ntrue stars, then the review (- where the grammar does not accept it)")
    for old, new in list(zip(before.texts, after.texts, strict=True))[:count]:
        print(f"  before {stars(old)}  {old}\n  after  {stars(new)}  {new}\n")


def stars(text: str) -> str:
    rating = grammar.rate(text)
    return " -  " if rating is None else f"{rating:4.2f}"


def sample_cells(prompt: str, response: str) -> str:
    """A sample and its true stars, as cells of a row."""
    text = f"<span class=prompt>{html.escape(prompt)}</span>{html.escape(response)}"
    return f"<td>{text}</td><td class=n>{stars(prompt + response)}</td>"


def write_report(
    path: Path,
    table: Table,
    held_out: dict[str, float],
    before: Samples,
    after: Samples,
    curves: Sequence[Path],
    options: dict,
) -> Path:
    """One self-contained HTML page."""
    rows = [
        f"<tr><td>{html.escape(name)}</td><td class=n>{table['before'][name]:.3f}</td>"
        f"<td class=n>{table['after'][name]:.3f}</td></tr>"
        for name in table["before"]
    ]
    reward = [
        f"<tr><td>{html.escape(name.removeprefix('held_out_'))}</td><td class=n>{value:.3f}</td></tr>"
        for name, value in held_out.items()
    ]
    examples = [
        f"<tr>{sample_cells(prompt, old)}{sample_cells(prompt, new)}</tr>"
        for prompt, old, new in list(zip(before.prompts, before.responses, after.responses, strict=True))[:24]
    ]
    pictures = [
        f"<h2>{html.escape(curve.parent.name)}</h2><img src='data:image/png;base64,"
        f"{base64.b64encode(curve.read_bytes()).decode()}' alt='curves of {html.escape(curve.parent.name)}'>"
        for curve in curves
        if curve.is_file()
    ]
    page = [
        "<!doctype html><meta charset=utf-8><title>palm-rlhf quickstart</title>",
        f"<style>{STYLE}</style><h1>palm-rlhf quickstart</h1>",
        "<p>A byte-level PaLM was pretrained on reviews from a grammar, a reward model learned from noisy star "
        "ratings, and PPO improved the policy. The judge below is the grammar's own true rating, which neither the "
        "reward model nor the policy ever saw.</p>",
        "<table><caption>Samples before and after PPO</caption><tr><th></th><th>before</th><th>after</th></tr>",
        *rows,
        "</table><table><caption>The reward model on held-out reviews</caption>",
        *reward,
        "</table>",
        *pictures,
        "<h2>The same openings, before and after</h2><table><tr><th>before</th><th>stars</th><th>after</th>"
        "<th>stars</th></tr>",
        *examples,
        "</table>",
        f"<p class=prompt>{html.escape(json.dumps(options))}</p>",
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")
    return path
