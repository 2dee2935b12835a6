"""Who chooses among the same candidates: CLIP, the filter, both, or chance."""

from jobs.experiments.arms import RANDOM, Arm, selected
from jobs.experiments.judges import STAGE1
from jobs.experiments.questions.question import Question
from schemas.config import SelectConfig


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
