import math
import signal
import threading
from contextlib import contextmanager
from itertools import count, islice

import pytest
import torch
from tiny import numbers
from torch import nn

from palm_rlhf_pytorch import compilation, supervised
from palm_rlhf_pytorch.devices import accelerator_on
from palm_rlhf_pytorch.metrics import MetricsLog, read_metrics
from palm_rlhf_pytorch.state import load_state
from palm_rlhf_pytorch.supervised import FitOptions, decayed_groups, fit, learning_rate

OPTIONS = FitOptions(steps=10, lr=1e-2, warmup=2, log_every=3, eval_every=5, save_every=4)


def model():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def batches():
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(6, 4, generator=generator)
        yield x, x.sum(dim=-1, keepdim=True)


def squared(module, batch):
    x, y = batch
    return (module(x) - y).square().mean()


def during(step, act):
    """A loss that does something in the given step, counted from 1."""
    steps = count(1)

    def loss(module, batch):
        if next(steps) == step:
            act()
        return squared(module, batch)

    return loss


def assert_same(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


# the schedule and the groups


def test_learning_rate_by_hand():
    options = FitOptions(steps=110, lr=1.0, warmup=10)
    assert [learning_rate(step, options) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    # half a cosine from 1 to 0.1 over the 100 steps that remain
    for step, rate in {10: 1.0, 35: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 60: 0.55, 110: 0.1, 500: 0.1}.items():
        assert learning_rate(step, options) == pytest.approx(rate)
    assert learning_rate(0, FitOptions(steps=5, lr=2.0, warmup=0)) == 2.0
    assert learning_rate(3, FitOptions(steps=2, lr=1.0, warmup=4)) == 1.0


def test_matrices_decay_and_vectors_do_not():
    linear, norm = nn.Linear(2, 3), nn.LayerNorm(3)
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    groups = decayed_groups([*linear.parameters(), *norm.parameters(), frozen], 0.3)
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert [len(g["params"]) for g in groups] == [1, 3] and groups[0]["params"][0] is linear.weight


def test_the_optimizer_gets_rate_and_decay():
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(1.0)
    options = FitOptions(steps=1, lr=0.2, warmup=2, weight_decay=0.5)  # so the first rate is 0.1
    fit(net, lambda m, x: 0.0 * sum(p.sum() for p in m.parameters()), iter([torch.zeros(1)]), options)
    # no gradient: only decay moves anything, w (1 - lr * decay)
    assert net.weight.item() == pytest.approx(0.95) and net.bias.item() == 1.0


# the loop


def test_fit_learns():
    options = FitOptions(steps=300, lr=3e-2, warmup=10, log_every=10, weight_decay=0.0)
    history = fit(nn.Linear(4, 1), squared, batches(), options)
    assert history[-1]["loss"] < 1e-3 < history[0]["loss"]


def test_only_the_given_parameters_are_trained():
    net, before = model(), model()
    fit(net, squared, batches(), OPTIONS, parameters=list(net[2].parameters()))
    assert torch.equal(net[0].weight, before[0].weight) and not torch.equal(net[2].weight, before[2].weight)


def test_gradients_are_clipped():
    def moved(max_norm):
        net = nn.Linear(4, 1)
        before = net.weight.clone()
        fit(net, squared, batches(), FitOptions(steps=1, lr=0.1, max_norm=max_norm, weight_decay=0.0))
        return (net.weight - before).abs().max().item()

    assert moved(1e-20) < 1e-6 < moved(1.0)  # below AdamW's eps nothing moves


def test_metrics_are_written_as_stated(tmp_path):
    modes, losses = [], []
    net = model()

    def loss(module, batch):
        assert module.training
        losses.append(squared(module, batch))
        return losses[-1]

    def evaluate():
        modes.append(net.training)
        return {"held_out_loss": 1.0}

    history = fit(net, loss, batches(), OPTIONS, evaluate=evaluate, log=MetricsLog(tmp_path / "metrics.jsonl"))
    assert read_metrics(tmp_path / "metrics.jsonl") == history
    assert [row["step"] for row in history] == [3, 5, 6, 9, 10]
    assert [row["step"] for row in history if "held_out_loss" in row] == [5, 10]
    assert modes == [False, False] and not net.training
    assert [row["loss"] for row in history if "loss" in row] == pytest.approx(
        [torch.stack(losses[start:end]).mean().item() for start, end in ((0, 3), (3, 6), (6, 9), (9, 10))]
    )
    assert history[0]["lr"] == learning_rate(2, OPTIONS)


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    path, steps = tmp_path / "state.pt", count(1)
    options = FitOptions(steps=10, log_every=2, save_every=2)
    with pytest.raises(ValueError, match="the loss is nan at step 6"):
        fit(model(), lambda m, b: squared(m, b) * (math.nan if next(steps) == 5 else 1), batches(), options,
            checkpoint=path)  # fmt: skip
    assert load_state(path, "supervised")["step"] == 4  # the last good one


def with_numbers():
    """The usual loss with two numbers: the step, and its half, which odd steps do not have."""
    steps = count(1)

    def loss(module, batch):
        step = torch.tensor(float(next(steps)))
        return squared(module, batch), {"whole": step, "half": step / 2 if step % 2 == 0 else torch.tensor(math.nan)}

    return loss


def test_numbers_of_the_loss_are_logged(tmp_path):
    options = FitOptions(steps=7, log_every=3)
    history = fit(model(), with_numbers(), batches(), options, log=MetricsLog(tmp_path / "metrics.jsonl"))
    # means of steps 1 to 3, 4 to 6 and 7; of the even ones 2, then 4 and 6, and none
    assert [row["whole"] for row in history] == [2.0, 5.0, 7.0]
    assert [row.get("half") for row in history] == [1.0, 2.5, None]
    plain = fit(model(), squared, batches(), options)
    assert [row["loss"] for row in history] == [row["loss"] for row in plain]
    assert read_metrics(tmp_path / "metrics.jsonl") == history


def test_numbers_not_yet_logged_are_kept(tmp_path):
    path = tmp_path / "state.pt"
    options = FitOptions(steps=6, log_every=4, save_every=2)

    def run(steps, resume=False):
        steps = iter(steps)  # their numbers; without one it crashes
        return fit(model(), lambda m, b: (squared(m, b), {"whole": torch.tensor(next(steps))}), batches(), options,
                   checkpoint=path, resume=resume)  # fmt: skip

    with pytest.raises(StopIteration):
        run((1.0, 2.0, 3.0))
    assert load_state(path, "supervised")["step"] == 2
    history = run((3.0, 4.0, 5.0, 6.0), resume=True)
    assert [row["whole"] for row in history] == [2.5, 5.5]  # of steps 1 to 4, 5 and 6


# batches that are made ahead


@contextmanager
def at_once(source, prepare):
    """`prefetched` without a thread."""
    yield map(prepare, source)


def test_batches_made_ahead_change_nothing(monkeypatch):
    net, history = uninterrupted()
    state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "prefetched", at_once)
        plain, expected = uninterrupted()
    assert_same(net, plain)
    assert numbers(history) == numbers(expected) and torch.equal(state, torch.get_rng_state())


def test_no_batch_is_taken_that_is_not_learned_from(tmp_path):
    taken = count()
    source = (batch for batch, _ in zip(batches(), taken, strict=False))
    fit(model(), squared, source, OPTIONS, checkpoint=tmp_path / "state.pt")
    assert next(taken) == OPTIONS.steps
    fit(model(), squared, source, OPTIONS, checkpoint=tmp_path / "state.pt", resume=True)  # it is finished
    assert next(taken) == OPTIONS.steps + 1


def test_a_mistake_in_the_batches_ends_it():
    def broken():
        yield from islice(batches(), 3)
        raise Crash

    steps = count()
    with pytest.raises(Crash):
        fit(model(), lambda m, b: 0 * next(steps) + squared(m, b), broken(), OPTIONS)
    assert next(steps) == 3  # what came before was learned from
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


# precision and compiling


def test_reduced_precision_learns_and_weighs_in_float32():
    seen = []

    def loss(module, batch):
        value = squared(module, batch)
        seen.append((torch.is_autocast_enabled("cpu"), module[0](batch[0]).dtype))
        return value

    def evaluate():
        return {"reduced": float(torch.is_autocast_enabled("cpu"))}

    net = model()
    accelerator = accelerator_on(torch.device("cpu"), "bf16")
    history = fit(net, loss, batches(), OPTIONS, evaluate=evaluate, accelerator=accelerator)
    assert seen == [(True, torch.bfloat16)] * 10 and not torch.is_autocast_enabled("cpu")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(math.isfinite(row["loss"]) for row in history if "loss" in row) and history[-1]["reduced"] == 1.0
    accelerator_on(torch.device("cpu"))
    _, expected = uninterrupted()
    assert 0 < abs(history[0]["loss"] - expected[0]["loss"]) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_is_the_plain_one(tmp_path, monkeypatch, said, precision):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    ends = []
    for compile in (True, False):
        torch._dynamo.reset()
        net = model()
        accelerator = accelerator_on(torch.device("cpu"), precision)
        keywords = dict(accelerator=accelerator, compile=compile, checkpoint=tmp_path / "state.pt")
        history = fit(net, squared, batches(), OPTIONS, **keywords)
        ends.append((net, numbers(history), load_state(tmp_path / "state.pt", "supervised")["weights"]))
    (compiled, found, written), (plain, expected, as_written) = ends
    assert_same(compiled, plain)
    assert found == expected and written.keys() == as_written.keys() == plain.state_dict().keys()
    assert [m.split(" in ")[0] for m in said()] == ["compiled the training step"]


@pytest.mark.parametrize("compile, times", [(None, 1), (False, 0)])
def test_a_long_run_is_compiled_on_the_way(monkeypatch, said, compile, times):
    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(compilation, "LONG", 0.0)
    net = model()
    history = fit(net, squared, batches(), OPTIONS, evaluate=lambda: {"held_out": 1.0}, compile=compile)
    plain, expected = uninterrupted()
    assert_same(net, plain)
    assert numbers(history) == numbers(expected) and len(said()) == times


# going on


def uninterrupted():
    net = model()
    return net, fit(net, squared, batches(), OPTIONS, evaluate=lambda: {"held_out": 1.0})


def resumed(path, log=None):
    """Goes on from a checkpoint with a model and a random state that know nothing of the run."""
    torch.manual_seed(999)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    keywords = dict(evaluate=lambda: {"held_out": 1.0}, checkpoint=path, resume=True, log=log)
    return net, fit(net, squared, batches(), OPTIONS, **keywords)


class Crash(Exception):
    pass


def crash():
    raise Crash


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    path, metrics = tmp_path / "state.pt", tmp_path / "metrics.jsonl"
    with pytest.raises(Crash):
        fit(model(), during(7, crash), batches(), OPTIONS, evaluate=lambda: {"held_out": 1.0}, checkpoint=path,
            log=MetricsLog(metrics))  # fmt: skip
    assert load_state(path, "supervised")["step"] == 4
    assert [row["step"] for row in read_metrics(metrics)] == [3, 5, 6]
    net, history = resumed(path, MetricsLog(metrics))
    whole, expected = uninterrupted()
    assert_same(net, whole)
    assert numbers(history) == numbers(expected) == numbers(read_metrics(metrics))


def test_ctrl_c_ends_the_step_and_keeps_it(tmp_path):
    path = tmp_path / "state.pt"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 6; .*state.pt' holds it"):
        fit(model(), during(6, lambda: signal.raise_signal(signal.SIGINT)), batches(), OPTIONS,
            evaluate=lambda: {"held_out": 1.0}, checkpoint=path)  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is before
    assert load_state(path, "supervised")["step"] == 6
    net, history = resumed(path)
    whole, expected = uninterrupted()
    assert_same(net, whole)
    assert numbers(history) == numbers(expected)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(model(), during(2, twice), batches(), OPTIONS, checkpoint=tmp_path / "state.pt")
    assert str(caught.value) == "" and not (tmp_path / "state.pt").exists()


def test_a_finished_run_takes_no_more_steps(tmp_path):
    path = tmp_path / "state.pt"
    net = model()
    fit(net, squared, batches(), OPTIONS, checkpoint=path)
    again = model()
    history = fit(again, during(1, crash), batches(), OPTIONS, checkpoint=path, resume=True)
    assert_same(net, again)
    assert history[-1]["step"] == 10


def test_without_a_checkpoint_resuming_is_starting(tmp_path):
    net, _ = uninterrupted()
    again = model()
    fit(again, squared, batches(), OPTIONS, checkpoint=tmp_path / "state.pt", resume=True)
    assert_same(net, again)


def test_the_state_of_another_model_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "state.pt"
    fit(model(), squared, batches(), OPTIONS, checkpoint=path)
    with pytest.raises(ValueError, match="is of another model") as caught:
        fit(nn.Linear(4, 1), squared, batches(), OPTIONS, checkpoint=path, resume=True)
    assert "\n" not in str(caught.value)
