"""How one caption is made: the likeliest one, or a random one."""

from dataclasses import replace

from jobs.experiments.arms import CAPFILT, WEB, Arm, Variant, first_synthetic
from jobs.experiments.judges import STAGE1
from jobs.experiments.questions.question import Question

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
