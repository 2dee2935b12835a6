"""What an experiment is: a question, its arms, and what the papers say of it."""

from dataclasses import dataclass

from jobs.experiments.arms import Arm
from jobs.experiments.judges import Judge

# So many synthetic captions of each image are made, for all experiments: an arm with fewer takes the first of them.
NUM_CAPTIONS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An experiment.

    Args:
        asks: the question, in one sentence.
        papers: what is published of it, with the source.
        baseline: the arm that the others are compared with, seed by seed.
        arms: what is compared.
        better: pairs of arms of which the first is expected to do better: the papers say so, or the second is a floor.
        headline: arms that are trained with more seeds.
        judge: what trained models are asked; None: only what the arms keep is judged, attribute by attribute.
    """

    name: str
    asks: str
    papers: str
    baseline: str
    arms: tuple[Arm, ...]
    better: tuple[tuple[str, str], ...] = ()
    headline: tuple[str, ...] = ()
    judge: Judge | None

    def arm(self, name: str) -> Arm:
        """Return an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def asks_filter(self) -> bool:
        """Whether an arm is chosen by the demo's filter."""
        return any(arm.filtered for arm in self.arms)
