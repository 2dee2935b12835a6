"""What a model is asked after its training, and how that is shown. Imports no trainer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jobs.experiments.task import Task

# Trains what a task says, or goes on; returns the judge's figures. What it is made of shows in its repr.
Train = Callable[[Task], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure of a trained model.

    Args:
        title: over its column.
        is_share: a share of 1, else a loss.
        in_table: in the terminal too, which is narrower than the page.
    """

    title: str
    is_share: bool = True
    in_table: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What all arms of an experiment are trained for and asked.

    Args:
        what: for the page; ``{steps}`` and ``{num_scenes}`` stand for numbers.
        figures: what the model is asked, by name.
        measures: what arms are compared by: the mean of some figures, shares, by its name. The first is the table's.
        steps: of a training, unless ``--steps`` says otherwise.
        train: how an arm is trained that does not say so itself.
        prepare: what has to be there before the trainings begin; called with one of them.
    """

    what: str
    figures: Mapping[str, Figure]
    measures: Mapping[str, tuple[str, ...]]
    steps: int
    train: Train
    prepare: Callable[[Task], None] | None = None

    @property
    def measure(self) -> str:
        """The first measure."""
        return next(iter(self.measures))


_RECALLS = {"text_r1": Figure(title="text R@1"), "image_r1": Figure(title="image R@1")}


# -- in a process of its own: the trainer is imported inside ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage1:
    """The training of a stage 1 by the demo's recipe with overrides."""

    overrides: tuple[str, ...] = ()

    def __call__(self, task: Task) -> dict[str, float]:
        from jobs.experiments.trials.training import judge_stage1

        return judge_stage1(task, self.overrides)


# By ITC, the first ten of each list then by ITM: what BLIP and BLIP-2 report.
STAGE1 = Judge(
    what="a stage 1 on the same frozen image encoder, {steps} steps of 32 images",
    figures={
        "text_r1_reranked": Figure(title="text R@1"),
        "image_r1_reranked": Figure(title="image R@1"),
        "text_r1": Figure(title="text R@1, ITC alone", in_table=False),
        "image_r1": Figure(title="image R@1, ITC alone", in_table=False),
        "itm_accuracy": Figure(title="ITM accuracy", in_table=False),
    },
    measures={
        "recall": ("text_r1_reranked", "image_r1_reranked"),
        "recall by ITC alone": ("text_r1", "image_r1"),
    },
    # After 300 ITM has hardly begun, and the seeds differ by more than the arms.
    steps=900,
    train=Stage1(),
)


@dataclass(frozen=True, slots=True)
class Stage2:
    """The training of a stage 2, behind a stage 1 of so many times its steps on the same data; 0: none."""

    stage1_times: int

    def __call__(self, task: Task) -> dict[str, float]:
        from jobs.experiments.trials.stage2 import train_and_judge

        return train_and_judge(task, self.stage1_times)


STAGE2 = Judge(
    what="a stage 2 with a frozen language model, {steps} steps of 16 images, asked after each third of them",
    figures={
        "true_captions_first": Figure(title="says true, 1/3"),
        "true_captions_second": Figure(title="2/3"),
        "true_captions": Figure(title="3/3"),
        "caption_loss_first": Figure(title="loss at 1/3", is_share=False, in_table=False),
        "caption_loss_second": Figure(title="loss at 2/3", is_share=False, in_table=False),
        "caption_loss": Figure(title="loss", is_share=False),
    },
    measures={"true captions": ("true_captions",)},
    steps=450,
    train=Stage2(2),
)


@dataclass(frozen=True, slots=True)
class Med:
    """The training of a MED by the demo's recipe with overrides; ``times`` as many steps."""

    overrides: tuple[str, ...] = ()
    times: int = 1

    def __call__(self, task: Task) -> dict[str, float]:
        from jobs.experiments.trials.training import judge_med

        return judge_med(task, self.times, self.overrides)


_MED_MEASURES = {"recall": ("text_r1", "image_r1"), "true captions": ("true_captions",)}
_MED_FIGURES = {**_RECALLS, "true_captions": Figure(title="says true")}
MED = Judge(
    what="a MED, {steps} steps of 32 images",
    figures=_MED_FIGURES,
    measures=_MED_MEASURES,
    steps=350,
    train=Med(),
)


@dataclass(frozen=True, slots=True)
class BootstrapRounds:
    """So many rounds of bootstrapping, with captioner and filter apart; 0: the web's own texts."""

    number: int

    def __call__(self, task: Task) -> dict[str, float]:
        from jobs.experiments.trials.rounds import train_and_judge

        return train_and_judge(task, self.number, task.steps / ROUNDS.steps)


@dataclass(frozen=True, slots=True)
class OneModel:
    """One round with a single model as captioner and filter."""

    def __call__(self, task: Task) -> dict[str, float]:
        from jobs.experiments.trials.rounds import share_and_judge

        return share_and_judge(task, task.steps / ROUNDS.steps)


def _crawl_world(task: Task) -> None:
    from jobs.experiments.trials.rounds import crawl_world

    crawl_world(task)


ROUNDS = Judge(
    what="a MED, {steps} steps of 32 images of its round's corpus",
    figures={
        "kept_true": Figure(title="kept true"),
        "images_kept": Figure(title="images kept"),
        "refused": Figure(title="refused"),
        **_MED_FIGURES,
    },
    measures=_MED_MEASURES,
    steps=350,
    train=BootstrapRounds(1),
    prepare=_crawl_world,
)
