"""How many captions to make of an image, and how many to keep."""

from jobs.experiments.arms import Arm, selected
from jobs.experiments.judges import STAGE1
from jobs.experiments.questions.question import Question
from schemas.config import SelectConfig

_TRAINED = (
    "1-1-never", "2-1-never", "5-1-never", "10-1-never", "40-1-never", "2-2-never", "5-2-never", "10-2-never",
    "40-2-never", "10-5-never", "10-2-compete", "10-2-always",
)  # fmt: skip


def _cell(made: int, kept: int, web_caption: str) -> Arm:
    config = SelectConfig.model_validate({"top_k": kept, "web_caption": web_caption})
    name = f"{made}-{kept}-{web_caption}"
    return Arm(
        name=name,
        what=f"CLIP's best {kept} of {made}",
        keep=selected(config, made),
        trained=name in _TRAINED,
        columns={"made": made, "kept": kept, "web": web_caption},
    )


CAPTIONS = Question(
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
    better=(("10-2-compete", "1-1-never"), ("10-1-never", "1-1-never")),
    judge=STAGE1,
)
