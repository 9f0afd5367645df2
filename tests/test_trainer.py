import math
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, on_main_process
from tiny import (
    EOS,
    PROMPTS,
    ROLL,
    TRAIN,
    count_even,
    shake,
    tiny_actor_critic,
    tiny_palm,
    tiny_trainer,
)

from palm_rlhf_pytorch import ActorCritic, RewardModel, ops
from palm_rlhf_pytorch.metrics import read_metrics
from palm_rlhf_pytorch.trainer import JUDGED, Learner

TIMINGS = ("tokens_per_second", "rollout_seconds", "learn_seconds")


def untimed(history):
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in history]


def weights(trainer):
    parts = [trainer.learner.state_dict(), trainer.actor_critic.reference_palm.state_dict()]
    return [t.clone() for part in parts for t in part.values()]


def assert_same(one, two):
    for a, b in zip(weights(one), weights(two), strict=True):
        assert torch.equal(a, b)


# the loop


def test_train_counts_prompts_and_updates():
    sizes, seen = [], []

    def reward(prompts, responses):
        sizes.append(len(prompts))
        return count_even(prompts, responses)

    trainer = tiny_trainer(reward_model=reward)
    result = trainer.train(4, 5, update_timesteps=8, max_batch_size=3, max_seq_len=9, on_update=seen.append)
    assert result is trainer and sizes == [3, 3, 2, 3, 3, 2, 3, 1]  # 20 prompts: 8, 8, and the 4 that are left
    assert [row["prompts"] for row in seen] == [8, 16, 20] and [row["step"] for row in seen] == [1, 2, 3]
    assert seen == trainer.history and trainer.step == 3
    trainer.train(1, 4, update_timesteps=4, max_seq_len=9)
    assert trainer.step == 4 and trainer.history[-1]["prompts"] == 4


def test_every_update_reports():
    row = tiny_trainer().train(8, **TRAIN).history[0]
    assert set(row) == {
        "step",
        "prompts",
        "reward",
        "reward_std",
        "kl",
        "entropy",
        "clip_fraction",
        "approx_kl",
        "policy_loss",
        "value_loss",
        "explained_variance",
        "response_length",
        "finished",
        "grad_norm_actor",
        "grad_norm_critic",
        *TIMINGS,
    }
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in row.values())
    assert row["grad_norm_actor"] > 0 and row["rollout_seconds"] > 0 and row["learn_seconds"] > 0


def test_metrics_describe_the_rollouts():
    trainer = tiny_trainer()
    e = trainer.algorithm.target(trainer.roll_out(8, 4, ROLL))
    row = trainer.learn(e)
    assert row["reward"] == pytest.approx(e.scores.mean().item())
    assert row["reward_std"] == pytest.approx(e.scores.std(correction=0).item())
    assert row["response_length"] == pytest.approx(e.lengths.float().mean().item())
    assert row["finished"] == pytest.approx(e.finished.float().mean().item())
    # values are 0 before the first step, so what they leave unexplained is all
    assert row["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    error = replace(e, values=e.returns)
    shaken = tiny_trainer(actor_critic=tiny_actor_critic())
    judged = shaken.algorithm.target(error)
    residual = (judged.returns - judged.values)[judged.response_mask]
    expected = 1 - residual.var(correction=0) / judged.returns[judged.response_mask].var(correction=0)
    assert shaken.learn(error)["explained_variance"] == pytest.approx(expected.item(), abs=1e-5)


def test_equal_returns_have_nothing_to_explain():
    trainer = tiny_trainer(reward_model=lambda p, r: [1.0] * len(p), kl_div_loss_weight=0.0, gae_lambda=1.0)
    assert trainer.train(8, **TRAIN).history[0]["explained_variance"] == 0.0


def test_eval_and_train_switch_modes_and_nothing_else():
    trainer = tiny_trainer(reward_model=lambda p, r: pytest.fail("a training run has started"))
    for mode in (False, True, False):
        assert trainer.train(mode) is trainer
        assert trainer.learner.training is trainer.palm.training is mode
    trainer.train(True)
    assert trainer.eval() is trainer and not trainer.palm.training
    assert trainer.history == [] and trainer.step == 0


@pytest.mark.parametrize("wrong", [{"update_timesteps": 0}, {"max_batch_size": 0}, {"temperature": 0.0}])
def test_train_refuses_what_cannot_run(wrong):
    with pytest.raises(ValueError, match="got|0"):
        tiny_trainer().train(8, **{**TRAIN, **wrong})


def test_a_reward_model_of_fewer_tokens_is_refused():
    with pytest.raises(ValueError, match="the reward model knows 5 tokens, but the policy writes 11"):
        tiny_trainer(reward_model=RewardModel(tiny_palm(num_tokens=5)))


def test_a_reward_model_trains_a_policy():
    reward = RewardModel(tiny_palm(3, causal=False), num_binned_output=5)
    shake(reward.finetune_parameters())
    before = [p.clone() for p in reward.parameters()]
    trainer = tiny_trainer(reward_model=reward).train(16, **TRAIN)
    assert len(trainer.history) == 2 and 0 < trainer.history[0]["reward"] < 4
    assert all(torch.equal(p, q) for p, q in zip(before, reward.parameters(), strict=True))


def test_seeds_reproduce():
    one, two, other = (tiny_trainer(seed=seed) for seed in (3, 3, 4))
    for trainer in (one, two, other):
        torch.manual_seed(trainer is one)  # the global random state has no say
        trainer.train(16, **TRAIN)
    assert untimed(one.history) == untimed(two.history) != untimed(other.history)


# learning


@pytest.mark.parametrize("group_size, size", [(1, 4), (3, 6), (3, 7), (4, 2)])
def test_minibatches_cover_every_row_once_and_split_no_group(group_size, size):
    trainer = tiny_trainer(minibatch_size=size)
    group_ids = torch.arange(10).repeat(group_size)[torch.randperm(10 * group_size)] * 7
    orders = []
    for _ in range(2):
        batches = list(trainer._minibatches(group_ids))
        assert torch.cat(batches).sort().values.tolist() == list(range(10 * group_size))
        for rows in batches:
            assert len(rows) <= max(size, group_size)
            for group in group_ids[rows].unique():
                assert (group_ids[rows] == group).sum() == group_size
        orders.append(torch.cat(batches).tolist())
    assert orders[0] != orders[1]


@pytest.mark.parametrize("micro", [1, 3, 7])
def test_micro_batches_are_the_whole_minibatch(micro):
    """Also when ragged: with plain SGD the weights are the gradient."""
    trainers = [
        tiny_trainer(
            optimizer_class=torch.optim.SGD,
            actor_critic=tiny_actor_critic(),
            minibatch_size=100,
            micro_batch_size=size,
            actor_lr=1.0,
            critic_lr=1.0,
        )
        for size in (None, micro)
    ]
    e = trainers[0].roll_out(8, 8, ROLL)
    assert len(e.lengths.unique()) > 2
    start = weights(trainers[0])
    rows = [trainer.learn(e) for trainer in trainers]
    moved = 0.0
    for before, a, b in zip(start, weights(trainers[0]), weights(trainers[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        moved += (a - before).abs().sum()
    assert moved > 0.1
    assert rows[0] == pytest.approx(rows[1], abs=1e-4, rel=1e-4)


def gradient_trainer(**kwargs):
    """With plain SGD at rate 1 a step is the gradient."""
    defaults = dict(optimizer_class=torch.optim.SGD, actor_lr=1.0, critic_lr=1.0, minibatch_size=100)
    return tiny_trainer(actor_critic=tiny_actor_critic(), **{**defaults, **kwargs})


def gradients_of_a_step(trainer, experience):
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    numbers = trainer._take_step(experience, 1.0)
    return [a - b.detach() for a, b in zip(before, parameters, strict=True)], numbers


def gradients_of_the_plain_loss(trainer, experience, *parts):
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    loss, numbers = trainer.learner(experience, 1.0, *parts)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)], numbers


def ragged_experience(trainer):
    e = trainer.roll_out(8, 8, replace(ROLL, max_seq_len=12))
    assert len(e.lengths.unique()) > 2
    return trainer.algorithm.target(e)


@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("least", [1, 128])
def test_one_step_is_the_gradient_of_the_whole_loss(monkeypatch, least, micro):
    """However the rows are put in groups, and with policy and critic one after the other."""
    monkeypatch.setitem(ops.LEAST_TOKENS, "cpu", least)
    trainer = gradient_trainer(micro_batch_size=micro)
    e = ragged_experience(trainer)
    expected, numbers = gradients_of_the_plain_loss(trainer, e)
    calls, forward = [], Learner.forward
    monkeypatch.setattr(
        Learner, "forward", lambda s, e, t, *parts: calls.append((len(e), parts)) or forward(s, e, t, *parts)
    )
    found, reported = gradients_of_a_step(trainer, e)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert sum(g.abs().sum() for g in expected) > 0.1
    for name, value in numbers.items():  # PPO counts tokens
        assert reported[name] == pytest.approx(float(value[e.response_mask].mean()), abs=1e-5)
    groups = [rows for rows, parts in calls if parts == ("policy",)]
    assert groups == [rows for rows, parts in calls if parts == ("critic",)] and 2 * len(groups) == len(calls)
    assert sum(groups) == 8 and (len(groups) > 1) == (least == 1 or micro is not None)


def test_the_parts_add_up_to_the_whole():
    trainer = gradient_trainer()
    e = ragged_experience(trainer)
    whole, both = (gradients_of_the_plain_loss(trainer, e, *parts) for parts in ((), ("policy", "critic")))
    policy, critic = (gradients_of_the_plain_loss(trainer, e, part) for part in ("policy", "critic"))
    for w, b, p, c in zip(whole[0], both[0], policy[0], critic[0], strict=True):
        torch.testing.assert_close(w, b, atol=0, rtol=0)
        torch.testing.assert_close(p + c, w, atol=1e-6, rtol=1e-5)
        assert not p.any() or not c.any()  # adapters of their own on a frozen trunk
    assert whole[1].keys() == policy[1].keys() | critic[1].keys() and not policy[1].keys() & critic[1].keys()


@pytest.mark.parametrize("processes, terms", [(1, [("policy",), ("critic",)]), (2, [("policy", "critic")])])
def test_several_processes_learn_from_one_pass(monkeypatch, processes, terms):
    trainer = tiny_trainer()
    monkeypatch.setattr(type(trainer.accelerate), "num_processes", processes)
    assert trainer._terms() == terms


def learned(monkeypatch, lora, terms=None):
    """The last row of the history, which groups had gradients at each step, and the parameters at last."""
    actor_critic = tiny_actor_critic(actor_lora=lora, critic_lora=lora, pooled_values=False)
    trainer, held = tiny_trainer(actor_critic=actor_critic, max_norm=0.1, minibatch_size=3, micro_batch_size=2), []
    groups, step = [group["params"] for group in trainer.optimizer.param_groups], trainer.optimizer.step

    def watched():
        held.append([any(p.grad is not None for p in group) for group in groups])
        step()

    monkeypatch.setattr(trainer.optimizer, "step", watched)
    if terms is not None:
        monkeypatch.setattr(trainer, "_terms", lambda: terms)
    row = trainer.train(8, **TRAIN).history[-1]
    row = {name: value for name, value in row.items() if "second" not in name}
    return row, held, [p.detach() for group in groups for p in group]


@pytest.mark.parametrize("lora", [True, False])
def test_one_set_of_gradients_is_in_memory_and_all_is_learned_as_by_both(monkeypatch, lora):
    row, held, parameters = learned(monkeypatch, lora)
    expected, both, others = learned(monkeypatch, lora, [("policy", "critic")])
    assert held == [[True, False], [False, True]] * len(both) and both == [[True, True]] * len(both)
    assert row == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other)


def test_losses_that_reach_the_same_parameters_are_refused(monkeypatch):
    trainer = tiny_trainer(actor_critic=tiny_actor_critic())
    policy_loss = trainer.learner.forward
    monkeypatch.setattr(
        trainer.learner, "forward", lambda part, temperature, *terms: policy_loss(part, temperature, "policy")
    )
    with pytest.raises(ValueError, match=r"parameters of PPO are reached by loss and critic_loss both"):
        trainer.train(4, **TRAIN)


def test_max_norm_holds_for_each_group():
    trainer = tiny_trainer(
        optimizer_class=torch.optim.SGD,
        actor_critic=tiny_actor_critic(),
        max_norm=1e-2,
        actor_lr=1.0,
        critic_lr=1.0,
        minibatch_size=100,
    )
    groups = [group["params"] for group in trainer.optimizer.param_groups]
    before = [[p.detach().clone() for p in group] for group in groups]
    row = trainer.train(8, **TRAIN).history[0]
    assert row["grad_norm_actor"] > 1e-2 and row["grad_norm_critic"] > 1e-2  # as they were before clipping
    for old, new in zip(before, groups, strict=True):
        step = torch.cat([(a - b).flatten() for a, b in zip(old, new, strict=True)])
        assert step.norm().item() == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize(
    "kl, steps", [([0.0, 0.0, 0.9, 0.9, 0.0, 0.0], 4), ([0.0] * 6, 6), ([0.5, 0.6, 0, 0, 0, 0], 2)]
)
def test_kl_stop_looks_at_the_epoch_just_done(kl, steps, monkeypatch):
    trainer = tiny_trainer(epochs=3, minibatch_size=4, kl_stop=0.5)
    left = list(kl)
    monkeypatch.setattr(trainer, "_take_step", lambda *_: {"approx_kl": left.pop(0)})
    e = trainer.roll_out(8, 8, ROLL)
    trainer.learn(e)
    assert len(kl) - len(left) == steps


def test_learn_takes_several_experiences():
    one, two = tiny_trainer(minibatch_size=100), tiny_trainer(minibatch_size=100)
    parts = [one.roll_out(4, 4, ROLL) for _ in range(2)]
    one.learn(parts)
    two.learn(type(parts[0]).cat(parts))
    assert_same(one, two)


def test_normalised_rewards_that_are_all_equal_stay_small():
    trainer = tiny_trainer(reward_model=lambda p, r: [0.1] * len(p), normalize_reward=True)
    trainer.roll_out(7, 4, ROLL)
    assert trainer.score_scale == 1.0 and trainer.score_shift == pytest.approx(0.1)


def test_an_unweighted_reference_is_neither_computed_nor_reported(monkeypatch):
    monkeypatch.setattr(ActorCritic, "reference_log_probs", lambda *_: pytest.fail("nobody reads it"))
    trainer = tiny_trainer(kl_div_loss_weight=0.0).train(8, **TRAIN)
    assert "kl" not in trainer.history[0] and trainer.history[0]["entropy"] > 0
    assert trainer.roll_out(4, 4, ROLL).ref_log_probs is None


class Bar:
    def __init__(self):
        self.steps = []

    def update(self, some):
        self.steps.append(some)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_rollout_is_bounded_in_samples_and_told_in_prompts(monkeypatch, samples):
    trainer, bar, rows = tiny_trainer(micro_batch_size=2), Bar(), []
    trainer.algorithm.samples_per_prompt = samples
    trainer.palm.layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2]))
    e = trainer.roll_out(5, 2, ROLL, bar)
    assert len(e) == 5 * samples and sum(bar.steps) == pytest.approx(5) and len(bar.steps) > 1
    assert max(b for b, n in rows if n == 1) == 2 * samples
    assert max(b * n for b, n in rows) <= max(JUDGED * 2 * e.sequence.shape[1], 2 * samples * 4)
    assert e.group_ids.tolist() == [row // samples for row in range(5 * samples)]


def test_no_two_rollouts_share_a_group():
    e = tiny_trainer().roll_out(8, 3, ROLL)
    assert e.group_ids.tolist() == list(range(8))


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_learns_on_policy(fresh_accelerate):
    """Rollouts are judged in the precision of the forward pass that learns, so that the first ratio is 1."""
    trainer = tiny_trainer(
        actor_critic=tiny_actor_critic(), accelerate_kwargs={"mixed_precision": "bf16"}, minibatch_size=100
    )
    e = trainer.roll_out(8, 8, ROLL)
    assert {t.dtype for t in (e.log_probs, e.ref_log_probs, e.values, e.scores)} == {torch.float32}
    full = trainer.actor_critic.log_probs(e.sequence, e.response_mask).log_probs
    assert (e.log_probs - full).abs().max() > 1e-4  # it was bfloat16
    row = trainer.learn(e)
    assert row["approx_kl"] < 1e-7 and abs(row["policy_loss"]) < 1e-4


# metrics and trackers


def test_metrics_file_equals_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    trainer = tiny_trainer(metrics_path=path).train(24, **TRAIN)
    assert read_metrics(path) == trainer.history and len(trainer.history) == 3


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny_trainer(accelerate_kwargs={"log_with": "tensorboard", "project_dir": str(tmp_path)})
    trainer.train(16, **TRAIN)
    events = EventAccumulator(str(tmp_path / "palm_rlhf_pytorch"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("reward")]
    assert found == [(row["step"], pytest.approx(row["reward"])) for row in trainer.history]


class Notebook(GeneralTracker):
    name, requires_logging_directory, tracker = "notebook", False, None

    def __init__(self):
        super().__init__()
        self.rows = []

    @on_main_process
    def store_init_configuration(self, values):
        pass

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))


def test_a_tracker_of_ones_own():
    notebook = Notebook()
    trainer = tiny_trainer(accelerate_kwargs={"log_with": notebook}).train(16, **TRAIN)
    assert [step for step, _ in notebook.rows] == [1, 2]
    for (_, values), row in zip(notebook.rows, trainer.history, strict=True):
        assert values == {name: value for name, value in row.items() if name != "step"}


# checkpoints

KINDS = {
    "lora": {},
    "bins": {"critic_num_pred_bins": 6, "critic_pooled_values": False},
    "full": {"actor_lora": False, "critic_lora": False},
    "full actor, lora critic": {"actor_lora": False},
    "dropout": {"actor_dropout": 0.2, "critic_dropout": 0.2, "normalize_reward": True},
    "other critic": {"critic_palm_seed": 5},
}


def build(kind, **kwargs):
    options = dict(KINDS[kind])
    seed = options.pop("critic_palm_seed", None)
    if seed is not None:
        options["critic"] = tiny_palm(seed, dim=8)
    return tiny_trainer(**{**options, "epochs": 2, "minibatch_size": 4, **kwargs})


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_takes_the_same_next_step(kind, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer = build(kind, prompt_token_ids=PROMPTS.repeat(3, 1))
    trainer.train(10, **TRAIN)  # a draw of 8 and one of 2: prompts are left in the queue
    trainer.save(path)
    trainer.train(16, **TRAIN)

    resumed = build(kind, prompt_token_ids=PROMPTS.repeat(3, 1), seed=99)
    resumed.roll_out(3, 3, ROLL)
    torch.manual_seed(123)
    assert resumed.load(path) is resumed
    assert resumed.step == 2 and len(resumed.history) == 2
    resumed.train(16, **TRAIN)
    assert untimed(resumed.history) == untimed(trainer.history)
    assert_same(resumed, trainer)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_train_call_goes_on_where_it_stopped(kind, tmp_path):
    path, metrics = tmp_path / "checkpoint.pt", tmp_path / "metrics.jsonl"
    whole = build(kind)
    whole.train(40, **TRAIN)

    stopped = build(kind, metrics_path=metrics)

    def save_then_break(row):
        if row["step"] == 2:
            stopped.save(path)
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.train(40, **TRAIN, on_update=save_then_break)
    assert len(read_metrics(metrics)) == 3

    resumed = build(kind, metrics_path=metrics).load(path)
    assert read_metrics(metrics) == resumed.history and len(resumed.history) == 2  # the third line is dropped
    resumed.train(40, **TRAIN)
    assert untimed(resumed.history) == untimed(whole.history)
    assert read_metrics(metrics) == resumed.history
    assert [row["prompts"] for row in resumed.history] == [8, 16, 24, 32, 40]
    assert_same(resumed, whole)


@pytest.mark.parametrize("kind", ["full", "full actor, lora critic"])
@pytest.mark.parametrize("given", ["the same", "the trained one", "another"])
def test_full_fine_tuning_keeps_its_starting_policy(kind, given, tmp_path):
    """The reference comes from the checkpoint, so what palm the trainer is rebuilt from does not matter."""
    path = tmp_path / "checkpoint.pt"
    palm = tiny_palm()
    start = palm(PROMPTS).detach()
    trainer = build(kind, palm=palm).train(16, **TRAIN)
    trainer.save(path)
    trainer.train(8, **TRAIN)
    assert not torch.allclose(palm(PROMPTS), start)
    again = build(kind, palm={"the same": tiny_palm(), "the trained one": palm, "another": tiny_palm(9)}[given])
    again.load(path)
    assert torch.equal(again.actor_critic.reference_palm(PROMPTS), start)
    again.train(8, **TRAIN)
    assert untimed(again.history) == untimed(trainer.history)


def test_loading_full_weights_guesses_no_generation(tmp_path, caplog):
    """Gains that training moved past 0.5 are ours all the same, not those of the reference's generation 0.2."""
    path = tmp_path / "checkpoint.pt"
    trainer = build("full")
    with torch.no_grad():
        trainer.palm.norm.gamma.fill_(0.9)
        for layer in trainer.palm.layers:
            layer.fn.norm.gamma.fill_(0.9)
    trainer.save(path)
    again = build("full").load(path)
    assert (again.palm.norm.gamma == 0.9).all() and not caplog.records
    assert (again.actor_critic.reference_palm.norm.gamma == 0).all()


def test_adapters_are_refused_on_another_trunk(tmp_path):
    path = tmp_path / "checkpoint.pt"
    build("lora").save(path)
    with pytest.raises(ValueError, match="holds adapters to other frozen weights: give the palm it started from"):
        build("lora", palm=tiny_palm(9)).load(path)


def test_a_lora_checkpoint_leaves_the_trunk_out(tmp_path):
    trainer = build("lora")
    trainer.save(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert not any("token_emb" in name or "fused" in name for name in state["weights"])
    ids = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len({t.data_ptr() for t in state["weights"].values()}) == len(ids)


def foreign(tmp_path):
    """Files that are no checkpoint of this trainer's, and what is said of them."""
    good = tmp_path / "good.pt"
    build("lora").save(good)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(good.read_bytes()[:-200])
    text = tmp_path / "text.pt"
    text.write_text("hello")
    empty = tmp_path / "empty.pt"
    empty.touch()
    bare = tmp_path / "bare.pt"
    torch.save(tiny_palm().state_dict(), bare)
    harmful = tmp_path / "harmful.pt"
    torch.save({"kind": "PPO", "weights": Harmful()}, harmful)
    rank = tmp_path / "rank.pt"
    build("lora", actor_lora_r=4).save(rank)
    full = tmp_path / "full.pt"
    build("full").save(full)
    other_optimiser = tmp_path / "optimiser.pt"
    trainer = build("lora").train(8, **TRAIN)
    trainer.save(other_optimiser)
    state = torch.load(other_optimiser, weights_only=True)
    state["optimizer"]["param_groups"].pop()
    torch.save(state, other_optimiser)
    return {
        cut: "not a whole checkpoint",
        text: "not a whole checkpoint",
        empty: "not a whole checkpoint",
        bare: "is no PPO checkpoint",
        harmful: "not a whole checkpoint",
        rank: "built otherwise",
        full: "built otherwise",
        other_optimiser: "another optimiser",
    }


class Harmful:
    def __reduce__(self):
        return pytest.fail, ("code in a checkpoint was run",)


def test_a_resumed_run_takes_its_own_hyper_parameters_and_keeps_a_schedule(tmp_path):
    def schedule(_):
        for group in trainer.optimizer.param_groups:
            group["lr"] *= 0.5

    trainer = build("lora", actor_lr=8e-3, critic_lr=4e-3)
    trainer.train(16, **TRAIN, on_update=schedule)
    trainer.save(tmp_path / "c.pt")
    resumed = build("lora", actor_lr=8e-3, critic_lr=1e-3, betas=(0.5, 0.9)).load(tmp_path / "c.pt")
    actor, critic = resumed.optimizer.param_groups
    assert (actor["lr"], actor["betas"]) == (2e-3, (0.5, 0.9))  # halved twice; as asked for
    assert critic["lr"] == 1e-3
    old = torch.load(tmp_path / "c.pt", weights_only=True)
    del old["built"]  # as before 0.5.0
    torch.save(old, tmp_path / "old.pt")
    assert build("lora").load(tmp_path / "old.pt").optimizer.param_groups[0]["lr"] == 2e-3


def test_corrupt_and_foreign_checkpoints_are_refused_in_a_sentence(tmp_path):
    trainer = build("lora").train(8, **TRAIN)
    before, history = weights(trainer), list(trainer.history)
    for path, sentence in foreign(tmp_path).items():
        with pytest.raises(ValueError, match=sentence) as error:
            trainer.load(path)
        assert path.name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        trainer.load(tmp_path / "nowhere.pt")
    # and nothing of them was taken
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert trainer.history == history and trainer.step == 1


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    trainer = build("lora")
    trainer.save(path)
    before = path.read_bytes()

    def crash(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        trainer.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_other_prompts_after_a_resume(tmp_path):
    trainer = build("lora", prompt_token_ids=PROMPTS.repeat(3, 1)).train(10, **TRAIN)
    trainer.save(tmp_path / "checkpoint.pt")
    other = build("lora", prompt_token_ids=PROMPTS[:2]).load(tmp_path / "checkpoint.pt")
    other.train(8, **TRAIN)  # the rows queued by the checkpoint, up to the twelfth, are not looked for
    assert len(other.history) == 3


# answers


def test_generate_gives_the_best_of_its_samples():
    judged = []

    def reward(prompts, responses):
        judged.extend(zip(prompts, responses, strict=True))
        return [float(-len(r)) if r[-1] == EOS else -99.0 for r in responses]

    trainer = tiny_trainer(reward_model=reward, actor_critic=tiny_actor_critic())
    torch.manual_seed(1)
    answer, score = trainer.generate(12, prompt=PROMPTS[0, :4], num_samples=30, eos_token=EOS, return_score=True)
    assert len(judged) == 30 and all(torch.equal(p, PROMPTS[0, :4]) for p, _ in judged)
    scores = [float(-len(r)) if r[-1] == EOS else -99.0 for _, r in judged]
    best = max(range(30), key=scores.__getitem__)
    assert score == scores[best] and isinstance(score, float)
    assert torch.equal(answer, torch.cat((PROMPTS[0, :4], judged[best][1])))
    assert answer[-1] == EOS and len(answer) < 12  # its padding is trimmed, its EOS is kept
    assert torch.is_tensor(trainer.generate(12, prompt=PROMPTS[0, :4], num_samples=2))


def test_generate_keeps_zeros_inside_prompts():
    prompt = torch.tensor([2, 0, 0, 5])
    answer = tiny_trainer().generate(8, prompt=prompt, num_samples=2)
    assert torch.equal(answer[:4], prompt) and answer.shape == (8,)


def test_generate_respects_max_seq_len():
    trainer = tiny_trainer()
    assert trainer.generate(6, prompt=PROMPTS[0], num_samples=2).shape == (6,)
    assert trainer.generate(3, prompt=PROMPTS[0], num_samples=2).shape == (6,)  # one token is drawn in any case


def test_generate_is_the_policy_and_takes_the_usual_keywords():
    trainer = tiny_trainer(actor_critic=tiny_actor_critic())
    prompt = PROMPTS[0]
    greedy = trainer.generate(8, prompt=prompt, temperature=0.0)
    expected = prompt
    for _ in range(3):
        logits, _ = trainer.actor_critic(expected[None], return_values=False)
        expected = torch.cat((expected, logits[0, -1:].argmax(-1)))
    assert torch.equal(greedy, expected)
    one, two = (trainer.generate(8, prompt=prompt, seed=4) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(trainer.generate(8, prompt=prompt, top_k=1, pad_value=3), greedy)
    state = trainer.generator.get_state()
    trainer.generate(8, prompt=prompt)
    assert torch.equal(state, trainer.generator.get_state())  # a run under way is not disturbed
    with pytest.raises(ValueError, match=r"one prompt \(n,\) is needed, got shape \(4, 5\)"):
        trainer.generate(8, prompt=PROMPTS)


def test_best_of_more_is_better():
    trainer = tiny_trainer()
    torch.manual_seed(0)
    mean = [
        sum(trainer.generate(9, prompt=PROMPTS[0], num_samples=n, return_score=True)[1] for _ in range(20))
        for n in (1, 8)
    ]
    assert mean[1] > mean[0] + 10


def test_interior_zeros_reach_the_policy():
    seen = []

    def reward(prompts, responses):
        seen.extend(p.tolist() for p in prompts)
        return [0.0] * len(prompts)

    ids = torch.tensor([[2, 0, 3, 0, 0], [0, 4, 5, 6, 7]])
    tiny_trainer(prompt_token_ids=ids, reward_model=reward).train(2, max_timesteps=1, max_seq_len=7)
    assert sorted(seen) == [[0, 4, 5, 6, 7], [2, 0, 3]]


@pytest.mark.parametrize("lora", [True, False])
def test_the_merged_policy_is_a_plain_palm(lora):
    trainer = tiny_trainer(actor_lora=lora, critic_lora=lora).train(16, **TRAIN)
    policy = trainer.merged_policy()
    torch.testing.assert_close(policy(PROMPTS), trainer.actor_critic(PROMPTS)[0], atol=1e-5, rtol=1e-4)
    assert not policy.finetune_modules and all(p.requires_grad for p in policy.parameters())
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in trainer.palm.parameters()}


@pytest.mark.parametrize("pooled", [True, False])
def test_a_bfloat16_palm_is_trained(pooled):
    trainer = tiny_trainer(palm=tiny_palm().bfloat16(), critic_pooled_values=pooled).train(16, **TRAIN)
    assert len(trainer.history) == 2 and trainer.history[0]["kl"] == 0 and abs(trainer.history[0]["approx_kl"]) < 0.01
    e = trainer.roll_out(4, 4, ROLL)
    assert {t.dtype for t in (e.log_probs, e.ref_log_probs, e.values, e.scores)} == {torch.float32}


def test_a_train_call_after_a_failed_one_starts_anew():
    calls = []

    def reward(prompts, responses):
        calls.append(len(responses))
        if len(calls) == 2:
            raise RuntimeError("the judge is out")
        return [0.0] * len(responses)

    trainer = tiny_trainer(reward_model=reward)
    with pytest.raises(RuntimeError, match="the judge is out"):
        trainer.train(num_episodes=1, max_timesteps=4, update_timesteps=2, max_seq_len=7)
    trainer.train(num_episodes=1, max_timesteps=2, update_timesteps=2, max_seq_len=7)
    assert calls == [2, 2, 2] and trainer.step == 2


@pytest.mark.parametrize(
    "name, value", [("epochs", 0), ("micro_batch_size", -1), ("minibatch_size", 0), ("max_norm", 0)]
)
def test_learning_options_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        tiny_trainer(**{name: value})


def test_a_reward_must_be_callable():
    with pytest.raises(TypeError, match="got NoneType"):
        tiny_trainer(reward_model=None)
