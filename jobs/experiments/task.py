"""One training of an experiment, and where its files are."""

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One training of an arm.

    Args:
        root: the folder of all experiments.
        question: whose arm it is.
        arm, seed: which training.
        after: the arm whose training it goes on from; empty: none.
        steps: as the judge counts them.
        num_scenes: new ones that the model is judged by.
        num_urls: of the demo world.
        prefix: of the run's name; empty: the training itself, else one that comes before it.
    """

    root: Path
    question: str
    arm: str
    seed: int
    after: str
    steps: int
    num_scenes: int
    num_urls: int
    prefix: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the trainings of the experiment."""
        return self.root / "trained" / self.question

    @property
    def data(self) -> Path:
        """The tars of what the arm keeps."""
        return self.root / "kept" / self.question / self.arm / "world"

    @property
    def name(self) -> str:
        """The name of the training's run."""
        return f"{self.prefix}{self.arm}-{self.seed}-{self.steps}"

    def before(self) -> "Task":
        """The task that this one goes on from."""
        return replace(self, arm=self.after, after="")

    @property
    def log(self) -> Path:
        """The file that gets the lines of the training."""
        return self.folder / "logs" / f"{self.name}.log"
