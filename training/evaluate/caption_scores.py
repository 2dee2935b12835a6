"""CIDEr-D and BLEU-4 of captions, by COCO's own scorers."""

import shutil
from collections.abc import Sequence

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from schemas.errors import CapfiltError
from training.evaluate.ptb_tokenizer import caption_words


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, java: bool = False
) -> dict[str, float]:
    """Return ``cider`` and ``bleu4`` in per cent, as papers print them.

    CIDEr weighs a word by how few images' references have it, so a score depends on the whole set: those of two
    sets do not compare, and one image alone scores 0.

    Args:
        captions: one for each image.
        references: those of each image.
        java: divide words by Stanford's tokenizer itself (needs a ``java`` on the path) instead of our port.
    """
    words = _stanford_words if java else _our_words
    candidates = words([[caption] for caption in captions])
    targets = words(references)
    cider, _ = Cider().compute_score(targets, candidates)
    bleu, _ = Bleu(4).compute_score(targets, candidates, verbose=0)
    return {"cider": 100 * float(cider), "bleu4": 100 * float(bleu[3])}


def _our_words(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    return {
        index: [" ".join(caption_words(text)) for text in of_image] for index, of_image in enumerate(texts)
    }


def _stanford_words(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    # Asked first: the wrapper leaves a file behind where there is none.
    if shutil.which("java") is None:
        raise CapfiltError("--java: no java on the path; without the option, words are divided in Python")
    return PTBTokenizer().tokenize(
        {index: [{"caption": text} for text in of_image] for index, of_image in enumerate(texts)}
    )
