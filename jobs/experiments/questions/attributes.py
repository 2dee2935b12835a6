"""Which attribute of an image captions get wrong, without any training."""

from jobs.experiments.arms import CAPFILT, FILTERED, ORACLE, RANDOM, RANKED, WEB, Arm, all_synthetic
from jobs.experiments.questions.question import Question
from jobs.experiments.questions.selection import SELECTION

ATTRIBUTES = Question(
    name="attributes",
    asks="Of the texts that name a colour, a shape, a size or a background, how many are right?",
    papers="Nobody has published what CLIP or BLIP's filter overlooks, attribute by attribute.",
    baseline="web",
    arms=(
        WEB,
        Arm(name="synthetic", what="all ten synthetic captions", keep=all_synthetic(10)),
        FILTERED,
        CAPFILT,
        RANDOM,
        RANKED,
        *(SELECTION.arm(name) for name in ("itm", "both")),
        ORACLE,
    ),
    judge=None,
)
