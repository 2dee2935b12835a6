"""How captions are made: how many, and how they are sampled."""

from dataclasses import replace

from jobs.experiments.arms import BASE, CAPFILT, WEB, Arm, Variant, all_synthetic, first_synthetic, selected
from jobs.experiments.judges import STAGE1
from jobs.experiments.questions.question import Question
from schemas.config import SelectConfig

# -- captions ---------------------------------------------------------------------------------------------------------

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


# -- decoding ---------------------------------------------------------------------------------------------------------

_NARROW = Variant(folder="corpus-narrow", caption=("caption.top_p=0.24", "caption.repetition_penalty=1.3"))
# By the beginning of an arm's name: the corpus, and how it was sampled.
_SAMPLED = {"wide": (BASE, "top_p 0.9, penalty 1.1"), "narrow": (_NARROW, "top_p 0.24, penalty 1.3")}


def _kept(name: str, made: int, kept: int) -> Arm:
    config = SelectConfig.model_validate({"top_k": kept, "web_caption": "never"})
    corpus, says = _SAMPLED[name]
    return Arm(
        name=f"{name}-{made}-{kept}",
        what=f"{says}: CLIP's best {kept} of {made}",
        keep=selected(config, made),
        corpus=corpus,
    )


def _written(name: str, made: int) -> Arm:
    corpus, says = _SAMPLED[name]
    return Arm(
        name=f"{name}-all-{made}",
        what=f"{says}: all {made}",
        keep=all_synthetic(made),
        corpus=corpus,
        trained=False,
    )


DECODING = Question(
    name="decoding",
    asks="Should captions be sampled widely (top_p 0.9, penalty 1.1) or narrowly (top_p 0.24, penalty 1.3)?",
    papers="BLIP samples with top_p 0.9 for diversity; LAION-COCO, with 40 captions an image, with top_p 0.24 and a "
    "repetition penalty of 1.3.",
    baseline="wide-10-2",
    arms=tuple(
        arm
        for name in _SAMPLED
        for arm in (_written(name, 10), _written(name, 40), _kept(name, 10, 2), _kept(name, 40, 1))
    ),
    better=(("wide-10-2", "narrow-10-2"),),
    judge=STAGE1,
)


# -- search -----------------------------------------------------------------------------------------------------------

_BEAM = Variant(folder="corpus-beam", caption=("caption.num_captions=1",), beam_search=True)

SEARCH = Question(
    name="search",
    asks="Should a captioner write its likeliest caption (beam search) or a random one (nucleus sampling)?",
    papers="BLIP, table 2: nucleus sampling gives noisier captions (25% are refused, 19% with beam search) that are "
    "worth more (R@1 80.6 and 79.6), because they say more that is new.",
    baseline="beam",
    arms=(
        WEB,
        Arm(name="beam-unseen", what="one by beam search, unseen", keep=first_synthetic, corpus=_BEAM),
        Arm(name="nucleus-unseen", what="one by nucleus sampling, unseen", keep=first_synthetic),
        replace(CAPFILT, name="beam", what="beam search and the web's, each filtered", corpus=_BEAM),
        replace(CAPFILT, name="nucleus", what="nucleus sampling and the web's, each filtered"),
    ),
    better=(("nucleus", "beam"), ("nucleus", "web"), ("beam", "web")),
    judge=STAGE1,
)
