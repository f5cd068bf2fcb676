"""What follows a distillation: one of the student's two classifiers, re-balanced (Li et al., SSD, 2021, stage IV)."""

from torch import Tensor

from rayltr.interface import Parts
from rayltr.methods import supervised

CHOICES = ("soft", "hard", "sum")


class Method(supervised.Method):
    """`supervised`, initialised from a stage of `distil`; the head is `main`.

    With the head `lws` this is the recommended last stage.

    chosen: the classifier that goes on, "soft", "hard" (what the published program does) or the "sum" of both.  The
    other keywords are those of `supervised`; the network is frozen unless `frozen` is False.
    Raises ValueError for another choice, and at the hand-over where the parent does not have what is chosen; a parent
    with one classifier is taken for its soft one.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        chosen: str = "soft",
        reduction: str = "weighted_mean",
        frozen: bool = True,
        drift: bool = False,
    ):
        if chosen not in CHOICES:
            raise ValueError(f"student: chosen is one of {', '.join(CHOICES)}, not {chosen!r}")
        super().__init__(parts, reduction=reduction, frozen=frozen, drift=drift)
        self.chosen = chosen

    def inherit(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """A parent's weights under the names they have here."""
        hard = {f"head.{name.removeprefix('hard.')}": given[name] for name in given if name.startswith("hard.")}
        others = {name: value for name, value in given.items() if not name.startswith("hard.")}
        if self.chosen == "soft":
            return others
        if self.chosen == "sum":
            if set(hard) != {"head.weight", "head.bias"}:
                raise ValueError("student: the sum takes a parent stage with two linear classifiers, hard and soft")
            hard = {name: value + others[name] for name, value in hard.items()}
        return {name: value for name, value in others.items() if not name.startswith("head.")} | hard
