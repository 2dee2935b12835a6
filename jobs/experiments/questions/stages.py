"""What stage 1 of BLIP-2 is worth to stage 2."""

from dataclasses import replace

from jobs.experiments.arms import RANKED
from jobs.experiments.judges import STAGE2, Stage2
from jobs.experiments.questions.question import Question

STAGES = Question(
    name="stages",
    asks="What does stage 2 of BLIP-2 lose without stage 1?",
    papers="BLIP-2, figure 5: without stage 1 the language model does not learn to read the image; with OPT it gets "
    "worse as training goes on.",
    baseline="alone",
    arms=(
        replace(RANKED, name="alone", what="stage 2 alone", train=Stage2(0)),
        replace(RANKED, name="after-stage-1", what="stage 1, then stage 2"),
    ),
    better=(("after-stage-1", "alone"),),
    judge=STAGE2,
)
