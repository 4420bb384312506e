"""``[parallel]``: how the ranks of a run share its work."""

from __future__ import annotations

from forgetrain.errors import UserError
from forgetrain.spec.section import Positive, Section


class Parallel(Section):
    """How ranks share the work. Those that ``tensor`` and ``context`` do not take are data-parallel."""

    tensor: Positive = 1  # ranks that hold each layer together: heads, feed-forward and vocabulary are split over them
    context: Positive = 1  # ranks that hold each row together: its positions are split over them

    @property
    def sharing(self) -> int:
        """Ranks that get the same rows; they follow one another, those of a layer the closest."""
        return self.tensor * self.context

    def require_fit(self, ranks: int, whose: str, remedy: str) -> None:
        """Raises UserError when so many ranks do not divide into groups that share layers and rows; ``whose`` says
        which ranks these are."""
        if ranks % self.tensor:
            raise UserError(f"does not divide {whose}", key="parallel.tensor", value=self.tensor, remedy=remedy)
        if ranks % self.sharing:
            layers = f", {self.tensor} to a layer" if self.tensor > 1 else ""
            problem = f"does not divide {whose}{layers}"
            raise UserError(problem, key="parallel.context", value=self.context, remedy=remedy)
