"""What a MED of the demo has learnt, asked on scenes that no training saw: what it finds, and what it writes.

The legend of the names: N images and as many texts, B at once, L tokens, T those written so far, C of the embeddings.
"""

import torch
from torch import Tensor

from jobs.demo.held_out import HeldOutScenes
from training.blip.stage import BlipStage

_IMAGES_AT_ONCE = 50


@torch.no_grad()
def evaluate_med(stage: BlipStage, held_out: HeldOutScenes) -> dict[str, float]:
    """Return recall at 1 by ITC, of texts and of images, and the share of its greedy captions that are true."""
    stage.eval()
    texts, encoders = stage.tokenize(held_out.captions), stage.encoders
    pixels = held_out.pixels_NCHW.split(_IMAGES_AT_ONCE)
    features = [stage.visual_encoder(pixels_BCHW) for pixels_BCHW in pixels]
    image_NC = torch.cat([encoders.embed_images(features_BPE) for features_BPE in features])
    text_NC = encoders.embed_texts(texts.ids_BL, texts.mask_BL)
    similarity_NN = image_NC @ text_NC.T
    own_N = torch.arange(len(held_out.samples))
    written = [text for features_BPE in features for text in _greedy(stage, features_BPE)]
    return {
        "text_r1": (similarity_NN.argmax(dim=1) == own_N).double().mean().item(),
        "image_r1": (similarity_NN.argmax(dim=0) == own_N).double().mean().item(),
        "true_captions": held_out.true_share(written),
    }


def _greedy(stage: BlipStage, features_BPE: Tensor) -> list[str]:
    """Return the likeliest caption of each image, word by word, as long as the model reads texts."""
    assert stage.tokenizer is not None, "a trained model has a tokenizer"
    tokenizer, decoder = stage.tokenizer.tokenizer, stage.text_decoder
    image = stage.project(features_BPE)[1]
    ids_BT = torch.full((len(features_BPE), 1), stage.begin_id)
    for _ in range(stage.shape.text.max_text_tokens - 1):
        next_B = decoder.logits(decoder(ids_BT, image)[:, -1]).argmax(dim=-1)
        ids_BT = torch.cat((ids_BT, next_B[:, None]), dim=1)
    return [tokenizer.decode(_before_end(ids, tokenizer.sep_token_id)) for ids in ids_BT[:, 1:].tolist()]


def _before_end(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids
