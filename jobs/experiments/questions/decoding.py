"""How captions are sampled: LAION-COCO's way or BLIP's."""

from jobs.experiments.arms import BASE, Arm, Variant, all_synthetic, selected
from jobs.experiments.judges import STAGE1
from jobs.experiments.questions.question import Question
from schemas.config import SelectConfig

_NARROW = Variant(folder="corpus-narrow", caption=("caption.top_p=0.24", "caption.repetition_penalty=1.3"))
_WIDE_SAYS, _NARROW_SAYS = "top_p 0.9, penalty 1.1", "top_p 0.24, penalty 1.3"


def _kept(corpus: Variant, made: int, kept: int) -> Arm:
    config = SelectConfig.model_validate({"top_k": kept, "web_caption": "never"})
    name, says = _named(corpus)
    return Arm(
        name=f"{name}-{made}-{kept}",
        what=f"{says}: CLIP's best {kept} of {made}",
        keep=selected(config, made),
        corpus=corpus,
    )


def _written(corpus: Variant, made: int) -> Arm:
    name, says = _named(corpus)
    return Arm(
        name=f"{name}-all-{made}",
        what=f"{says}: all {made}",
        keep=all_synthetic(made),
        corpus=corpus,
        trained=False,
    )


def _named(corpus: Variant) -> tuple[str, str]:
    return ("wide", _WIDE_SAYS) if corpus == BASE else ("narrow", _NARROW_SAYS)


DECODING = Question(
    name="decoding",
    asks="Should captions be sampled widely (top_p 0.9, penalty 1.1) or narrowly (top_p 0.24, penalty 1.3)?",
    papers="BLIP samples with top_p 0.9 for diversity; LAION-COCO, with 40 captions an image, with top_p 0.24 and a "
    "repetition penalty of 1.3.",
    baseline="wide-10-2",
    arms=tuple(
        arm
        for corpus in (BASE, _NARROW)
        for arm in (
            _written(corpus, 10),
            _written(corpus, 40),
            _kept(corpus, 10, 2),
            _kept(corpus, 40, 1),
        )
    ),
    better=(("wide-10-2", "narrow-10-2"),),
    judge=STAGE1,
)
