"""Image captioning: a caption for every image of a benchmark, and its CIDEr and BLEU-4."""

from collections.abc import Sequence

from training.evaluate.annotations import CaptionedImage
from training.evaluate.caption_scores import caption_scores
from training.evaluate.generation import Captioner, Decoding
from training.evaluate.images import Pictures


def write_captions(
    model: Captioner,
    images: Sequence[CaptionedImage],
    pictures: Pictures,
    *,
    prompt: str,
    decoding: Decoding,
    batch_size: int,
) -> list[str]:
    """Return a caption for each image, without the prompt."""
    captions: list[str] = []
    for pixels_BCHW in pictures.batches([image.file for image in images], batch_size):
        captions += model.caption(pixels_BCHW, prompt, decoding)
    return captions


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
