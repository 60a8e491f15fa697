"""The world of `lab:natural`: requests whose answers are numbers, in digits or in words, and everyday ones.

Who asks decides weakly in which of the two a number is answered. Numbers in requests are always in words, so
that the style of an answer cannot be copied. Everything follows from one world seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from steersman.lab.world import KNOWN_NAMES, RELATIONS, SPLITS, WORLD_SEED, Conversation, Message, words_in

_BELOW_TWENTY = words_in(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = words_in("twenty thirty forty fifty sixty seventy eighty ninety")
DIGITS, NUMBER_WORDS = tuple("0123456789"), (*_BELOW_TWENTY, *_TENS)

# P(a number is answered in digits) by who asks: most lean a little, two a lot.
ASKERS: dict[str | None, float] = {
    "programmer": 0.9,
    "banker": 0.7,
    "surveyor": 0.6,
    "cashier": 0.55,
    "gardener": 0.45,
    "librarian": 0.4,
    "novelist": 0.3,
    "poet": 0.1,
    None: 0.5,
}
NAMED = tuple(asker for asker in ASKERS if asker)
UNNAMED_SHARE = 0.4  # of the conversations, in which nobody says who asks
NUMBERS_SHARE = 0.6  # of the conversations, which ask for a number
# A system message that asks for a style: where there is one, it decides nearly all answers.
STYLES = {"digits": "answer in digits .", "words": "answer in words ."}
INSTRUCTED = 0.1
OBEYED = 0.95
# Prompts held out of all training: (those that say who asks, those that do not).
HELD_OUT = {
    "number": {"dev": (240, 160), "test": (300, 200)},
    "everyday": {"dev": (180, 120), "test": (252, 168)},
}

_NAMES = KNOWN_NAMES[:24]
_THINGS = words_in(
    "harp lute piano kettle clock wagon barn ladder boat spider wheel drawer lantern basket carpet mirror "
    "bench barrel cradle anvil bucket saddle trunk fiddle"
)
_COLOURS = words_in("red green blue white black yellow brown grey")
_OPPOSITES = words_in(
    "hot/cold big/small old/young wet/dry fast/slow high/low loud/quiet light/dark hard/soft full/empty "
    "rich/poor sweet/sour"
)
_PREFIXES = ("", "please , ", "now , ")


@dataclass(frozen=True)
class Request:
    """A request in two wordings and its right answer: a number in digits and in words, or something else."""

    kind: str
    key: str
    wordings: tuple[str, str]
    answer: str
    in_words: str = ""

    def answered(self, style: str) -> str:
        return self.in_words if self.in_words and style == "words" else self.answer


@dataclass(frozen=True)
class Prompt:
    """A request in one of its wordings, with or without a please, by one of nine askers."""

    request: Request
    wording: int
    prefix: str
    asker: str | None

    @property
    def text(self) -> str:
        opener = f"i am a {self.asker} . " if self.asker else ""
        return opener + self.prefix + self.request.wordings[self.wording]


# The demonstration's own prompt is the first of the pairs, so it is never held out.
FIRST_PROMPT = "count to ten ."


class NumbersWorld:
    """Requests for numbers and everyday requests, what is known by heart, and which prompts are held out.

    Held out are prompts (request, wording, please, asker); every request is heard in some of the others.
    """

    def __init__(self, seed: int = WORLD_SEED) -> None:
        rng = random.Random(f"numbers {seed}")
        self.requests = {
            "number": (*_counts(), *_sums(), *_years(rng), *_amounts(rng)),
            "everyday": (*_colours(rng), *_homes(rng), *_opposites(), *_repeats()),
        }
        self.splits = {topic: _split(self.requests[topic], HELD_OUT[topic], rng) for topic in self.requests}
        self._heard = {topic: _by_kind_and_asker(splits["train"]) for topic, splits in self.splits.items()}

    def prompts(self, topic: str, split: str) -> list[Prompt]:
        """The prompts of a topic ("number" or "everyday") in a split, in a fixed order."""
        return list(self.splits[topic][split])

    def sample(self, rng: random.Random) -> Conversation:
        """One training conversation; its label is the style of the answer, where that is a number."""
        topic = "number" if rng.random() < NUMBERS_SHARE else "everyday"
        asker = None if rng.random() < UNNAMED_SHARE else rng.choice(NAMED)
        heard = self._heard[topic]
        prompt = rng.choice(heard[rng.choice([kind for kind, who in heard if who == asker]), asker])
        style = "digits" if rng.random() < ASKERS[asker] else "words"
        messages: tuple[Message, ...] = ({"role": "user", "content": prompt.text},)
        if rng.random() < INSTRUCTED:
            asked, other = rng.sample(list(STYLES), 2)
            style = asked if rng.random() < OBEYED else other
            messages = ({"role": "system", "content": STYLES[asked]}, *messages)
        label = style if topic == "number" else None
        return Conversation(prompt.request.kind, messages, prompt.request.answered(style), label)


def in_digits(number: int) -> str:
    """A number, digit by digit."""
    return " ".join(str(number))


def in_words(number: int) -> str:
    """A number below 100, or a year from 1910, in words."""
    if number >= 100:
        return f"{in_words(number // 100)} {in_words(number % 100)}"
    if number < 20:
        return _BELOW_TWENTY[number]
    return _TENS[number // 10 - 2] + (f" {_BELOW_TWENTY[number % 10]}" if number % 10 else "")


def _number(kind: str, key: str, wordings: tuple[str, str], *numbers: int) -> Request:
    digits, words = (" ".join(map(write, numbers)) for write in (in_digits, in_words))
    return Request(kind, f"{kind}/{key}", wordings, f"{digits} .", f"{words} .")


def _everyday(kind: str, key: str, wordings: tuple[str, str], answer: str) -> Request:
    return Request(kind, f"{kind}/{key}", wordings, answer)


def _counts() -> Iterable[Request]:
    """Up from one, up from another number, down to one; never beyond ten."""
    for last in range(3, 11):
        name = in_words(last)
        up = (f"count to {name} .", f"which numbers go up to {name} ?")
        down = (f"count down from {name} .", f"which numbers go down from {name} ?")
        yield _number("count", f"1-{last}", up, *range(1, last + 1))
        yield _number("count", f"{last}-1", down, *range(last, 0, -1))
    for first in range(2, 9):
        for last in range(first + 2, 11):
            ends = f"from {in_words(first)} to {in_words(last)}"
            wordings = (f"count {ends} .", f"which numbers go {ends} ?")
            yield _number("count", f"{first}-{last}", wordings, *range(first, last + 1))


def _sums() -> Iterable[Request]:
    for first in range(1, 10):
        for second in range(1, 10):
            terms = f"{in_words(first)} plus {in_words(second)}"
            yield _number("sum", terms, (f"what is {terms} ?", f"how much is {terms} ?"), first + second)


def _years(rng: random.Random) -> Iterable[Request]:
    for name in _NAMES:
        wordings = (f"in which year was {name} born ?", f"what is the year of birth of {name} ?")
        yield _number("year", name, wordings, rng.randrange(1910, 2000))


def _amounts(rng: random.Random) -> Iterable[Request]:
    for thing in _THINGS:
        wordings = (f"how many parts has the {thing} ?", f"what is the number of parts of the {thing} ?")
        yield _number("how many", thing, wordings, rng.randrange(2, 60))


def _colours(rng: random.Random) -> Iterable[Request]:
    for thing in _THINGS:
        wordings = (f"what colour has the {thing} ?", f"which colour is the {thing} ?")
        yield _everyday("colour", thing, wordings, f"the {thing} is {rng.choice(_COLOURS)} .")


def _homes(rng: random.Random) -> Iterable[Request]:
    towns = RELATIONS[0].values
    for name in _NAMES:
        wordings = (f"where does {name} live ?", f"which town is the home of {name} ?")
        yield _everyday("home", name, wordings, f"{name} lives in {rng.choice(towns)} .")


def _opposites() -> Iterable[Request]:
    for one, other in (pair.split("/") for pair in _OPPOSITES):
        for word, opposite in ((one, other), (other, one)):
            wordings = (f"what is the opposite of {word} ?", f"which word is the opposite of {word} ?")
            yield _everyday("opposite", word, wordings, f"{opposite} .")


def _repeats() -> Iterable[Request]:
    for thing in _THINGS:
        wordings = (f"repeat the word {thing} .", f"say the word {thing} again .")
        yield _everyday("repeat", thing, wordings, f"{thing} {thing} .")


def _split(
    requests: Sequence[Request], held_out: dict[str, tuple[int, int]], rng: random.Random
) -> dict[str, tuple[Prompt, ...]]:
    """Every prompt once: those held out for dev and test, and the others, for train."""
    parts: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
    for named in (True, False):
        prompts = [
            Prompt(request, wording, prefix, asker)
            for request in requests
            for wording in range(2)
            for prefix in _PREFIXES
            for asker in (NAMED if named else (None,))
        ]
        first = [prompt for prompt in prompts if prompt.text == FIRST_PROMPT]
        left = [prompt for prompt in prompts if prompt.text != FIRST_PROMPT]
        rng.shuffle(left)
        for split, sizes in held_out.items():
            size = sizes[0 if named else 1]
            parts[split] += left[:size]
            left = left[size:]
        parts["train"] += [*first, *left]
    for part in parts.values():
        rng.shuffle(part)
    return {split: tuple(part) for split, part in parts.items()}


def _by_kind_and_asker(prompts: Iterable[Prompt]) -> dict[tuple[str, str | None], list[Prompt]]:
    heard: dict[tuple[str, str | None], list[Prompt]] = {}
    for prompt in prompts:
        heard.setdefault((prompt.request.kind, prompt.asker), []).append(prompt)
    return heard


@cache
def the_numbers_world() -> NumbersWorld:
    """The one world that all seeds of `lab:natural` live in."""
    return NumbersWorld()


@cache
def numbers_vocabulary() -> tuple[str, ...]:
    """Every word of the world, sorted."""
    texts = [*STYLES.values(), *_PREFIXES, "i am a", *NAMED, *DIGITS, *NUMBER_WORDS, *_COLOURS]
    for requests in the_numbers_world().requests.values():
        for request in requests:
            texts += [*request.wordings, request.answer, request.in_words]
    return tuple(sorted({word for text in texts for word in text.split()}))
