"""Scores of captions: CIDEr-D and BLEU-4 by COCO's own scorers."""

import shutil
from collections.abc import Sequence

from schemas.errors import CapfiltError
from training.evaluate.annotations import CaptionedImage
from training.evaluate.ptb_tokenizer import caption_words


def score_captions(
    images: Sequence[CaptionedImage], captions: Sequence[str], *, java: bool = False
) -> dict[str, float]:
    """Return ``cider`` and ``bleu4``, and for a benchmark with domains (NoCaps) ``cider_<domain>`` of each.

    A domain is scored by itself, as NoCaps' server does: its words are weighed within the domain.
    """
    scores = caption_scores(captions, [image.captions for image in images], java=java)
    for domain in sorted({image.domain for image in images} - {""}):
        rows = [row for row, image in enumerate(images) if image.domain == domain]
        of_domain = caption_scores(
            [captions[row] for row in rows], [images[row].captions for row in rows], java=java
        )
        scores[f"cider_{domain.replace('-', '_')}"] = of_domain["cider"]
    return scores


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
    # Only what scores captions needs the package: a training without held-out images does not.
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    words = _stanford_words if java else _ported_words
    candidates = words([[caption] for caption in captions])
    targets = words(references)
    cider, _ = Cider().compute_score(targets, candidates)
    bleu, _ = Bleu(4).compute_score(targets, candidates, verbose=0)
    return {"cider": 100 * float(cider), "bleu4": 100 * float(bleu[3])}


def _ported_words(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    return {
        index: [" ".join(caption_words(text)) for text in of_image] for index, of_image in enumerate(texts)
    }


def _stanford_words(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    # Checked first: without java the wrapper fails after it has written a file, which it leaves behind.
    if shutil.which("java") is None:
        raise CapfiltError("--java: no java on the path; without the option, words are divided in Python")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize(
        {index: [{"caption": text} for text in of_image] for index, of_image in enumerate(texts)}
    )
