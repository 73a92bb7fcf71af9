"""Hidden states of a target on their way to the drafts that read them.

The target sends those of each committed token once, in order, as they come to be: of a prompt chunk by chunk, of a text
with the outcomes. Frames may be lost, and large ones may come after small ones: a draft lays aside what is not yet its
turn, and asks again when too much lies there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ssd_ray.errors import ProtocolError
from ssd_ray.wire import States, StatesDtype

DTYPES: dict[StatesDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

PIECE_BYTES = 1 << 22
"""Numbers in one message."""

MOST = 4096
"""Messages that are laid aside at most."""

PATIENCE = 4
"""Messages of one sequence that are laid aside before what is missing is asked for, again and again."""


def to_messages(sequence: int, start: int, states: Tensor) -> Iterator[States]:
    """Messages that bring states [tokens, numbers], of tokens from position ``start`` on."""
    name = next(name for name, dtype in DTYPES.items() if dtype == states.dtype)
    step = max(1, PIECE_BYTES // max(1, states[:1].nbytes))
    for first in range(0, len(states), step):
        piece = states[first : first + step].contiguous()
        numbers = memoryview(piece.view(torch.uint8).cpu().numpy().tobytes())
        yield States(sequence, start + first, len(piece), name, numbers)


def from_message(message: States, numbers: int) -> Tensor:
    """The states in a message, [tokens, numbers].

    Raises:
        ProtocolError: it does not have so many numbers of each token.
    """
    dtype = DTYPES[message.dtype]
    if len(message.numbers) != message.count * numbers * dtype.itemsize:
        raise ProtocolError(f"{len(message.numbers)} bytes of states of {message.count} tokens with {numbers} each")
    raw = torch.from_numpy(np.frombuffer(message.numbers, np.uint8).copy())
    return raw.view(dtype).view(message.count, numbers)


class Aside:
    """Messages that a draft has laid aside, by sequence and in the order of their tokens."""

    def __init__(self) -> None:
        self._messages: dict[int, dict[int, States]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._messages.values()))

    def put(self, message: States) -> None:
        """Lay a message aside; those of the sequence that came first go if there are too many."""
        self._messages.setdefault(message.sequence, {})[message.start] = message
        if len(self) > MOST:
            self._messages.pop(next(iter(self._messages)))

    def take(self, sequence: int, read: Callable[[], int], tokens: int) -> Iterator[States]:
        """The messages whose turn it is, now that ``read()`` tokens were read of ``tokens`` that are known."""
        waiting = self._messages.get(sequence, {})
        for start in sorted(waiting):
            message = waiting[start]
            end = start + message.count
            if end <= read():
                del waiting[start]
            elif start <= read() and end <= tokens:
                yield waiting.pop(start)

    def overdue(self, sequence: int) -> bool:
        """Whether it is time to ask for what is missing."""
        count = len(self._messages.get(sequence, ()))
        return count > 0 and count % PATIENCE == 0

    def drop(self, sequence: int) -> None:
        """Forget a sequence."""
        self._messages.pop(sequence, None)
