"""How questions are put: as a user's message, after a document, with a word on how to answer."""

from __future__ import annotations

from steersman.pairs import Content

SHORT = "Answer with as few words as possible."


def asked(text: str) -> Content:
    """A chat of one message of the user's."""
    return [{"role": "user", "content": text}]


def question(text: str, *instructions: str) -> Content:
    """A question by itself."""
    return asked("\n\n".join((f"Question: {text.strip()}", *instructions)))


def question_on(document: str, text: str, *instructions: str) -> Content:
    """A question after the document that answers it."""
    return asked("\n\n".join((f"Document: {document.strip()}", f"Question: {text.strip()}", *instructions)))


def as_text(content: Content) -> Content:
    """A chat as a plain text for a model without a chat template: its messages, then `Answer:`."""
    if isinstance(content, str):
        return content
    return "\n\n".join([*(message["content"] for message in content), "Answer:"])
