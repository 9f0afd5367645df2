"""A small language of cafe and film reviews whose true star rating is known exactly.

One set of rules does everything: it draws reviews, parses them, rates them and counts them. A rule
describes both a piece of text and its meaning, so the generator and the judge cannot disagree.

The meaning of a phrase is a score, and the stars are `3 + 0.8 * score`, clamped to [1, 5]:

    adjective or verb  its polarity, one of 1, 1.5 or 2 in size              "fresh" 1, "stale" -1.5
    degree             multiplies                                            "very" 1.25, "slightly" 0.5
    negation           flips and dampens: "not" -0.5, "never" -0.75          "not good" -0.5
    "A and B"          (A + B) / 2, where A and B lean the same way
    "A but B", "although A, B"    A / 3 + 2 B / 3, where A and B lean opposite ways
    recommendation     adds 0.25 or 0.5 towards the way the review leans     "i would never return."
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Protocol

MIN_CHARS, MAX_CHARS = 20, 75
MIN_STARS, MAX_STARS = 1, 5
MAX_SCORE = 2.5  # what the strongest clause scores: "truly delicious", 1.25 * 2

# rules: what a phrase may look like, and what it means


class Rule(Protocol):
    """A set of token sequences, each with a score."""

    def sample(self, rng: random.Random) -> tuple[list[str], float]:
        """Draws one phrase: its tokens and its score."""

    def parse(self, tokens: Sequence[str], start: int) -> Iterator[tuple[int, float]]:
        """Yields the end and the score of every phrase that begins at `start`."""

    def lengths(self) -> Counter[int]:
        """Counts the phrases by their length in characters, the space before each word included."""


class Words:
    """One phrase out of a table of scores; the phrase may be several words, or none ("")."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = {tuple(phrase.split()): score for phrase, score in scores.items()}
        self.phrases = list(self.scores)
        self.sizes = {len(phrase) for phrase in self.phrases}

    def sample(self, rng: random.Random) -> tuple[list[str], float]:
        phrase = rng.choice(self.phrases)
        return list(phrase), self.scores[phrase]

    def parse(self, tokens: Sequence[str], start: int) -> Iterator[tuple[int, float]]:
        for size in self.sizes:
            phrase = tuple(tokens[start : start + size])
            if len(phrase) == size and phrase in self.scores:
                yield start + size, self.scores[phrase]

    def lengths(self) -> Counter[int]:
        return Counter(len(render(["", *phrase])) for phrase in self.phrases)


@dataclass(frozen=True)
class Choice:
    """One of several rules, drawn by weight."""

    options: Sequence[Rule]
    weights: Sequence[float]

    def sample(self, rng: random.Random) -> tuple[list[str], float]:
        (option,) = rng.choices(self.options, self.weights)
        return option.sample(rng)

    def parse(self, tokens: Sequence[str], start: int) -> Iterator[tuple[int, float]]:
        for option in self.options:
            yield from option.parse(tokens, start)

    def lengths(self) -> Counter[int]:
        return sum((option.lengths() for option in self.options), Counter())


@dataclass(frozen=True)
class Chain:
    """Rules one after another; `combine` makes one score out of theirs."""

    parts: Sequence[Rule]
    combine: Callable[[Sequence[float]], float]

    def sample(self, rng: random.Random) -> tuple[list[str], float]:
        phrases, scores = zip(*(part.sample(rng) for part in self.parts), strict=True)
        return [token for phrase in phrases for token in phrase], self.combine(scores)

    def parse(self, tokens: Sequence[str], start: int) -> Iterator[tuple[int, float]]:
        for end, scores in self._parse_parts(tokens, start, ()):
            yield end, self.combine(scores)

    def _parse_parts(
        self, tokens: Sequence[str], start: int, scores: tuple[float, ...]
    ) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Parses the parts that have no score yet, with backtracking."""
        if len(scores) == len(self.parts):
            yield start, scores
            return
        for end, score in self.parts[len(scores)].parse(tokens, start):
            yield from self._parse_parts(tokens, end, (*scores, score))

    def lengths(self) -> Counter[int]:
        total = Counter({0: 1})
        for part in self.parts:
            total, head, tail = Counter(), total, part.lengths()
            for head_length, head_count in head.items():
                for tail_length, tail_count in tail.items():
                    total[head_length + tail_length] += head_count * tail_count
        return total


def neutral(phrases: Sequence[str]) -> Words:
    """Phrases that do not change the score of what they stand beside."""
    return Words(dict.fromkeys(phrases, 1.0))


def chain(*parts: Rule | str, weights: Sequence[float] | None = None) -> Chain:
    """Parts in a row, strings literally: scores multiply, or add up under `weights`."""
    rules = [neutral([part]) if isinstance(part, str) else part for part in parts]
    if weights is None:
        return Chain(rules, math.prod)
    return Chain(rules, lambda scores: sum(w * score for w, score in zip(weights, scores, strict=True)))


def either(*options: Rule) -> Choice:
    """One of the options, all equally likely."""
    return Choice(options, [1] * len(options))


def maybe(rule: Rule, chance: float) -> Choice:
    """The rule, or nothing at all."""
    return Choice([rule, neutral([""])], [chance, 1 - chance])


# tables: the words and their scores


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that `clause` can be cached
class Topic:
    """Nouns that can be reviewed and the adjectives that fit them."""

    nouns: Sequence[str]
    adjectives: Mapping[str, float]


@dataclass(frozen=True)
class Domain:
    """Topics that belong in one review, and what a reviewer may do again."""

    topics: Sequence[Topic]
    returns: Sequence[str]


GENERAL = {"good": 1, "great": 1.5, "perfect": 2, "bad": -1, "poor": -1.5, "awful": -2}

FOOD = Topic(
    ["soup", "pasta", "bread", "cake", "coffee", "salad"],
    {"fresh": 1, "tasty": 1.5, "delicious": 2, "bland": -1, "stale": -1.5, "disgusting": -2},
)
STAFF = Topic(
    ["staff", "waiter", "chef", "owner", "service"],
    {"helpful": 1, "friendly": 1.5, "wonderful": 2, "slow": -1, "rude": -1.5, "hostile": -2},
)
PLACE = Topic(
    ["room", "terrace", "kitchen", "garden", "bar"],
    {"clean": 1, "cosy": 1.5, "beautiful": 2, "noisy": -1, "dirty": -1.5, "horrible": -2},
)
STORY = Topic(
    ["plot", "story", "ending", "script", "dialogue"],
    {"funny": 1, "clever": 1.5, "brilliant": 2, "silly": -1, "boring": -1.5, "dreadful": -2},
)
PLAYERS = Topic(
    ["cast", "acting", "hero", "villain", "director"],
    {"charming": 1, "moving": 1.5, "superb": 2, "wooden": -1, "lazy": -1.5, "hopeless": -2},
)
CRAFT = Topic(
    ["music", "scenery", "editing", "opening", "sound"],
    {"elegant": 1, "striking": 1.5, "stunning": 2, "dated": -1, "clumsy": -1.5, "painful": -2},
)

DOMAINS = [
    Domain([FOOD, STAFF, PLACE], ["return", "come back", "recommend it", "eat here again"]),
    Domain([STORY, PLAYERS, CRAFT], ["watch it again", "recommend it", "see it twice", "buy a copy"]),
]

VERBS = {"liked": 1, "enjoyed": 1.5, "loved": 2, "disliked": -1, "resented": -1.5, "hated": -2}
NEGATED_VERBS = {"like": 1, "enjoy": 1.5, "mind": -1, "resent": -1.5}
COMPARATIVES = {"better": 1, "worse": -1}
RESOLVES = {"probably": 0.25, "gladly": 0.5, "happily": 0.5, "hardly": -0.25, "not": -0.5, "never": -0.5}

DEGREES = {"slightly": 0.5, "fairly": 0.75, "very": 1.25, "really": 1.25}
EXTREME_DEGREES = {"almost": 0.75, "truly": 1.25, "simply": 1.25}
VERB_DEGREES = {"rather": 0.75, "really": 1.25, "truly": 1.25}
MARGINS = {"slightly": 0.5, "much": 1.5, "far": 1.5}
NEGATIONS = {"not": -0.5, "never": -0.75}

OPENERS = ["overall", "honestly", "today", "last night", "this time"]
SPEAKERS = neutral(["i", "we"])
OPINIONS = neutral(["thought", "felt"])
STANDARDS = neutral(["expected", "usual", "before"])


# productions: a `leaning` of 1 makes a phrase favourable, -1 unfavourable


def leaning_words(scores: Mapping[str, float], leaning: int) -> Words:
    """The words of a table that lean one way."""
    return Words({word: score for word, score in scores.items() if score * leaning > 0})


def adjectives(topic: Topic, leaning: int, extreme: bool = False) -> Words:
    """The topic's adjectives; the extreme ones take other degrees and no negation ("not very awful")."""
    fitting = {**GENERAL, **topic.adjectives}
    return leaning_words({word: score for word, score in fitting.items() if (abs(score) == 2) == extreme}, leaning)


def description(topic: Topic, leaning: int) -> Rule:
    """ "fresh", "very fresh", "truly delicious"."""
    return Choice(
        [
            chain(maybe(Words(DEGREES), 0.6), adjectives(topic, leaning)),
            chain(maybe(Words(EXTREME_DEGREES), 0.5), adjectives(topic, leaning, extreme=True)),
        ],
        weights=[3, 2],
    )


def predicate(topic: Topic, leaning: int) -> Rule:
    """ "very fresh", "never boring", "much better than usual", "slow but friendly"."""
    liked, disliked = adjectives(topic, leaning), adjectives(topic, -leaning)
    negated = chain(Words(NEGATIONS), maybe(Words({"very": DEGREES["very"]}), 0.3), disliked)
    compared = chain(maybe(Words(MARGINS), 0.5), leaning_words(COMPARATIVES, leaning), "than", STANDARDS)
    balanced = chain(disliked, "but", liked, weights=(1 / 3, 0, 2 / 3))
    return Choice([description(topic, leaning), negated, compared, balanced], weights=[7, 2, 1, 1])


@cache
def clause(topic: Topic, leaning: int) -> Rule:
    """One judgement of one noun: "i thought the soup was bland", "we did not enjoy the soup"."""
    noun = neutral(topic.nouns)
    was = chain(maybe(chain(SPEAKERS, OPINIONS), 0.25), "the", noun, "was", predicate(topic, leaning))
    found = chain(SPEAKERS, "found the", noun, description(topic, leaning))
    verb = chain(maybe(Words(VERB_DEGREES), 0.5), leaning_words(VERBS, leaning))
    negated_verb = chain("did", Words({"not": -0.5}), leaning_words(NEGATED_VERBS, -leaning))
    verbal = chain(SPEAKERS, Choice([verb, negated_verb], weights=[3, 1]), "the", noun)
    return Choice([was, found, verbal], weights=[6, 1, 3])


def two_clauses(
    domain: Domain,
    before: str,
    between: str,
    leanings: tuple[int, int],
    weights: tuple[float, float],
) -> Rule:
    """Clauses on two different topics, with the words `before` and `between` them."""
    (first, second), (first_weight, second_weight) = leanings, weights
    return either(
        *(
            chain(
                *(before, clause(a, first), between, clause(b, second)),
                weights=(0, first_weight, 0, second_weight),
            )
            for a, b in permutations(domain.topics, 2)
        )
    )


def body(domain: Domain, leaning: int) -> Rule:
    """One clause or two; the leaning is that of the only or the weightier one."""
    same, opposite = (leaning, leaning), (-leaning, leaning)
    one = either(*(clause(topic, leaning) for topic in domain.topics))
    both = two_clauses(domain, "", "and", same, (1 / 2, 1 / 2))
    but = two_clauses(domain, "", ", but", opposite, (1 / 3, 2 / 3))
    although = two_clauses(domain, "although", ",", opposite, (1 / 3, 2 / 3))
    opened = chain(maybe(neutral(OPENERS), 0.25), Choice([one, both, but], weights=[4, 1, 1]))
    return Choice([opened, although], weights=[5, 1])


def review(domain: Domain, leaning: int) -> Rule:
    """A body, and perhaps a sentence on whether the reviewer would do it again."""
    again = chain(SPEAKERS, "would", leaning_words(RESOLVES, leaning), neutral(domain.returns))
    short = chain(body(domain, leaning), ".")
    long = chain(body(domain, leaning), ".", again, ".", weights=(1, 0, 1, 0))
    return Choice([short, long], weights=[2, 1])


REVIEW = either(*(review(domain, leaning) for domain in DOMAINS for leaning in (1, -1)))

NOUNS = {noun for domain in DOMAINS for topic in domain.topics for noun in topic.nouns}
CHARGED = {*VERBS, *NEGATED_VERBS, *VERB_DEGREES}  # the words before a noun that commit to a rating

# text: what the rest of the library sees


@dataclass(frozen=True)
class Review:
    """A review and its true rating, in [1, 5]."""

    text: str
    rating: float


def render(tokens: Sequence[str]) -> str:
    """Words apart, punctuation close to the word before it."""
    return " ".join(tokens).replace(" ,", ",").replace(" .", ".")


def tokenize(text: str) -> list[str]:
    """Words and punctuation marks; whatever else the text holds is left out."""
    return re.findall(r"[a-z]+|[,.]", text)


def stars(score: float) -> float:
    """Maps scores in [-2.5, 2.5] linearly onto [1, 5] and clamps the others; two decimals."""
    share = (score + MAX_SCORE) / (2 * MAX_SCORE)
    return round(MIN_STARS + (MAX_STARS - MIN_STARS) * min(max(share, 0.0), 1.0), 2)


def parses(text: str) -> list[float]:
    """The rating of every reading of the text: one for a review, none for anything else."""
    tokens = tokenize(text)
    if render(tokens) != text or not MIN_CHARS <= len(text) <= MAX_CHARS:
        return []
    return [stars(score) for end, score in REVIEW.parse(tokens, 0) if end == len(tokens)]


def rate(text: str) -> float | None:
    """The true rating of a review, or None where the text is not one."""
    return next(iter(parses(text)), None)


def accepts(text: str) -> bool:
    """Whether the text is a review of this language."""
    return rate(text) is not None


def sample_review(rng: random.Random) -> Review:
    """Draws reviews until one has a length within the bounds."""
    while True:
        tokens, score = REVIEW.sample(rng)
        text = render(tokens)
        if MIN_CHARS <= len(text) <= MAX_CHARS:
            return Review(text, stars(score))


def corpus(size: int, seed: int) -> list[Review]:
    """`size` reviews with distinct texts, the same ones for the same seed."""
    rng = random.Random(seed)
    found: dict[str, Review] = {}
    while len(found) < size:
        drawn = sample_review(rng)
        found.setdefault(drawn.text, drawn)
    return list(found.values())


def noisy_rating(rating: float, rng: random.Random, noise: float = 0.7) -> int:
    """The stars a human would click: Gaussian noise on the true rating, rounded to 1..5."""
    return min(max(round(rng.gauss(rating, noise)), MIN_STARS), MAX_STARS)


def opening(text: str) -> str:
    """The start of a review that leaves its rating open: "the soup", "although we did not".

    It ends with the first noun, or before the first charged word; no space follows, so that a
    completion begins with one.
    """
    words = tokenize(text)
    for index, word in enumerate(words):
        if word in NOUNS:
            return render(words[: index + 1])
        if word in CHARGED:
            return render(words[:index])
    return text


def sample_prompt(rng: random.Random) -> str:
    """The opening of a fresh review, of two words or more, without a trailing space (see `opening`)."""
    while True:
        prompt = opening(sample_review(rng).text)
        if " " in prompt:
            return prompt


def count_sentences() -> int:
    """The exact number of reviews: every one has a single parse, so counting parses counts texts."""
    lengths = REVIEW.lengths()  # one more than the text's, for the space before its first word
    return sum(count for length, count in lengths.items() if MIN_CHARS <= length - 1 <= MAX_CHARS)
