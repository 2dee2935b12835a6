"""What a training's stages, losses, shared parameters and length are worth."""

from dataclasses import replace

from jobs.experiments.arms import CAPFILT, RANKED, WEB, Arm
from jobs.experiments.judges import MED, STAGE1, STAGE2, Med, Stage1, Stage2
from jobs.experiments.questions.question import Question
from schemas.pretrain import Share

# -- stages -----------------------------------------------------------------------------------------------------------

STAGES = Question(
    name="stages",
    asks="What does stage 2 of BLIP-2 lose without stage 1?",
    papers="BLIP-2, figure 5: without stage 1 the language model does not learn to read the image; with OPT it gets "
    "worse as training goes on.",
    baseline="alone",
    arms=(
        replace(RANKED, name="alone", what="stage 2 alone", train=Stage2(0)),
        replace(RANKED, name="after-stage-1", what="stage 1, then stage 2"),
    ),
    better=(("after-stage-1", "alone"),),
    judge=STAGE2,
)


# -- losses -----------------------------------------------------------------------------------------------------------

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
    headline=("itc-itm", "itc-itm-itg"),
    judge=STAGE1,
)


# -- sharing ----------------------------------------------------------------------------------------------------------


def _shares(share: Share, what: str) -> Arm:
    return replace(CAPFILT, name=share, what=what, train=Med((f'blip.share="{share}"',)))


SHARING = Question(
    name="sharing",
    asks="What should MED's text encoder and decoder share?",
    papers="BLIP, table 3: all but self-attention is best (R@1 78.4), before none (78.3), all but cross-attention "
    "(77.5) and all (77.3).",
    baseline="all",
    arms=(
        _shares("all", "all parameters"),
        _shares("all-but-cross-attention", "all but cross-attention"),
        # The recipe's own.
        replace(CAPFILT, name="all-but-self-attention", what="all but self-attention, as BLIP"),
        _shares("none", "no parameter"),
    ),
    better=(
        ("all-but-self-attention", "all"),
        ("all-but-self-attention", "all-but-cross-attention"),
        ("all-but-self-attention", "none"),
    ),
    judge=MED,
)


# -- longer -----------------------------------------------------------------------------------------------------------

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
