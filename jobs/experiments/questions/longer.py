"""Whether a better corpus only helps because training is longer, and whether the old model should go on."""

from dataclasses import replace

from jobs.experiments.arms import CAPFILT, WEB
from jobs.experiments.judges import MED, Med
from jobs.experiments.questions.question import Question

LONGER = Question(
    name="longer",
    asks="Is a bootstrapped corpus worth more than longer training, and should the old model learn on or a new one?",
    papers="BLIP, table 12: as many more steps on the web's texts gain nothing. Table 13: a new model is at least as "
    "good as the old one that goes on.",
    baseline="web",
    arms=(
        WEB,
        replace(WEB, name="web-longer", what="the web's text, twice as many steps", train=Med(times=2)),
        replace(CAPFILT, name="new", what="captioned and filtered, a new model"),
        replace(CAPFILT, name="continued", what="captioned and filtered, the web's model", after="web"),
    ),
    better=(("new", "web"), ("new", "web-longer"), ("new", "continued")),
    judge=MED,
)
