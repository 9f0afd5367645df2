import pytest
import torch

from palm_rlhf_pytorch.evaluation import distinct_n, prompt_batch, sample
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PROMPTS = ["abc", "", "a", "xyzxyzxyz"]


@pytest.fixture
def palm(make_palm):
    return make_palm(num_tokens=TOKENIZER.num_tokens)


def test_prompt_batch():
    ids, lengths = prompt_batch(TOKENIZER, ["ab", ""], "cpu")
    bos = TOKENIZER.bos_id
    assert ids.tolist() == [[bos, 100, 101], [bos, 0, 0]] and lengths.tolist() == [3, 1]


def test_a_ragged_batch_answers_as_each_alone(palm):
    together = sample(palm, TOKENIZER, PROMPTS, 16, temperature=0)
    alone = [sample(palm, TOKENIZER, [prompt], 16, temperature=0) for prompt in PROMPTS]
    assert together.responses == [one.responses[0] for one in alone]
    assert together.finished == [one.finished[0] for one in alone]
    assert together == sample(palm, TOKENIZER, PROMPTS, 16, temperature=0, batch_size=3)
    assert together.texts == [p + r for p, r in zip(PROMPTS, together.responses, strict=True)]
    assert together.prompts == PROMPTS and together.kl is None


def test_seeds_reproduce(palm):
    first, same, other = (sample(palm, TOKENIZER, PROMPTS, 16, seed=seed).responses for seed in (0, 0, 1))
    assert first == same != other


def test_what_meets_eos_is_finished(palm):
    greedy = sample(palm, TOKENIZER, ["ab"], 8, temperature=0)
    assert greedy.finished == [False]
    ids, lengths = prompt_batch(TOKENIZER, ["ab"], "cpu")
    next_token = int(palm(ids)[0, -1].argmax())

    class EndsThere(ByteTokenizer):
        eos_id = next_token

    ended = sample(palm, EndsThere(), ["ab"], 8, temperature=0)
    assert ended.finished == [True] and ended.responses == [""]


def test_an_answer_may_end_in_several_ways(palm):
    class EndsAnywhere(ByteTokenizer):
        eos_ids = tuple(range(2, 259))

        def _decode(self, ids):
            raise AssertionError(f"{ids} are left")

        def decode(self, ids):
            return str(len(ids))

    ended = sample(palm, EndsAnywhere(), ["ab"], 8)
    assert ended.finished == [True] and ended.responses == ["1"]  # one token, which ends it


def test_kl_against_itself_is_nothing(palm):
    kl = sample(palm, TOKENIZER, PROMPTS, 16, reference=palm).kl
    assert kl.shape == (4,) and kl.abs().max() < 1e-5


@torch.no_grad()
def test_kl_by_hand(palm, make_palm):
    """The sum of log-ratios over response tokens, at the sampling temperature."""
    torch.manual_seed(3)
    other = make_palm(num_tokens=TOKENIZER.num_tokens)
    drawn = sample(palm, TOKENIZER, ["ab"], 6, temperature=0.5, seed=4, reference=other)
    ids, _ = prompt_batch(TOKENIZER, ["ab"], "cpu")
    full = palm.generate(
        6, ids, 0.5, filter_logits_fn=None, eos_token=TOKENIZER.eos_id, seed=4, return_seq_without_prompt=False
    )
    ratio = 0.0
    for n in range(ids.shape[1], full.shape[1]):
        mine, theirs = ((model(full)[0, n - 1] / 0.5).log_softmax(dim=-1) for model in (palm, other))
        ratio += float(mine[full[0, n]] - theirs[full[0, n]])
    assert drawn.kl.item() == pytest.approx(ratio, abs=1e-4) and abs(ratio) > 0.1


def test_distinct_n_by_hand():
    # a b, b a | a b, b c: four bigrams, three of them distinct; none runs over the end of a text
    assert distinct_n(["a b a", "a b c"]) == 3 / 4
    assert distinct_n(["a b a", "a b c"], n=1) == 3 / 6
    assert distinct_n(["a b a", "a b c"], n=3) == 1.0
    assert distinct_n(["a", ""]) == 0.0
