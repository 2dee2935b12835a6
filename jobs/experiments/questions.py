"""The experiments: a question each, its arms, and what the papers say of it."""

from dataclasses import dataclass

from jobs.experiments.arms import Arm, at_random, by_truth, first_synthetic, ranked, web
from schemas.config import SelectConfig
from schemas.errors import CapfiltError, did_you_mean

# So many synthetic captions of each image are made, for all experiments: every smaller number is its beginning.
NUM_CAPTIONS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An experiment.

    Args:
        asks: the question, in one sentence.
        papers: what is published of it, with the source.
        baseline: the arm that the others are compared with, seed by seed.
        better: pairs of arms of which the first should do better, as the papers have it.
    """

    name: str
    asks: str
    papers: str
    baseline: str
    arms: tuple[Arm, ...]
    better: tuple[tuple[str, str], ...]


def question(name: str) -> Question:
    """Return an experiment by its name. Raises CapfiltError where there is none."""
    if name not in QUESTIONS:
        raise CapfiltError(f"experiment {name!r}: there is no such one{did_you_mean(name, list(QUESTIONS))}; "
                           f"there are {', '.join(QUESTIONS)}")  # fmt: skip
    return QUESTIONS[name]


_BLIP2 = SelectConfig()

_CURATION = Question(
    name="curation",
    asks="What is a corpus worth whose captions are the web's, a captioner's, or the best of both?",
    papers="BLIP, table 1: captioning and filtering together beat either, and either beats the web's texts. "
    "BLIP-2, section 3.4: ten captions ranked by CLIP with the web's, the best two kept.",
    baseline="web",
    arms=(
        Arm(name="web", what="the web's text", keep=web),
        Arm(name="captioned", what="one synthetic caption, unseen", keep=first_synthetic),
        Arm(name="random", what="two of the ten and the web's, at random", keep=at_random(2, 10)),
        Arm(name="ranked", what="CLIP's best two of the ten and the web's", keep=ranked(_BLIP2, 10)),
        Arm(name="oracle", what="two true ones of the ten and the web's", keep=by_truth(2, 10)),
    ),
    better=(("captioned", "web"), ("ranked", "web"), ("ranked", "captioned"), ("ranked", "random")),
)


def _cell(made: int, kept: int, web_caption: str) -> Arm:
    config = SelectConfig.model_validate({"top_k": kept, "web_caption": web_caption})
    return Arm(
        name=f"{made}-{kept}-{web_caption}",
        what=f"CLIP's best {kept} of {made}",
        keep=ranked(config, made),
        columns={"made": made, "kept": kept, "web": web_caption},
    )


_CAPTIONS = Question(
    name="captions",
    asks="How many captions should be made of an image, how many kept, and should the web's compete?",
    papers="BLIP-2 makes ten and keeps two, LAION-COCO makes 40 and keeps one; nobody has published the surface "
    "between them.",
    baseline="10-2-compete",
    arms=tuple(
        _cell(made, kept, web_caption)
        for web_caption in ("compete", "never", "always")
        for made in (1, 2, 5, 10, 20, 40)
        for kept in (1, 2, 5)
        if kept <= made
    ),
    better=(("10-2-compete", "1-1-compete"), ("10-1-compete", "1-1-compete")),
)

QUESTIONS = {each.name: each for each in (_CURATION, _CAPTIONS)}
# Arms that are trained unless others are named; of the rest only what they keep is judged.
TRAINED = {
    "curation": tuple(arm.name for arm in _CURATION.arms),
    "captions": (
        "1-1-never", "2-1-never", "5-1-never", "10-1-never", "40-1-never", "2-2-never", "5-2-never", "10-2-never",
        "40-2-never", "10-5-never", "10-2-compete", "10-2-always",
    ),
}  # fmt: skip
