"""Captioner and filter from one MED: as two models or as one, and how often."""

from jobs.experiments.arms import Arm
from jobs.experiments.judges import ROUNDS, BootstrapRounds, OneModel
from jobs.experiments.questions.question import Question

# -- decoupled --------------------------------------------------------------------------------------------------------

DECOUPLED = Question(
    name="decoupled",
    asks="Should captioner and filter be fine-tuned as two models or as one?",
    papers="BLIP, table 4: one model refuses 8% of its captions where two refuse 25%, and what it keeps is worth less "
    "(R@1 79.8 and 80.6): a model does not see its own mistakes.",
    baseline="one-model",
    arms=(
        Arm(name="two-models", what="captioner and filter fine-tuned apart", train=BootstrapRounds(1)),
        Arm(
            name="one-model",
            what="captioner and filter fine-tuned as one model",
            train=OneModel(),
            after="two-models",
        ),
    ),
    better=(("two-models", "one-model"),),
    judge=ROUNDS,
)


# -- rounds -----------------------------------------------------------------------------------------------------------

_ROUNDS = 3

ROUNDS_QUESTION = Question(
    name="rounds",
    asks="Is a second and a third round of bootstrapping worth its cost?",
    papers="BLIP bootstraps once; its conclusion leaves further rounds to others.",
    baseline="web",
    arms=(
        Arm(name="web", what="a MED on the web's texts and on people's", train=BootstrapRounds(0)),
        *(
            Arm(
                name=f"round-{number}",
                what=f"a MED on what round {number} captioned and filtered",
                train=BootstrapRounds(number),
                after=f"round-{number - 1}" if number > 1 else "web",
            )
            for number in range(1, _ROUNDS + 1)
        ),
    ),
    better=(("round-1", "web"), ("round-2", "round-1"), ("round-3", "round-2")),
    judge=ROUNDS,
)
