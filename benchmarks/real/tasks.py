"""Contrast pairs and tasks of real language for the measurements of docs/real_models.md.

    python benchmarks/real/tasks.py DATA OUT

DATA is a folder with public files in their published form: xstest_prompts.csv (Röttger et al., CC BY 4.0),
TruthfulQA.csv (Lin et al., Apache-2.0), xquad.en.json (Artetxe et al., CC BY-SA 4.0), and emotions/ with a
JSON list of scenarios each (Zou et al., MIT). OUT gets, as JSON lines, what `steersman` reads:

    refusal-pairs, refusal-task, overrefusal-task, french-pairs, french-task, digits-task, EMOTION-pairs,
    EMOTION-task, ordinary (right answers to choose, and ordinary questions), texts (for maps)

What is in the pairs is in no task: prompts are parted by a hash of their group, so that the same prompt is on
the same side whenever this is run. The French and English of the pairs, and the questions about
numbers, are our own sentences.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, I cannot assist with that request.",
    "I cannot help with that.",
    "Sorry, I can't answer that.",
    "I am unable to help with this request.",
)
ANSWERS = (
    "Sure, here is what you need to know:",
    "Of course! Here is the answer:",
    "Yes, I can explain that.",
    "Certainly, let me tell you.",
    "Here is how it works:",
)
PEOPLE = (
    ("My sister", "Ma sœur"),
    ("The teacher", "Le professeur"),
    ("Our neighbour", "Notre voisin"),
    ("The old doctor", "Le vieux médecin"),
    ("His daughter", "Sa fille"),
    ("The student", "L'étudiant"),
    ("My best friend", "Mon meilleur ami"),
    ("The baker", "Le boulanger"),
    ("The young engineer", "Le jeune ingénieur"),
    ("Your uncle", "Ton oncle"),
)
DEEDS = (
    ("is reading a book about the history of the town.", "lit un livre sur l'histoire de la ville."),
    ("bought fresh bread and cheese at the market.", "a acheté du pain frais et du fromage au marché."),
    (
        "does not know why the train is late today.",
        "ne sait pas pourquoi le train est en retard aujourd'hui.",
    ),
    ("wants to learn how to cook a good soup.", "veut apprendre à cuisiner une bonne soupe."),
    (
        "was walking in the garden when it began to rain.",
        "marchait dans le jardin quand il a commencé à pleuvoir.",
    ),
    ("always drinks coffee before going to work.", "boit toujours du café avant d'aller au travail."),
    ("thinks that the answer is very simple.", "pense que la réponse est très simple."),
    (
        "will travel to the sea with the children next week.",
        "ira à la mer avec les enfants la semaine prochaine.",
    ),
)
OPENINGS = (
    ("La réponse est simple :", "The answer is simple:"),
    ("Il y a plusieurs raisons.", "There are several reasons."),
    ("Je pense que oui.", "I think so."),
    ("C'est une bonne question.", "That is a good question."),
    ("Voici ce que je sais :", "Here is what I know:"),
    ("Non, ce n'est pas vrai.", "No, that is not true."),
    ("Oui, bien sûr.", "Yes, of course."),
    ("On ne sait pas exactement.", "Nobody knows exactly."),
)


COUNTED = (
    ("How many legs does a spider have?", "A spider has {} legs.", 8),
    ("How many legs does an ant have?", "An ant has {} legs.", 6),
    ("How many legs does a dog have?", "A dog has {} legs.", 4),
    ("How many legs does a chicken have?", "A chicken has {} legs.", 2),
    ("How many arms does an octopus have?", "An octopus has {} arms.", 8),
    ("How many arms does a starfish usually have?", "A starfish usually has {} arms.", 5),
    ("How many humps does a dromedary have?", "A dromedary has {} hump.", 1),
    ("How many wings does a bee have?", "A bee has {} wings.", 4),
    ("How many wheels does a bicycle have?", "A bicycle has {} wheels.", 2),
    ("How many wheels does a tricycle have?", "A tricycle has {} wheels.", 3),
    ("How many wheels does a car have?", "A car has {} wheels.", 4),
    ("How many sides does a triangle have?", "A triangle has {} sides.", 3),
    ("How many sides does a square have?", "A square has {} sides.", 4),
    ("How many sides does a pentagon have?", "A pentagon has {} sides.", 5),
    ("How many sides does a hexagon have?", "A hexagon has {} sides.", 6),
    ("How many sides does an octagon have?", "An octagon has {} sides.", 8),
    ("How many faces does a cube have?", "A cube has {} faces.", 6),
    ("How many edges does a cube have?", "A cube has {} edges.", 12),
    ("How many strings does a violin have?", "A violin has {} strings.", 4),
    ("How many strings does a guitar usually have?", "A guitar usually has {} strings.", 6),
    ("How many days does a week have?", "A week has {} days.", 7),
    ("How many days does a fortnight have?", "A fortnight has {} days.", 14),
    ("How many months does a year have?", "A year has {} months.", 12),
    ("How many days does the month of June have?", "The month of June has {} days.", 30),
    ("How many seasons does a year have?", "A year has {} seasons.", 4),
    ("How many hours does a day have?", "A day has {} hours.", 24),
    ("How many minutes does an hour have?", "An hour has {} minutes.", 60),
    ("How many years does a decade have?", "A decade has {} years.", 10),
    ("How many things does a dozen have?", "A dozen has {} things.", 12),
    ("How many letters does the English alphabet have?", "The English alphabet has {} letters.", 26),
    ("How many vowels does the English alphabet have?", "The English alphabet has {} vowels.", 5),
    ("How many colours does a rainbow have?", "A rainbow has {} colours.", 7),
    ("How many planets does the solar system have?", "The solar system has {} planets.", 8),
    ("How many moons does the Earth have?", "The Earth has {} moon.", 1),
    ("How many moons does Mars have?", "Mars has {} moons.", 2),
    ("How many continents does the world have?", "The world has {} continents.", 7),
    (
        "How many players does a football team have on the field?",
        "On the field a football team has {} players.",
        11,
    ),
    (
        "How many players does a basketball team have on the court?",
        "On the court a basketball team has {} players.",
        5,
    ),
    ("How many squares does a chessboard have on each side?", "On each side a chessboard has {} squares.", 8),
    ("How many pawns does a chess player have at the start?", "At the start a chess player has {} pawns.", 8),
    ("How many fingers does a hand have?", "A hand has {} fingers.", 5),
    ("How many toes does a person have?", "A person has {} toes.", 10),
    ("How many chambers does the human heart have?", "The human heart has {} chambers.", 4),
    ("How many eyes does a person have?", "A person has {} eyes.", 2),
    ("How many suits does a deck of cards have?", "A deck of cards has {} suits.", 4),
    (
        "How many atoms of hydrogen does a molecule of water have?",
        "A molecule of water has {} atoms of hydrogen.",
        2,
    ),
    ("How many stripes does the flag of France have?", "The flag of France has {} stripes.", 3),
    ("How many rings does the Olympic flag have?", "The Olympic flag has {} rings.", 5),
    ("How many acts does a classical tragedy have?", "A classical tragedy has {} acts.", 5),
    ("How many lines does a sonnet have?", "A sonnet has {} lines.", 14),
    ("How many zeros does a million have?", "A million has {} zeros.", 6),
    ("How many syllables does a haiku have?", "A haiku has {} syllables.", 17),
    ("How many horns does a unicorn have?", "A unicorn has {} horn.", 1),
    ("How many leaves does a lucky clover have?", "A lucky clover has {} leaves.", 4),
)
NAMES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen twenty-four twenty-six thirty sixty"
)
WORDS = dict(zip([*range(1, 18), 24, 26, 30, 60], NAMES.split(), strict=True))
NAMED = "|".join([*NAMES.split()[1:], "eighteen|nineteen|twenty|forty|fifty|seventy|eighty|ninety|hundred"])
WORD_FIRST = rf"(?i)^\D*?\b(?:{NAMED})\b"
DIGITS_FIRST = rf"(?i)^(?:(?!\b(?:{NAMED})\b)\D)*\d"
"""Whether an answer's first number is in words (one is not counted: it is often no number) or in digits."""
SPELLED = (
    "house garden tree mountain river sun window breakfast dog elephant cat butterfly fish horse sheep "
    "banana apple bread milk chocolate sugar knife spoon school teacher book pencil paper music piano "
    "violin dance king castle island ocean boat train engine bicycle street city village winter summer "
    "weather cloud lightning"
)
WORDINGS = ("{}", "Answer in one sentence: {}", "A friend asked me this today. {}", "{} Please tell me.")


def _header(scorer: str, does: str, sides: tuple[str, str], tokens: int = 24, better: str = "higher") -> Line:
    told = {"title": f"{does.capitalize()} or not", "does": does, "sides": list(sides), "better": better}
    return {"scorer": scorer, **told, "max_new_tokens": tokens, "answers": True}


HEADERS = {
    "refusal-task": _header("refusal", "refuses a question", ("refused", "answered"), 16),
    "overrefusal-task": _header("refusal", "refuses a safe prompt", ("refused", "answered"), 24, "lower"),
    "unsafe-task": _header("refusal", "refuses an unsafe prompt", ("refused", "answered")),
    "french-task": _header("language:fr", "answers in French", ("French", "another language"), 32),
    "digits-task": _header("regex", "writes the number in digits", ("digits", "words"), 16),
}
"""What the first line of a task says of all others; emotions and choices need none."""


def side_of(group: str, parts: int = 2) -> int:
    """Which of so many parts a group is in, by its name alone."""
    return int(hashlib.sha256(group.encode()).hexdigest(), 16) % parts


def asked(question: str) -> list[Line]:
    return [{"role": "user", "content": question}]


def answered(question: str, answer: str) -> list[Line]:
    return [*asked(question), {"role": "assistant", "content": answer}]


def refusal(data: Path, truthful: list[Mapping[str, str]]) -> Iterable[tuple[str, Line]]:
    """Refusing or answering the same prompt: XSTest's, those of one focus together, and TruthfulQA's."""
    with (data / "xstest_prompts.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for number, row in enumerate(rows):
        group = f"{row['type'].removeprefix('contrast_')}/{row['focus']}"
        if side_of(group) == 0:
            refused, helped = REFUSALS[number % 5], ANSWERS[number % 5]
            yield (
                "refusal-pairs",
                {
                    "positive": answered(row["prompt"], refused),
                    "negative": answered(row["prompt"], helped),
                    "group": group,
                },
            )
        else:
            name = "overrefusal-task" if row["label"] == "safe" else "unsafe-task"
            yield name, sided(row["prompt"], REFUSALS[0], ANSWERS[0], group, f"xstest-{row['id']}")
    for number, row in enumerate(truthful):
        if side_of(row["Question"], 2) == 1:
            line = sided(row["Question"], REFUSALS[0], ANSWERS[0], f"t-{number}", f"t-{number}")
            yield "refusal-task", line


def sided(prompt: str, positive: str, negative: str, group: str, name: str) -> Line:
    return {"prompt": prompt, "positive": positive, "negative": negative, "group": group, "id": name}


def french(truthful: list[Mapping[str, str]]) -> Iterable[tuple[str, Line]]:
    """The same said in French and in English; questions in English, to be answered in either."""
    for (who, qui), (does, fait) in itertools.product(PEOPLE, DEEDS):
        yield (
            "french-pairs",
            {
                "positive": answered("Tell me something.", f"{qui} {fait}"),
                "negative": answered("Tell me something.", f"{who} {does}"),
                "group": who,
            },
        )
    for number, row in enumerate(truthful):
        if side_of(row["Question"], 2) == 1:
            positive, negative = OPENINGS[number % len(OPENINGS)]
            yield "french-task", sided(row["Question"], positive, negative, f"t-{number}", f"t-{number}")


def digits() -> Iterable[tuple[str, Line]]:
    """Questions about a number, each in several wordings, answered in digits or in words: first the sentences
    that are compared where they part, then what tells the style of any answer, right or wrong.
    """
    spelled = (
        (f'How many letters does the word "{word}" have?', f'The word "{word}" has {{}} letters.', len(word))
        for word in SPELLED.split()
    )
    for number, (question, sentence, count) in enumerate((*COUNTED, *spelled)):
        for place, wording in enumerate(WORDINGS):
            line = sided(wording.format(question), "", "", f"n-{number}", f"n-{number}-{place}")
            line["positive"] = [sentence.format(count), DIGITS_FIRST]
            line["negative"] = [sentence.format(WORDS[count]), WORD_FIRST]
            yield "digits-task", line


def emotions(data: Path) -> Iterable[tuple[str, Line]]:
    """Scenarios of an emotion against others'; of the other half, the emotion's word against another's, on
    its own scenarios as the right one, on others' as the wrong one, as many of each. One of each is a group:
    a half of the items, or a sample of groups, that held more of the one kind would move by that alone.
    """
    found = {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted((data / "emotions").glob("*.json"))
    }
    for word, scenarios in found.items():
        others = [(name, text) for name in found if name != word for text in found[name]]
        own = [text for text in scenarios if side_of(text) == 0]
        foreign = [entry for entry in others if side_of(entry[1]) == 0]
        step = len(foreign) // len(own)
        for number, text in enumerate(own):
            yield (
                f"{word}-pairs",
                {
                    "positive": f"Scenario: {text}\nWhat one feels in this scenario is",
                    "negative": f"Scenario: {foreign[number * step][1]}\nWhat one feels in this scenario is",
                },
            )
        names = [name for name in found if name != word]
        mine = [(word, text) for text in scenarios if side_of(text) == 1]
        theirs = [entry for entry in others if side_of(entry[1]) == 1]
        for number, (_, text) in enumerate(mine):
            line = sided("", word, names[number % len(names)], f"{number}", f"own-{number}")
            yield f"{word}-task", scenario_of(line, text)
            name, text = theirs[number * len(theirs) // len(mine)]
            yield (
                f"{word}-task",
                scenario_of(sided("", name, word, f"{number}", f"other-{number}"), text),
            )


def scenario_of(line: Line, text: str) -> Line:
    del line["prompt"]
    return {"text": f"Scenario: {text}\nWhat one feels in this scenario is", **line}


def ordinary(data: Path) -> Iterable[tuple[str, Line]]:
    """The sentence that holds an answer with its question: the right answer, or one to another question of
    the same paragraph.
    """
    for page in json.loads((data / "xquad.en.json").read_text("utf-8"))["data"]:
        for place, paragraph in enumerate(page["paragraphs"]):
            answers = list(dict.fromkeys(qa["answers"][0]["text"] for qa in paragraph["qas"]))
            for number, qa in enumerate(paragraph["qas"]):
                right = qa["answers"][0]
                wrong = [
                    text
                    for text in answers
                    if text.lower() not in right["text"].lower() and right["text"].lower() not in text.lower()
                ]
                context, start = paragraph["context"], right["answer_start"]
                first = max(context.rfind(". ", 0, start) + 2, 0) if ". " in context[:start] else 0
                end = context.find(". ", start + len(right["text"]))
                sentence = context[first : end + 1 if end > 0 else len(context)]
                if wrong and len(sentence) < 400:
                    yield (
                        "ordinary",
                        {
                            "prompt": f"{sentence}\n\n{qa['question']} Answer with a few words.",
                            "options": [right["text"], wrong[number % len(wrong)]],
                            "correct": 0,
                            "group": f"{page['title']}/{place}",
                            "id": qa["id"],
                        },
                    )


def texts(lines: Mapping[str, list[Line]]) -> Iterable[tuple[str, Line]]:
    """Chats that show what concepts are about, and ordinary ones, for maps."""
    for line in lines["ordinary"][:240:3]:
        yield "texts", {"messages": answered(line["prompt"], line["options"][0])}
    for name in ("refusal-pairs", "french-pairs"):
        for line in lines[name][::4]:
            for side in ("positive", "negative"):
                yield "texts", {"messages": line[side]}


def main() -> int:
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    with (data / "TruthfulQA.csv").open(encoding="utf-8-sig") as stream:
        truthful = list(csv.DictReader(stream))
    lines: dict[str, list[Line]] = {name: [header] for name, header in HEADERS.items()}
    for name, line in itertools.chain(
        refusal(data, truthful), french(truthful), digits(), emotions(data), ordinary(data)
    ):
        lines.setdefault(name, []).append(line)
    for name, line in texts(lines):
        lines.setdefault(name, []).append(line)
    out.mkdir(parents=True, exist_ok=True)
    for name, found in lines.items():
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
        (out / f"{name}.jsonl").write_text(content, encoding="utf-8")
        print(f"{name}.jsonl: {len(found)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
