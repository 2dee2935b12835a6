"""What MED's text encoder and decoder should share."""

from dataclasses import replace

from jobs.experiments.arms import CAPFILT, Arm
from jobs.experiments.judges import MED, Med
from jobs.experiments.questions.question import Question
from schemas.pretrain import Share


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
