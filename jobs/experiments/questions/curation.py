"""Captions of the web, of a captioner, filtered, or the best of both."""

from jobs.experiments.arms import CAPFILT, FILTERED, ORACLE, RANDOM, RANKED, WEB, Arm, first_synthetic
from jobs.experiments.judges import STAGE1
from jobs.experiments.questions.question import Question

CURATION = Question(
    name="curation",
    asks="What is a corpus worth whose captions are the web's, a captioner's, or the best of both?",
    papers="BLIP, table 1: captioning and filtering together beat either, and either beats the web's texts. "
    "BLIP-2, section 3.4: ten captions ranked by CLIP with the web's, the best two kept.",
    baseline="web",
    arms=(
        WEB,
        FILTERED,
        Arm(name="captioned", what="one synthetic caption, unseen", keep=first_synthetic),
        CAPFILT,
        RANDOM,
        RANKED,
        ORACLE,
    ),
    better=(
        ("filtered", "web"),
        ("captioned", "web"),
        ("captioned-filtered", "captioned"),
        ("captioned-filtered", "filtered"),
        ("ranked", "web"),
        ("ranked", "captioned"),
        ("ranked", "random"),
    ),
    headline=("web", "captioned-filtered", "ranked"),
    judge=STAGE1,
)
