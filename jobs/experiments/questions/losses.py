"""What the captioning loss of stage 1 is worth to retrieval."""

from dataclasses import replace

from jobs.experiments.arms import RANKED
from jobs.experiments.judges import STAGE1, Stage1
from jobs.experiments.questions.question import Question

LOSSES = Question(
    name="losses",
    asks="What does retrieval lose where stage 1 learns without ITG, its captioning loss?",
    papers="BLIP-2, table 6: fine-tuned on COCO, retrieval is better in both directions where ITG was trained too.",
    baseline="itc-itm",
    arms=(
        replace(RANKED, name="itc-itm", what="without ITG", train=Stage1(("objective.itg=0",))),
        replace(RANKED, name="itc-itm-itg", what="all three losses"),
    ),
    better=(("itc-itm-itg", "itc-itm"),),
    judge=STAGE1,
)
