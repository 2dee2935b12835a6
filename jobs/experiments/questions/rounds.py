"""How often to bootstrap."""

from jobs.experiments.arms import Arm
from jobs.experiments.judges import ROUNDS, BootstrapRounds
from jobs.experiments.questions.question import Question

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
