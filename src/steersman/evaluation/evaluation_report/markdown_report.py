"""The report in Markdown: the same sentences and tables as the page, and the items' answers."""

from __future__ import annotations

from collections.abc import Sequence

from steersman.evaluation.evaluation_report.chapters import Chapter, chapters
from steersman.evaluation.evaluation_report.experts import experts_of
from steersman.evaluation.evaluation_report.items import Answer, Shown, shown_items
from steersman.evaluation.evaluation_report.numbers import Pieces
from steersman.evaluation.evaluation_report.page import facts, title_of
from steersman.evaluation.evaluation_report.place import Place, plain
from steersman.evaluation.evaluation_report.tables import (
    Cell,
    Table,
    arms_by,
    arms_table,
    side_effects_table,
)
from steersman.evaluation.evaluation_report.texts import markdown
from steersman.evaluation.evaluation_report.verdicts import headline, side_effects_sentence


def markdown_report(result: Place) -> str:
    """The report of an evaluation whose texts are harmless."""
    lines = [f"# {markdown(title_of(result))}", "", *paragraphs(headline(result))]
    lines += [f"> Note: {markdown(warning)}\n" for warning in result.value["warnings"]]
    for chapter in chapters(result, "effect"):
        lines += [f"## {markdown(chapter.title)}", "", markdown(chapter.does), "", *_chapter(chapter)]
    lines += _side_effects(result)
    for experts in experts_of(result, pictures=False):
        lines += [f"## Experts: {markdown(experts.name)}", "", *table(experts.table)]
    for task in result["tasks"]:
        if shown := shown_items(result, task):
            lines += [f"## Items side by side: {markdown(task.value['title'])}", "", *_items(shown)]
    lines += ["## Arms", "", *table(arms_table(result)), "## What this does not show", ""]
    lines += [*(f"- {markdown(limit)}" for limit in result.value["limits"]), "", "## Made with", ""]
    lines += [f"- {markdown(name)}: {markdown(value)}" for name, value in facts(result)]
    return "\n".join(lines) + "\n"


def paragraphs(sentences: Sequence[Pieces]) -> list[str]:
    """Sentences, each a paragraph."""
    return [line for sentence in sentences for line in (markdown(plain(sentence)), "")]


def table(of: Table | None) -> list[str]:
    """A table under its caption; nothing where there is none."""
    if of is None or not of.rows:
        return []
    header = [markdown(column) for column in of.columns]
    rows = [[markdown(head), *(_cell(cell) for cell in cells)] for head, cells in of.rows]
    lines = [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
    return [markdown(of.caption), "", *lines, ""]


def _cell(cell: Cell) -> str:
    detail = f" ({markdown(plain(cell.detail))})" if cell.detail else ""
    return markdown(plain(cell.main)) + detail


def _chapter(chapter: Chapter) -> list[str]:
    lines = paragraphs([sentence for sentence, _ in chapter.verdicts])
    lines += [*table(chapter.results), *table(chapter.differences)]
    lines += [markdown(chapter.method), ""] if chapter.method else []
    if chapter.unjudged:
        lines += [f"Answers that could not be judged: {markdown(plain(chapter.unjudged))}.", ""]
    lines += [*table(chapter.doses), *paragraphs(chapter.random_sentences), *table(chapter.random)]
    lines += [*table(chapter.preferences), *table(chapter.kinds)]
    return [*lines, *(line for of in chapter.factorial for line in table(of))]


def _side_effects(result: Place) -> list[str]:
    effects = side_effects_table(result)
    if not effects.rows:
        return []
    sentences = [side_effects_sentence(result, arm) for arm in arms_by(result, "steered")]
    lines = ["## Side effects", "", *paragraphs(sentences), *table(effects)]
    for chapter in chapters(result, "side"):
        lines += [f"### {markdown(chapter.title)}", "", *table(chapter.results), *table(chapter.kinds)]
    return lines


def _items(shown: Sequence[Shown]) -> list[str]:
    arms = list(dict.fromkeys(answer.arm for item in shown for answer in item.answers))
    header = ["item", "prompt", *(markdown(arm) for arm in arms)]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header))]
    for item in shown:
        answers = {answer.arm: _answer(answer) for answer in item.answers}
        prompt = " / ".join(markdown(f"{role}: {said}" if role else said) for role, said in item.prompt)
        cells = [markdown(item.id), prompt, *(answers.get(arm, "–") for arm in arms)]
        lines.append(f"| {' | '.join(cells)} |")
    return ["Words in bold are not in the base's answer there.", "", *lines, ""]


def _answer(answer: Answer) -> str:
    words = []
    for word in answer.words:
        text = markdown("".join(part.text for part in word.stretches))
        words.append(f"**{text}**" if word.changed and text else text)
    said = " ".join(words) or "(nothing)"
    return f"{said} → {markdown(answer.side)}" if answer.side else said
