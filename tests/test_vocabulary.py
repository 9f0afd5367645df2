import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import vocabulary


def test_entropy_by_hand_also_with_impossible_tokens():
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]]).log().requires_grad_()
    entropy = vocabulary.entropy_of(log_probs)
    assert entropy.tolist() == pytest.approx([math.log(2), 0.0, 1.5 * math.log(2)])
    entropy.sum().backward()
    assert log_probs.grad.isfinite().all()


def test_log_softmax_is_float32_and_finite_at_a_gap_of_200():
    logits = torch.tensor([[0.0, 200.0, -200.0]], dtype=torch.bfloat16)
    log_probs = vocabulary.log_softmax(logits)
    assert log_probs.dtype == torch.float32
    assert log_probs.tolist() == [[-200.0, 0.0, -400.0]]
    assert vocabulary.log_softmax(logits, temperature=2.0).tolist() == [[-100.0, 0.0, -200.0]]


def in_chunks(monkeypatch, rows, vocabulary_size):
    monkeypatch.setattr(vocabulary, "LOGITS_PER_CHUNK", vocabulary_size * rows)
    monkeypatch.setattr(vocabulary, "ROWS_PER_CHUNK", 1)


@pytest.mark.parametrize("half, error", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("rows", [4, 99])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_half_precision_weights_have_float32_logits(monkeypatch, rows, scale, half, error):
    """Logits of 40 would be rounded to 1/4 in bfloat16; of the same weights float32 gives the same numbers."""
    embeds, weight = torch.randn(30, 64).to(half), torch.randn(50, 64).mul(2).to(half)
    targets, temperature = torch.randint(0, 50, (30,)), 0.7
    in_chunks(monkeypatch, rows, 50)
    found = {}
    for dtype in (half, torch.float32):
        e, w = (t.to(dtype).requires_grad_() for t in (embeds, weight))
        log_probs, entropy = vocabulary.linear_log_probs(e, w, targets, scale, temperature)
        loss = vocabulary.linear_cross_entropy(e, w, targets, scale)
        alone = vocabulary.target_log_probs(e, w, targets, scale, temperature)
        numbers = log_probs, entropy, loss, alone
        assert all(t.dtype == torch.float32 for t in numbers)
        by_log_probs = torch.autograd.grad((log_probs * torch.arange(30)).sum() + entropy.sum(), (e, w))
        by_loss = torch.autograd.grad(loss, (e, w))
        assert all(g.dtype == dtype for g in (*by_log_probs, *by_loss))
        found[dtype] = numbers, (*by_log_probs, *by_loss)
    (ours, gradients), (exact, exact_gradients) = found.values()
    assert float(exact[0].detach().min()) < -15
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    for a, b in zip(gradients, exact_gradients, strict=True):  # themselves in half precision
        assert (a.float() - b).norm() < 2 * error * b.norm()


def test_half_precision_s_logits_are_those_in_float32_whole():
    embeds, weight = torch.randn(9, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    targets = torch.randint(0, 50, (9,))
    log_probs, entropy = vocabulary.linear_log_probs(embeds, weight, targets)
    exact = (embeds.float() @ weight.float().t()).log_softmax(-1)
    torch.testing.assert_close(log_probs, exact.gather(-1, targets[:, None]).squeeze(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, vocabulary.entropy_of(exact), atol=1e-5, rtol=0)
    expected = F.cross_entropy(embeds.float() @ weight.float().t(), targets, ignore_index=3)
    torch.testing.assert_close(vocabulary.linear_cross_entropy(embeds, weight, targets, ignore_index=3), expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_whole_distributions_of_half_precision_weights_are_float32(half):
    embeds, weight = torch.randn(9, 64).to(half), torch.randn(50, 64).mul(2).to(half)
    ours, exact = (vocabulary.all_log_probs(*(t.to(d) for t in (embeds, weight)), 0.7) for d in (half, torch.float32))
    assert ours.dtype == torch.float32 and float(exact.min()) < -15
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("scale, temperature", [(1.0, 1.0), (0.25, 0.7)])
def test_linear_log_probs_in_chunks_is_the_whole(monkeypatch, scale, temperature):
    embeds, weight = torch.randn(23, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(0, 11, (23,))
    plain = (embeds @ weight.t() * scale / temperature).log_softmax(-1)
    expected = plain[torch.arange(23), targets], -(plain.exp() * plain).sum(-1)
    coefficients = torch.randn(2, 23)
    gradients = torch.autograd.grad(
        sum((c * e).sum() for c, e in zip(coefficients, expected, strict=True)), (embeds, weight)
    )

    widths = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(vocabulary.F, "linear", lambda x, w: widths.append(len(x)) or linear(x, w))
    for limit in (11 * 5, 1, 2**24):  # five rows of 11 logits; never less than one row; all at once
        widths.clear()
        monkeypatch.setattr(vocabulary, "LOGITS_PER_CHUNK", limit)
        monkeypatch.setattr(vocabulary, "ROWS_PER_CHUNK", 1)
        result = vocabulary.linear_log_probs(embeds, weight, targets, scale, temperature)
        assert max(widths) == {55: 5, 1: 1, 2**24: 23}[limit]
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        loss = sum((c * r).sum() for c, r in zip(coefficients, result, strict=True))
        for ours, theirs in zip(torch.autograd.grad(loss, (embeds, weight)), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_linear_log_probs_of_nothing():
    for dtype in (torch.float32, torch.bfloat16):
        embeds, weight = torch.randn(0, 8).to(dtype), torch.randn(5, 8).to(dtype)
        log_probs, entropy = vocabulary.linear_log_probs(embeds, weight, torch.zeros(0, dtype=torch.long))
        assert log_probs.shape == entropy.shape == (0,)


@pytest.mark.parametrize("rows", [5, 1, 23])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_linear_cross_entropy_in_chunks_is_the_whole(monkeypatch, rows, scale):
    embeds, weight = torch.randn(23, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(0, 11, (23,)).masked_fill(torch.rand(23) < 0.3, 7)
    expected = F.cross_entropy(embeds @ weight.t() * scale, targets, ignore_index=7)
    monkeypatch.setattr(vocabulary, "LOGITS_PER_CHUNK", 11 * rows)
    monkeypatch.setattr(vocabulary, "ROWS_PER_CHUNK", 1)
    loss = vocabulary.linear_cross_entropy(embeds, weight, targets, scale, ignore_index=7)
    torch.testing.assert_close(loss, expected)
    theirs = torch.autograd.grad(3 * expected, (embeds, weight))
    for ours, gradient in zip(torch.autograd.grad(3 * loss, (embeds, weight)), theirs, strict=True):
        torch.testing.assert_close(ours, gradient, atol=1e-6, rtol=1e-5)
    if rows < 23:
        with pytest.raises(RuntimeError, match="handed out already"):
            loss = vocabulary.linear_cross_entropy(embeds, weight, targets)
            loss.backward(retain_graph=True)
            loss.backward()


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """A frozen vocabulary has no gradient, and an entropy that nobody uses none either."""
    monkeypatch.setattr(vocabulary, "LOGITS_PER_CHUNK", 11 * 4)
    monkeypatch.setattr(vocabulary, "ROWS_PER_CHUNK", 1)
    embeds, weight = torch.randn(9, 8, requires_grad=True), torch.randn(11, 8)
    targets = torch.randint(0, 11, (9,))
    seen = []
    pair = vocabulary.Gradients.pair
    monkeypatch.setattr(vocabulary.Gradients, "pair", lambda self: seen.append(self.weight) or pair(self))
    log_probs, entropy = vocabulary.linear_log_probs(embeds, weight, targets)
    plain = (embeds @ weight.t()).log_softmax(-1)
    for ours, theirs in ((log_probs, plain[torch.arange(9), targets]), (entropy, vocabulary.entropy_of(plain))):
        (gradient,) = torch.autograd.grad(ours.sum(), embeds, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sum(), embeds, retain_graph=True)[0])
    vocabulary.linear_cross_entropy(embeds, weight, targets).backward()
    assert seen == [None, None, None]


def test_a_loss_without_a_graph_makes_no_gradients(monkeypatch):
    monkeypatch.setattr(vocabulary, "LOGITS_PER_CHUNK", 11 * 4)
    monkeypatch.setattr(vocabulary, "to_gradient_of_logits", lambda *_: pytest.fail("nobody will ask"))
    embeds, weight = (torch.randn(size, 8, requires_grad=True) for size in (9, 11))
    targets = torch.randint(0, 11, (9,))
    with torch.no_grad():
        loss = vocabulary.linear_cross_entropy(embeds, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(embeds @ weight.t(), targets).detach())


def test_chunks_take_part_in_autocast_and_sum_in_float32(monkeypatch):
    monkeypatch.setattr(vocabulary, "LOGITS_PER_CHUNK", 50 * 4)
    monkeypatch.setattr(vocabulary, "ROWS_PER_CHUNK", 1)
    embeds, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (30,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vocabulary.linear_cross_entropy(embeds, weight, targets)
        log_probs, _ = vocabulary.linear_log_probs(embeds, weight, targets)
    exact = F.cross_entropy((embeds.bfloat16() @ weight.bfloat16().t()).float(), targets)
    assert loss.dtype == log_probs.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(-log_probs.mean(), loss)
    whole = F.cross_entropy(embeds @ weight.t(), targets)
    for total in (loss, -log_probs.mean()):
        gradients = torch.autograd.grad(total, (embeds, weight))
        for ours, theirs in zip(
            gradients, torch.autograd.grad(whole, (embeds, weight), retain_graph=True), strict=True
        ):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize("trained", ["all", "embedding", "norm"])
def test_a_tied_vocabulary_has_one_gradient(make_palm, monkeypatch, trained):
    """The loss in chunks, whose gradient waits for the looked-up rows', is the plain loss; ids may come twice."""
    model, ids = make_palm(cross_entropy_ignore_index=3), torch.randint(0, 5, (3, 9))
    parameters = {
        "all": [p for n, p in model.named_parameters()],
        "embedding": [model.token_emb.weight],
        "norm": [model.norm.gamma],
    }[trained]
    logits = model(ids[:, :-1])
    plain = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=3)
    expected = torch.autograd.grad(plain, parameters)
    monkeypatch.setattr(vocabulary, "LOGITS_PER_CHUNK", 17 * 5)
    monkeypatch.setattr(vocabulary, "ROWS_PER_CHUNK", 1)
    loss = model(ids, return_loss=True)
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(2 * loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, 2 * theirs, atol=1e-5, rtol=1e-5)


def test_chunks_go_backward_under_autocast_as_they_went_forward(monkeypatch):
    in_chunks(monkeypatch, 4, 40)
    embeds, weight = torch.randn(9, 64), torch.randn(40, 64, requires_grad=True)
    log_probs, entropy = vocabulary.linear_log_probs(embeds, weight, torch.randint(0, 40, (9,)))
    loss = log_probs.sum() + entropy.sum()
    (plain,) = torch.autograd.grad(loss, weight, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(loss, weight)
    assert inside.equal(plain)


def test_lookup_without_the_loss_has_its_own_gradient():
    weight, ids, tied = torch.randn(7, 4, requires_grad=True), torch.tensor([[1, 1, 6]]), []
    vocabulary.Lookup.apply(ids, weight, tied).sum().backward()
    assert weight.grad[:, 0].tolist() == [0, 2, 0, 0, 0, 0, 1]


CHUNKS = """
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from palm_rlhf_pytorch import vocabulary
from palm_rlhf_pytorch.actor import Predictions
from palm_rlhf_pytorch.algorithms import centering
from palm_rlhf_pytorch.algorithms.score_centering import ScoreCentering
from palm_rlhf_pytorch.freed_memory import keep_freed_memory

def centres(embeds, weight, targets):
    places = Predictions(embeds.requires_grad_(), weight.requires_grad_(), targets, 1.0)
    own = lambda e: (centering.probs(e, weight, 1.0), None)
    centering.centres(places, torch.ones_like, own, embeds.detach()).sum().backward()

def judge(embeds, weight, targets):
    actor = SimpleNamespace(predictions=lambda *_: Predictions(embeds, weight, targets, 1.0))
    mask = torch.ones(1, len(targets), dtype=torch.bool)
    experience = SimpleNamespace(sequence=None, response_mask=mask, with_extra=dict)
    ScoreCentering(topk=64).judge(actor, experience)

keep_freed_memory()
function = {"centres": centres, "judge": judge}.get(sys.argv[1]) or getattr(vocabulary, sys.argv[1])
embeds, weight, targets = torch.randn(8192, 8), torch.randn(20_000, 8), torch.zeros(8192, dtype=torch.long)
function(embeds[:300].clone(), weight, targets[:300])
Path("/proc/self/clear_refs").write_text("5")
function(embeds, weight, targets)
print(Path("/proc/self/status").read_text())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak of memory")
@pytest.mark.parametrize(
    "function, most",
    [("linear_log_probs", 500), ("target_log_probs", 500), ("judge", 500), ("centres", 750)],
)
def test_chunks_take_turns_with_the_same_memory(function, most):
    """Of 40 chunks of 16 MiB few are there at once: peaks of 260 to 360 MB, of `centres` 490 to 530. Where chunks left
    results behind them 890 to 1,480 (once 330) and 2,260 to 2,480.
    """
    run = subprocess.run([sys.executable, "-c", CHUNKS, function], capture_output=True, text=True, check=True)
    peak = next(line for line in run.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < most * 1024  # kB
