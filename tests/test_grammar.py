"""The review language: what is drawn is accepted, rated exactly, varied, short and balanced."""

import random
import statistics
from collections import Counter, defaultdict

import pytest

from palm_rlhf_pytorch.quickstart import grammar
from palm_rlhf_pytorch.quickstart.grammar import (
    accepts,
    corpus,
    count_sentences,
    noisy_rating,
    opening,
    parses,
    rate,
    sample_prompt,
    sample_review,
)


@pytest.fixture(scope="module")
def reviews():
    return corpus(20_000, seed=0)


def test_every_review_has_one_parse_and_it_gives_the_rating_drawn(reviews):
    for review in reviews[:3000]:
        assert parses(review.text) == [review.rating]


# stars = 3 + 0.8 * score, clamped to [1, 5]
HAND_DERIVED = [
    ("the pasta was fresh.", 3.8),  # 1
    ("the pasta was simply awful.", 1.0),  # 1.25 * -2 = -2.5
    ("the soup was not very good.", 2.5),  # -0.5 * 1.25 * 1 = -0.625
    ("honestly the plot was never boring.", 3.9),  # -0.75 * -1.5 = 1.125
    ("the soup was far worse than usual.", 1.8),  # 1.5 * -1 = -1.5
    ("the waiter was slow but friendly.", 3.53),  # -1 / 3 + 2 * 1.5 / 3 = 2 / 3
    ("we did not mind the bar.", 3.4),  # -0.5 * -1 = 0.5
    ("i rather enjoyed the ending.", 3.9),  # 0.75 * 1.5 = 1.125
    ("the soup was stale, but the staff was great.", 3.4),  # -1.5 / 3 + 2 * 1.5 / 3 = 0.5
    ("although the room was dirty, we truly loved the soup.", 3.93),  # -1.5 / 3 + 2 * 2.5 / 3 = 7 / 6
    ("the soup was great and the room was clean. i would gladly return.", 4.4),  # 2.5 / 2 + 0.5 = 1.75
    ("the cast was truly perfect. we would gladly buy a copy.", 5.0),  # 2.5 + 0.5, clamped
]


@pytest.mark.parametrize(("text", "rating"), HAND_DERIVED)
def test_hand_derived_ratings(text, rating):
    assert rate(text) == rating


@pytest.mark.parametrize(
    "ascending",
    [
        # negation flips and dampens
        ["bad", "not good", "not bad", "good"],
        ["boring", "never clever", "not clever", "not boring", "never boring", "clever"],
        # degree moves a judgement away from the middle
        ["simply awful", "awful", "very poor", "poor", "slightly poor"],
        ["slightly clever", "fairly clever", "clever", "very clever", "brilliant", "truly brilliant"],
        # the word after "but" weighs more
        ["silly", "funny but silly", "silly but funny", "funny"],
        ["much worse than usual", "worse than usual", "slightly better than usual", "better than usual"],
    ],
)
def test_predicates_are_ordered(ascending):
    ratings = [rate(f"overall the plot was {predicate}.") for predicate in ascending]
    assert all(lower < higher for lower, higher in zip(ratings, ratings[1:], strict=False))


def test_the_main_clause_outweighs_the_contrasted_one():
    good, bad = "the soup was great", "the room was dirty"
    assert rate(f"{bad}, but {good}.") == rate(f"although {bad}, {good}.") > 3
    assert rate(f"{good}, but {bad}.") == rate(f"although {good}, {bad}.") < 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the soup was",
        "the soup was very good",  # no full stop
        "the soup was very good .",
        "the soup was very good. ",
        "The soup was very good.",
        "the soup was  very good.",
        "the soup was very good!",
        "the soup was very good.\n",
        "soup the was very good.",
        "the soup soup was very good.",
        "the soup was very very good.",
        "the soup was not slightly good.",
        "the soup was very clever.",  # a film's adjective
        "the soup was great, but the plot was boring.",  # two domains in one review
        "the soup was great and the bread was tasty.",  # one topic twice
        "the soup was great and the room was dirty.",  # "and" joins what leans alike
        "the soup was great, but the room was clean.",  # "but" joins opposites
        "the soup was great. i would never return.",  # a recommendation follows the review
        "the soup was good.",  # too short
        "i would gladly return.",
        "the soup was truly perfect. we would come back.",  # "gladly" or the like is missing
        "asdf qwer zxcv tyui ghjk.",
        "good good good good good good good.",
    ],
)
def test_broken_text_is_rejected(text):
    assert rate(text) is None and not accepts(text)


def test_damaged_reviews_are_rejected(reviews):
    for review in reviews[:300]:
        words = review.text.split(" ")
        assert not accepts(review.text[:-1])
        assert not accepts(" ".join([words[0], *words]))
        assert not accepts(" ".join(reversed(words)))


def test_reviews_are_short_ascii_lines(reviews):
    lengths = [len(review.text) for review in reviews]
    assert min(lengths) >= 20 and max(lengths) <= 75
    assert 44 < statistics.mean(lengths) < 52
    for review in reviews:
        assert review.text.isascii() and review.text.islower() and review.text.endswith(".")


def test_ratings_are_balanced(reviews):
    ratings = [review.rating for review in reviews]
    assert 2.8 < statistics.mean(ratings) < 3.2
    assert 0.9 < statistics.stdev(ratings) < 1.3
    assert (min(ratings), max(ratings)) == (1, 5)
    shares = Counter(round(rating) for rating in ratings)
    assert all(shares[star] > 0.04 * len(reviews) for star in range(1, 6))


def test_excellent_reviews_are_many(reviews):
    assert sum(review.rating >= 4.5 for review in reviews) > 1000
    perfect = {review.text for review in corpus(50_000, seed=1) if review.rating == 5}
    assert len(perfect) > 1000


def test_vocabulary_is_small(reviews):
    words = {word for review in reviews for word in grammar.tokenize(review.text)}
    assert 100 < len(words) < 160


def test_count_of_a_small_rule_by_hand():
    # (good, great, fresh, tasty) with 4 degrees or none, (perfect, delicious) with 3 or none
    rule = grammar.description(grammar.FOOD, 1)
    assert sum(rule.lengths().values()) == 4 * 5 + 2 * 4
    # with a space before each word, " good" is 5 long, and 15 are " slightly" with great, fresh or tasty,
    # " almost perfect" and " simply perfect"
    assert rule.lengths()[5] == 1 and rule.lengths()[15] == 5
    rng = random.Random(0)
    assert len({tuple(rule.sample(rng)[0]) for _ in range(5000)}) == 28


def test_reviews_are_many(reviews):
    assert count_sentences() > 100_000_000
    assert len({review.text for review in reviews}) == len(reviews) == 20_000


def test_seeds_determine_the_corpus():
    assert corpus(100, seed=3) == corpus(100, seed=3) != corpus(100, seed=4)
    assert sample_review(random.Random(5)) == sample_review(random.Random(5))
    assert sample_prompt(random.Random(5)) == sample_prompt(random.Random(5))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the soup was very good.", "the soup"),
        ("last night i thought the staff was rude.", "last night i thought the staff"),
        ("although we did not mind the room, the bread was stale.", "although we did not"),
        ("this time i really hated the plot.", "this time i"),
    ],
)
def test_opening_ends_before_the_judgement(text, expected):
    assert accepts(text) and opening(text) == expected


def test_prompts_begin_reviews_and_judge_nothing():
    rng = random.Random(0)
    judging = {*grammar.VERBS, *grammar.NEGATED_VERBS, *grammar.VERB_DEGREES, "was"}
    prompts = [sample_prompt(rng) for _ in range(1000)]
    assert len(set(prompts)) > 150
    for prompt in prompts:
        assert prompt == prompt.strip() and len(prompt.split()) >= 2
        assert judging.isdisjoint(prompt.split())


def test_openings_leave_the_rating_open():
    ratings = defaultdict(list)
    for review in corpus(40_000, seed=5):
        ratings[opening(review.text)].append(review.rating)
    frequent = {prompt: found for prompt, found in ratings.items() if len(found) >= 150}
    assert len(frequent) > 30
    for found in frequent.values():
        assert min(found) <= 2 and max(found) >= 4
        assert 2.5 < statistics.mean(found) < 3.5


def test_noisy_ratings_are_stars_around_the_true_rating():
    rng = random.Random(0)
    clicks = [noisy_rating(3.0, rng) for _ in range(4000)]
    assert set(clicks) == {1, 2, 3, 4, 5}
    # five standard errors: a rounded Gaussian has deviation sqrt(0.7^2 + 1/12) = 0.76, and 0.76 / 63 = 0.012
    assert statistics.mean(clicks) == pytest.approx(3, abs=0.06)
    assert [noisy_rating(rating, rng, noise=0) for rating in (1.0, 2.4, 3.8, 5.0)] == [1, 2, 4, 5]
