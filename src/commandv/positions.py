"""Which tokens an intervention acts on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from commandv.arguments import checked
from commandv.errors import InputError

if TYPE_CHECKING:
    import torch

MOST = 9_999_999  # tokens


@checked
@dataclass(frozen=True)
class Positions:
    """Token positions in the notation of pyreft, extended: `l1`, `f3+l5`, `g5`, `all`.

    Attributes:
        first: so many tokens at the prompt's beginning (BOS and template included).
        last: so many at the prompt's end. With both, each is capped at half the prompt, so that they never meet.
        generated: so many of the generated tokens, from the first one on.
        everywhere: every token, prompt and generated.
    """

    first: int = 0
    last: int = 0
    generated: int = 0
    everywhere: bool = False

    def __post_init__(self) -> None:
        if max(self.first, self.last, self.generated) > MOST:
            raise InputError(f"positions of more than {MOST} tokens; no model reads so many. Use 'all' for every token")
        if min(self.first, self.last, self.generated) < 0 or not (
            self.first or self.last or self.generated or self.everywhere
        ):
            raise InputError(f"positions {self}: expected at least one position, counts of 0 or more")

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Read the notation: parts `fN`, `lN`, `gN` joined by `+`, or `all`.

        Raises:
            InputError: anything else.
        """
        if text == "all":
            return cls(everywhere=True)
        counts = {"f": 0, "l": 0, "g": 0}
        for part in text.split("+"):
            match = re.fullmatch(r"([flg])(\d{1,7})", part.strip())
            if not match or counts[match[1]]:
                raise InputError(f"positions {text[:40]!r}: expected parts like 'l1', 'f3+l5', 'g5', or 'all'")
            counts[match[1]] = int(match[2])
        return cls(counts["f"], counts["l"], counts["g"])

    def __str__(self) -> str:
        if self.everywhere:
            return "all"
        parts = (("f", self.first), ("l", self.last), ("g", self.generated))
        return "+".join(f"{letter}{count}" for letter, count in parts if count)

    @property
    def prefill_only(self) -> bool:
        """True when no generated token is ever touched."""
        return not (self.generated or self.everywhere)

    def select(self, prompt: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Mark the tokens to act on among the columns `start` to `stop` of a batch.

        Args:
            prompt: bool [batch, n_prompt_columns], True for real (not padding) prompt tokens.
            start: first column of this forward pass, 0 at the prompt's beginning.
            stop: one past its last column; columns beyond the prompt hold generated tokens.

        Returns:
            bool [batch, stop - start].
        """
        import torch  # here, so that the notation is checked without it

        batch, width = prompt.shape
        if self.everywhere:
            inside = prompt[:, start:stop]
        else:
            lengths = prompt.sum(1, keepdim=True)
            rank = prompt.cumsum(1)  # 1 at each row's first real token
            first, last = self.first, self.last
            caps = lengths // 2 if first and last else lengths
            selected = (rank <= torch.clamp(caps, max=first)) | (rank > lengths - torch.clamp(caps, max=last))
            inside = (selected & prompt)[:, start:stop]
        n_beyond = max(0, stop - max(start, width))
        if not n_beyond:
            return inside
        number = torch.arange(n_beyond, device=prompt.device) + max(start, width) - width
        beyond = torch.full_like(number, self.everywhere, dtype=torch.bool) | (number < self.generated)
        return torch.cat([inside, beyond.expand(batch, -1)], dim=1)

    def touches(self, n_prompt: int, start: int) -> bool:
        """True when a pass that starts at column `start` can hold a position to act on."""
        return self.everywhere or start < n_prompt + self.generated


LAST = Positions(last=1)
EVERYWHERE = Positions(everywhere=True)


def as_positions(positions: Positions | str) -> Positions:
    """Return positions given as such or in their notation."""
    return Positions.parse(positions) if isinstance(positions, str) else positions
