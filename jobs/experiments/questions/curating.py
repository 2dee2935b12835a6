"""What captions a corpus keeps: the web's, a captioner's, chosen by CLIP, by the filter or by both."""

from jobs.experiments.arms import (
    CAPFILT,
    FILTERED,
    ORACLE,
    RANDOM,
    RANKED,
    WEB,
    Arm,
    all_synthetic,
    first_synthetic,
    selected,
)
from jobs.experiments.judges import STAGE1
from jobs.experiments.questions.question import Question
from schemas.config import SelectConfig

# -- curation ---------------------------------------------------------------------------------------------------------

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


# -- selection --------------------------------------------------------------------------------------------------------


def _by(name: str, what: str) -> Arm:
    config = SelectConfig.model_validate({"by": name})
    return Arm(name=name, what=what, keep=selected(config, 10), filtered=name != "clip")


SELECTION = Question(
    name="selection",
    asks="Who should choose two of ten captions and the web's: CLIP, BLIP's filter, or both?",
    papers="BLIP keeps what its filter calls a match, BLIP-2 what CLIP ranks first; nobody has published them side by "
    "side.",
    baseline="random",
    arms=(
        RANDOM,
        _by("clip", "CLIP's best two"),
        _by("itm", "the filter's best two of those that it calls a match"),
        _by("both", "CLIP's best two of those that the filter calls a match"),
    ),
    better=(("clip", "random"), ("itm", "random"), ("both", "random")),
    judge=STAGE1,
)


# -- attributes -------------------------------------------------------------------------------------------------------

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
