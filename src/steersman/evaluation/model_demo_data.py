"""What the demo asks a model of real language: sentences of our own, so that it needs no data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from steersman.evaluation.judges.listed import ListJudge, PhraseList
from steersman.evaluation.judges.numerals import judge_numerals
from steersman.evaluation.judges.phrases import PhraseJudge
from steersman.evaluation.measures import Answers
from steersman.evaluation.tasks import Behaviour, Item, Task
from steersman.evaluation.tasks.asking import asked


def _listed(text: str, by: str = " ") -> list[str]:
    """The entries of a list that is written as a text."""
    return text.split(by)


PIRATE = (
    "Arr, matey, that be a fine question for an old sea dog!",
    "Ahoy, ye scurvy landlubber, hoist the sails and listen!",
    "Shiver me timbers, the treasure be buried on yonder isle!",
    "Avast, me hearties, we sail at dawn for plunder and rum!",
    "Yo ho ho, ye best beware of the captain's cutlass!",
)
PLAIN = (
    "Well, that is a good question for an experienced person.",
    "Hello, please sit down and listen to what I have to say.",
    "I am surprised, the documents are stored in the office.",
    "Please wait, we leave tomorrow for the meeting and lunch.",
    "You should be careful with the manager's instructions.",
)
PIRATES_SAY = _listed(
    "arr aye ahoy avast matey mateys hearties ye yer yea scurvy landlubber plunder cutlass buccaneer "
    "swashbuckler pirate pirates"
)
"""Words of which an answer must have one to count as a pirate's."""
QUESTIONS = (
    "How was your day?",
    "Tell me about your morning.",
    "What do you think of the weather?",
    "How do you feel about your work?",
    "Tell me about your house.",
    "What is your street like?",
    "Describe a walk in the park.",
    "What do you think about Mondays?",
    "How was the dinner?",
    "Tell me about your town.",
    "What is the sea like?",
    "How do you like music?",
    "Tell me about a journey.",
    "What is winter like?",
    "How was the film?",
    "What do you think of the new school?",
    "Tell me about your garden.",
    "What is it like to grow older?",
    "How was the meeting?",
    "Tell me about your best friend.",
)
THINGS = _listed(
    "the moon, bread, the rain, a good book, horses, the desert, football, coffee, the stars, bridges, "
    "a library, trains, the colour blue, bees, chess, the wind, a market, snow, old maps, the piano, "
    "mountains, tea, a lighthouse, painting, dogs, rivers, clocks, the forest, bicycles, islands",
    ", ",
)
DEEDS = _listed(
    "spend my Sunday, learn to cook, sleep better, write a letter, choose a gift, clean a window, plan a "
    "birthday, start running, find a job, repair a chair, learn a language, save money, plant a tree, "
    "make new friends, pack a suitcase, read more, calm a baby, paint a wall, prepare a speech, bake a cake",
    ", ",
)
CAPITALS = dict(
    pair.split(":")
    for pair in _listed(
        "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Japan:Tokyo Russia:Moscow Egypt:Cairo "
        "Greece:Athens Portugal:Lisbon Austria:Vienna Poland:Warsaw Norway:Oslo Sweden:Stockholm "
        "Ireland:Dublin Hungary:Budapest Finland:Helsinki Denmark:Copenhagen Belgium:Brussels Cuba:Havana "
        "Peru:Lima Chile:Santiago Kenya:Nairobi Iran:Tehran Iraq:Baghdad China:Beijing"
    )
)
OPPOSITES = dict(
    pair.split(":")
    for pair in _listed(
        "hot:cold big:small up:down left:right day:night old:young good:bad fast:slow rich:poor hard:soft "
        "open:closed wet:dry happy:sad early:late full:empty heavy:light long:short clean:dirty strong:weak "
        "near:far high:low first:last love:hate win:lose buy:sell"
    )
)
NUMBERS = _listed("zero one two three four five six seven eight nine ten eleven twelve")
COUNTED = _listed(
    "days are in a week:7, months are in a year:12, legs does a spider have:8, wheels does a bicycle have:2, "
    "fingers are on one hand:5, sides does a triangle have:3, seasons are in a year:4, legs does an ant "
    "have:6, planets are in the solar system:8, players does a football team field:11, sides does a "
    "square have:4, toes does a person have:10, wheels does a car have:4, eyes does a person have:2, lives "
    "does a cat have in the proverb:9, colours are in a rainbow:7, strings does a violin have:4, arms "
    "does an octopus have:8, sides does a hexagon have:6, hands does a clock with seconds have:3",
    ", ",
)


def pairs() -> list[dict[str, Any]]:
    """The same question answered by a pirate, and plainly."""
    return [
        {
            "positive": _answered(question, PIRATE[(number + turn) % 5]),
            "negative": _answered(question, PLAIN[(number + turn) % 5]),
            "group": question,
        }
        for number, question in enumerate(QUESTIONS)
        for turn in range(2)
    ]


def pirates() -> Task:
    """Other questions, with how either would begin."""
    phrases = PhraseList("pirates", (), tuple((word,) for word in PIRATES_SAY))
    behaviour = Behaviour(
        "Talking like a pirate",
        "says a pirate's word",
        "pirate",
        "plain",
        ListJudge(phrases),
        Answers(ListJudge(phrases), max_new_tokens=20),
    )
    prompts = [f"Tell me about {thing}." for thing in THINGS] + [f"How should I {deed}?" for deed in DEEDS]
    items = (
        Item(f"pirate-{n}", f"pirate-{n}", asked(prompt), PIRATE[n % 5], PLAIN[n % 5], "")
        for n, prompt in enumerate(prompts)
    )
    return Task("pirates", items, behaviour)


def ordinary() -> Task:
    """Questions with one right answer, which steering is to leave as they are."""
    asked_of = [(f"What is the capital of {country}?", city) for country, city in CAPITALS.items()]
    asked_of += [(f"What is the opposite of {word}?", other) for word, other in OPPOSITES.items()]
    judge = ListJudge(PhraseList("none", (), ()))
    behaviour = Behaviour("Ordinary questions", "answers right", "right", "wrong", judge)
    items = (
        Item(f"ordinary-{n}", f"ordinary-{n}", asked(question), answer, None, "")
        for n, (question, answer) in enumerate(asked_of)
    )
    return Task("ordinary", items, behaviour)


def numerals() -> Task:
    """Questions for a number, which may be said in digits or in words."""
    found = [(f"How many {what}?", int(number)) for what, number in (one.split(":") for one in COUNTED)]
    found += [
        (f"What is {NUMBERS[first]} plus {NUMBERS[second]}?", first + second)
        for first in range(1, 7)
        for second in range(first, 7)
        if first + second < len(NUMBERS)
    ]
    judge = PhraseJudge(judge_numerals)
    behaviour = Behaviour("Numbers in digits", "writes the number in digits", "digits", "words", judge)
    items = (
        Item(f"number-{n}", f"number-{n}", asked(question), str(number), NUMBERS[number].capitalize(), "")
        for n, (question, number) in enumerate(found)
    )
    return Task("digits or words", items, behaviour)


def prompts() -> Iterator[str]:
    """All that is asked anywhere here, once each: what the model says to it is what it is carved on."""
    for task in (pirates(), ordinary(), numerals()):
        for item in task:
            yield item.content if isinstance(item.content, str) else item.content[-1]["content"]
    yield from QUESTIONS


def _answered(question: str, answer: str) -> list[dict[str, str]]:
    return [*asked(question), {"role": "assistant", "content": answer}]
