"""Whether one model may be captioner and filter."""

from jobs.experiments.arms import Arm
from jobs.experiments.judges import ROUNDS, BootstrapRounds, OneModel
from jobs.experiments.questions.question import Question

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
