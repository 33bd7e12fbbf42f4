"""Dialogue, apart from the rows that make it: those import pyarrow, whose threads keep a process from forking."""

from __future__ import annotations


class Dialogue(str):
    """A prompt of several messages, (role, content) each: the text of all, and the messages beside it."""

    messages: list[tuple[str, str]]

    def __new__(cls, messages: list[tuple[str, str]]) -> Dialogue:
        self = super().__new__(cls, "\n\n".join(content for _, content in messages))
        self.messages = messages
        return self

    def __getnewargs__(self) -> tuple[list[tuple[str, str]]]:  # for pickle
        return (self.messages,)
