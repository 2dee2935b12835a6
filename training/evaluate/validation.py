"""Validation on a few held-out images while a run trains: cheap figures to compare its steps by.

The legend of the names: N images, M distinct captions, B images at once, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from schemas.pretrain import PretrainConfig
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.data.held_out import HeldOut
from training.evaluate.captioning import caption_scores
from training.evaluate.generation import CaptionModel, Decoding, Stage1Generator, Stage2Generator
from training.evaluate.retrieval import Stage1Matcher, contrastive_lists, recall

# Greedy and short: enough to compare the steps of a run, not a run with a paper.
_DECODING = Decoding(beams=1, min_tokens=0, max_tokens=20)
_IMAGES_AT_ONCE = 64


def validate(stage: Stage1 | Stage2, held_out: Sequence[HeldOut], config: PretrainConfig) -> dict[str, float]:
    """Return metrics of held-out images; the model is left in evaluation mode.

    Stage 1: ``text_r1`` and ``image_r1``, ITC's recall at 1 in per cent among these images and their captions
    (a caption that several images have is correct for each); ``itm_accuracy``, the share of correct classifications of
    each image with its best caption and with another image's (chance 0.5). Both stages: ``cider`` of their captions.
    """
    # Compiled code would be compiled again for each length of a caption, which takes longer than it saves.
    with torch.compiler.set_stance("force_eager"):
        return _metrics(stage, held_out[: config.probe.images])


def _metrics(stage: Stage1 | Stage2, samples: Sequence[HeldOut]) -> dict[str, float]:
    batches = torch.stack([sample.pixels_CHW for sample in samples]).split(_IMAGES_AT_ONCE)
    captions = [sample.captions for sample in samples]
    if not isinstance(stage, Stage1):
        return _cider(Stage2Generator(stage), batches, captions)
    matcher = Stage1Matcher(stage)
    texts = list(dict.fromkeys(caption for of_image in captions for caption in of_image))
    retrieval = _recalls(matcher, batches, texts, captions) | _accuracy(matcher, batches, texts, captions)
    return retrieval | _cider(Stage1Generator(stage), batches, captions)


def _recalls(
    matcher: Stage1Matcher, batches: Sequence[Tensor], texts: Sequence[str], captions: Sequence[Sequence[str]]
) -> dict[str, float]:
    to_texts, to_images = contrastive_lists(matcher, lambda: iter(batches), matcher.tokenize(texts), 1)
    correct_NM = torch.tensor([[text in of_image for text in texts] for of_image in captions])
    by_image_N1 = correct_NM.gather(1, to_texts.positions)
    by_text_M1 = correct_NM.T.gather(1, to_images.positions)
    return {"text_r1": recall(by_image_N1, 1), "image_r1": recall(by_text_M1, 1)}


def _accuracy(
    matcher: Stage1Matcher, batches: Sequence[Tensor], texts: Sequence[str], captions: Sequence[Sequence[str]]
) -> dict[str, float]:
    # The last text, an empty one, is the negative of an image whose captions all other images have.
    row_of = {text: row for row, text in enumerate([*texts, ""])}
    pairs = [
        torch.tensor([row_of[of_image[0]], row_of[_other_caption(captions, image)]])
        for image, of_image in enumerate(captions)
    ]
    tokenized = matcher.tokenize([*texts, ""])
    predictions: list[Tensor] = []
    for pixels_BCHW in batches:
        asked = pairs[len(predictions) : len(predictions) + len(pixels_BCHW)]
        predictions += [logits.argmax(dim=1) for logits in matcher.match(pixels_BCHW, tokenized, asked)]
    correct = torch.stack(predictions) == torch.tensor([1, 0], device=matcher.device)
    return {"itm_accuracy": correct.double().mean().item()}


def _other_caption(captions: Sequence[Sequence[str]], image: int) -> str:
    """Return the best caption of the next image whose best caption is not one of this image's; empty: there is none."""
    following = (captions[(image + step) % len(captions)][0] for step in range(1, len(captions)))
    return next((caption for caption in following if caption not in captions[image]), "")


def _cider(
    model: CaptionModel, batches: Sequence[Tensor], captions: Sequence[Sequence[str]]
) -> dict[str, float]:
    generated = [text for pixels_BCHW in batches for text in model.caption(pixels_BCHW, "", _DECODING)]
    return {"cider": caption_scores(generated, captions)["cider"]}
