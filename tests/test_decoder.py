import gc
import logging
import weakref

import pytest
import torch
from torch._dynamo.utils import counters

from palm_rlhf_pytorch import decoder, generation
from palm_rlhf_pytorch.decoder import FEW, Compiled, Decoder, can_compile, choose
from palm_rlhf_pytorch.generation import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
compiles = pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")

PROMPTS = torch.arange(8 * 9).reshape(8, 9) * 7 % 17
LENGTHS = torch.tensor([9, 1, 4, 8, 2, 9, 3, 1])
EOS = (2, 11)


def answers(model, how, rows=8, seq_len=24, lengths=LENGTHS, **keywords):
    keywords = {"eos_token": EOS, "pad_value": 3, "max_batch": None, **keywords}
    return generation.generate(
        model, PROMPTS[:rows], lengths[:rows], seq_len, Sampling(0.0), return_log_probs=True, how=how, **keywords
    )


def assert_same(one, two):
    assert torch.equal(one.sequence, two.sequence) and torch.equal(one.response_mask, two.response_mask)
    torch.testing.assert_close(one.log_probs, two.log_probs, atol=1e-5, rtol=1e-5)


# which decoder


def test_packed_weights_must_pay(make_palm):
    model, few = make_palm(), FEW["packed"]
    assert [choose(model, steps) for steps in (few, few + 1)] == ["plain", "packed"]
    assert choose(model, 1, "packed") == "packed" and choose(model, 10**6, "plain") == "plain"
    assert choose(model, 100, adapters=True) == "plain"


def test_a_decoder_of_another_name_is_refused(make_palm):
    with pytest.raises(ValueError, match="decoder is one of auto, plain, packed, compiled, got 'fast'"):
        make_palm().generate(9, PROMPTS, decoder="fast")


def test_auto_says_nothing_and_a_wish_that_cannot_be_granted_is_named(make_palm, caplog, monkeypatch):
    model = make_palm().double()
    assert choose(model, 100) == "plain" and not caplog.records
    monkeypatch.setattr(decoder, "can_compile", lambda device: False)
    for how in ("packed", "compiled"):
        caplog.clear()
        assert choose(model, 100, how) == "plain"
        assert f"decoder='{how}' is not to be had here (cpu, torch.float64): plain steps" in caplog.text


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(decoder, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    monkeypatch.setattr(decoder, "find_spec", lambda name: None)
    assert can_compile(torch.device("cpu")) and not can_compile(torch.device("cuda"))
    monkeypatch.setattr(decoder, "which", lambda name: None)
    monkeypatch.setattr(decoder, "find_spec", lambda name: name == "triton" or None)
    assert not can_compile(torch.device("cpu")) and can_compile(torch.device("cuda"))


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 12, 13])
def test_fixed_sizes_are_halves(make_palm, batch):
    cache = make_palm().new_cache(1, 1)
    fixed, free = (Decoder(cache, None, fixed_sizes=fixed, batch=batch) for fixed in (True, False))
    halves = {batch >> k for k in range(8)} - {0}
    for rows in range(1, batch + 1):
        assert fixed.size_for(rows) == min(size for size in halves if size >= rows)
        assert free.size_for(rows) == rows


# compiled steps, without the compiler: a static cache, fixed sizes, and a look every few steps


@pytest.fixture
def compiled(monkeypatch) -> list[int]:
    """torch.compile does nothing; which numbers of rows were 'compiled'."""
    first, seen = Compiled._first, []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(decoder, "can_compile", lambda device: True)
    monkeypatch.setattr(Compiled, "_first", lambda self, m, t, c: seen.append(len(t)) or first(self, m, t, c))
    return seen


def kept(model):
    """What waits for the model's next call."""
    return decoder.spare[model][1]


def rows_of_steps(model) -> list[int]:
    """How many rows each step from now on has."""
    seen, step = [], model.next_logits
    model.next_logits = lambda tokens, cache, **kwargs: seen.append(len(tokens)) or step(tokens, cache, **kwargs)
    return seen


KINDS = {
    "xpos": {},
    "short xpos base": {"rotary_xpos_scale_base": 6},
    "no xpos": {"use_xpos": False, "kv_heads": 2},
    "qk_rmsnorm": {"qk_rmsnorm": True, "kv_heads": 4, "logit_scale": 0.5},
    "qk_layernorm": {"qk_layernorm": True, "kv_heads": 2},
    "window, a global layer": {"sliding_window": 5, "global_layers": [1], "use_xpos": False},
}


@pytest.mark.parametrize("look_every", [1, 4, 16])
@pytest.mark.parametrize("max_batch", [None, 1, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_plain(make_palm, monkeypatch, compiled, kind, max_batch, look_every):
    monkeypatch.setattr(decoder, "LOOK_EVERY", look_every)
    monkeypatch.setattr(decoder, "LENGTHS", 8)
    model, heard = make_palm(**KINDS[kind]), []
    plain = answers(model, "plain")
    assert len(plain.response_mask.sum(-1).unique()) > 3
    seen = rows_of_steps(model)
    for _ in range(2):
        assert_same(answers(model, "compiled", max_batch=max_batch, on_ended=heard.append), plain)
    assert set(seen) == set(compiled) <= {8, 4, 2, 1, 3} and max(seen) == (max_batch or 8)
    assert len(compiled) == len(set(compiled)) and sum(heard) == 16
    assert kept(model).look_every == look_every and kept(model).cache.static


def test_few_rows_are_computed_as_a_fraction_of_the_batch(make_palm, monkeypatch, compiled):
    monkeypatch.setattr(decoder, "LOOK_EVERY", 1)
    model = make_palm()
    left = answers(model, "plain").response_mask.sum(-1)
    seen = rows_of_steps(model)
    answers(model, "compiled")
    working = [int((left > step).sum()) for step in range(int(left.max()))]
    assert seen == [next(size for size in (1, 2, 4, 8) if size >= rows) for rows in working]
    assert len(set(seen)) > 2


def test_a_row_that_only_fills_up_the_batch_never_runs_out_of_room(make_palm, monkeypatch, compiled):
    monkeypatch.setattr(decoder, "LOOK_EVERY", 2)
    monkeypatch.setattr(decoder, "LENGTHS", 4)
    model, lengths = make_palm(), torch.tensor([9, 1, 1, 1])
    plain = answers(model, "plain", 4, 10, lengths, eos_token=None)
    assert_same(answers(model, "compiled", 4, 10, lengths, eos_token=None), plain)
    assert compiled == [4] and kept(model).cache.max_len == 12


def test_answers_may_be_longer_than_what_a_growing_cache_starts_with(make_palm, monkeypatch, compiled):
    monkeypatch.setattr(decoder, "FIRST_LENGTH", 5)
    monkeypatch.setattr(decoder, "LENGTHS", 4)
    model = make_palm()
    assert_same(answers(model, "compiled", seq_len=60, eos_token=None), answers(model, "plain", 8, 60, eos_token=None))
    assert kept(model).cache.max_len == 60 + decoder.LOOK_EVERY


def test_auto_lays_out_no_static_cache_beyond_reason(make_palm, monkeypatch, compiled):
    monkeypatch.setattr(decoder, "choose", lambda model, steps, how, adapters: "compiled")
    monkeypatch.setattr(decoder, "LONGEST", 20)
    for how, length, static in (("auto", 20, True), ("auto", 21, False), ("compiled", 21, True)):
        with decoder.decoder(make_palm(), 2, length, 100, how) as ready:
            assert ready.cache.static is static and ready.cache.rows == 0


def test_memory_and_code_are_there_for_the_next_call(make_palm, compiled):
    model = make_palm()
    first = answers(model, "compiled")
    memory, count = kept(model).cache.memory, len(compiled)
    assert_same(answers(model, "compiled"), first)
    assert kept(model).cache.memory is memory and len(compiled) == count
    answers(model, "compiled", seq_len=9 + decoder.LENGTHS)
    answers(model, "compiled", rows=3)
    assert kept(model).cache.memory is not memory and len(compiled) > count
    count = len(compiled)
    assert_same(answers(model, "compiled"), first)
    assert len(compiled) == count  # other sizes in between do not matter


def test_the_memory_s_address_is_told_to_stay(make_palm, monkeypatch, compiled):
    marked = []
    monkeypatch.setattr(torch._dynamo, "mark_static_address", marked.append)
    model = make_palm()
    for _ in range(2):
        answers(model, "compiled")
    assert len(marked) == 1 and marked[0] is kept(model).cache.memory


def test_what_an_earlier_call_left_is_not_seen(make_palm, compiled):
    model = make_palm()
    first = answers(model, "compiled")
    kept(model).cache.memory.fill_(torch.nan)
    assert_same(answers(model, "compiled"), first)


@pytest.mark.parametrize("leave", ["close", "error"])
def test_a_call_that_was_left_keeps_them_too(make_palm, compiled, leave):
    model, made = make_palm(), []
    expected, new_cache = answers(model, "plain"), model.new_cache
    model.new_cache = lambda *args, **kwargs: made.append(args) or new_cache(*args, **kwargs)
    steps = generation.decode(model, PROMPTS, LENGTHS, torch.full((8,), 24), Sampling(0.0), how="compiled")
    for _ in range(5):
        next(steps)
    if leave == "close":
        steps.close()
    else:
        with pytest.raises(ZeroDivisionError):
            steps.throw(ZeroDivisionError())
    assert_same(answers(model, "compiled"), expected)
    assert len(made) == 1 and len(compiled) == len(set(compiled))


def test_two_at_once_share_no_memory(make_palm, compiled):
    model, limits = make_palm(), torch.full((8,), 24)
    answers(model, "compiled")
    streams = [generation.decode(model, PROMPTS, LENGTHS, limits, Sampling(0.0), how="compiled") for _ in range(2)]
    for one, two in zip(*streams, strict=True):
        assert torch.equal(one.tokens, two.tokens)
    assert len(list(streams[0])) == 0


def test_nothing_kept_keeps_a_model(make_palm, compiled):
    model = make_palm()
    answers(model, "compiled")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_inference_mode_and_normal_mode_take_turns(make_palm, compiled):
    model = make_palm()
    plain = answers(model, "plain")
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert_same(answers(model, "compiled"), plain)


def test_a_hook_is_called(make_palm, compiled, caplog):
    model = make_palm()
    answers(model, "compiled")
    count = len(compiled)
    handle = model.norm.register_forward_hook(lambda module, args, out: -out)
    assert_same(answers(model, "compiled"), answers(model, "plain"))
    assert len(compiled) == count and "decoder='compiled' is not to be had here" in caplog.text
    handle.remove()
    assert_same(answers(model, "compiled"), answers(model, "plain"))


def test_adapters_have_code_of_their_own(make_palm, compiled):
    model = make_palm(finetune_scopes=["a"])
    for keywords in ({}, {"finetune_scope": "a"}, {}, {"finetune_scope": "a", "disable_lora": True}):
        assert_same(answers(model, "compiled", **keywords), answers(model, "plain", **keywords))
    assert len({key for _, key in decoder.functions[model]}) == 3


# a compiler that fails


@pytest.mark.parametrize("fails", ["at once", "when called"])
def test_a_failing_compiler_is_named_and_decoding_goes_on(make_palm, monkeypatch, caplog, fails):
    calls = []

    def compile(function, **_):
        calls.append(fails)
        return fail() if fails == "at once" else fail

    def fail(*args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(decoder, "can_compile", lambda device: True)
    model = make_palm()
    plain = answers(model, "plain")
    for _ in range(2):
        assert_same(answers(model, "compiled"), plain)
    message = "the decode step could not be compiled (RuntimeError); decoding goes on plainly"
    assert [record.getMessage() for record in caplog.records] == [message] and len(calls) == 1


# the compiler itself


@pytest.fixture
def eager(monkeypatch):
    """torch.compile traces and guards as ever, and makes no code."""
    compile = torch.compile

    def traced(function, *, mode, **keywords):
        return compile(function, backend="eager", **keywords)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(decoder, "can_compile", lambda device: True)
    counters.clear()


def traces() -> int:
    return counters["stats"]["unique_graphs"]


def test_code_is_made_once_for_each_size_and_no_number_of_sizes_is_too_many(make_palm, eager, monkeypatch, caplog):
    monkeypatch.setattr(decoder, "LOOK_EVERY", 1)
    model = make_palm(depth=1)
    plain = answers(model, "plain", 2)
    lengths = plain.response_mask.sum(-1)
    assert lengths.min() < lengths.max()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    with torch._dynamo.config.patch({limit: 1}):
        for _ in range(3):
            assert_same(answers(model, "compiled", 2), plain)
        with torch.no_grad():
            model.norm.gamma.mul_(2)
            model.layers[0].fn.attn_out.weight.mul_(-1)
        assert_same(answers(model, "compiled", 2), answers(model, "plain", 2))
    assert traces() == 2 and "could not be compiled" not in caplog.text


@compiles
@pytest.mark.parametrize("kind", [{}, {"sliding_window": 5, "qk_layernorm": True}])
def test_real_code_gives_the_same(make_palm, monkeypatch, caplog, kind):
    monkeypatch.setattr(decoder, "LENGTHS", 8)
    counters.clear()
    caplog.set_level(logging.INFO)
    model = make_palm(depth=1, **kind)
    keywords = dict(rows=2, lengths=torch.tensor([9, 9]), eos_token=None)
    for sign in (1, -1):
        with torch.no_grad():
            model.token_emb.weight.mul_(sign)
        assert_same(answers(model, "compiled", **keywords), answers(model, "plain", **keywords))
    assert "compiled the decode step for 2 rows of 40 tokens" in caplog.text and traces() == 1
