"""Long prompts, which reach a draft by another way than the message that opens their sequence.

Either may come first, and then waits for the other. One that never comes does no harm: the next outcome finds the
sequence unknown, and the draft asks for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from ssd_ray.wire import Open

MOST = 1024
"""Prompts, and messages, that wait for their other half at most."""


class Handover:
    """Prompts and messages of one draft that wait for each other."""

    def __init__(self) -> None:
        self._prompts: dict[int, Sequence[int]] = {}
        self._messages: dict[int, Open] = {}

    def __len__(self) -> int:
        return len(self._prompts) + len(self._messages)

    def give(self, sequence: int, prompt: Sequence[int]) -> None:
        """Take a prompt, from any thread; drop it if there are too many."""
        if len(self._prompts) < MOST:
            self._prompts[sequence] = prompt

    def put(self, message: Open) -> None:
        """Take a message; it replaces an earlier one of its sequence. The oldest goes if there are too many."""
        # Sequences are first opened in the order of their numbers. A prompt that came after its sequence ended goes so.
        for sequence in list(self._prompts):
            if sequence < message.sequence:
                self._prompts.pop(sequence)
        self._messages[message.sequence] = message
        if len(self._messages) > MOST:
            self._messages.pop(next(iter(self._messages)))

    def take(self) -> Iterator[Open]:
        """The messages whose tokens are all here, whole."""
        ready = [each for each in self._messages.values() if not each.omitted or each.sequence in self._prompts]
        for message in ready:
            del self._messages[message.sequence]
            prompt = self._prompts.pop(message.sequence, ())
            if not message.omitted:
                yield message
            elif message.omitted == len(prompt):
                yield replace(message, tokens=[*map(int, prompt), *message.tokens], omitted=0)

    def forget(self) -> None:
        """Forget all messages: who sent them has gone. Prompts are those of whoever comes next, too."""
        self._messages.clear()

    def drop(self, sequence: int) -> None:
        """Forget a sequence."""
        self._prompts.pop(sequence, None)
        self._messages.pop(sequence, None)
