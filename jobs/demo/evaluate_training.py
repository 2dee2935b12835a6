"""What a model of the demo has learnt, asked on scenes that neither the crawl nor any training saw.

The legend of the names: B images, Q queries, L tokens read, T to predict, W the language model's width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from jobs.demo.held_out import HeldOutScenes
from jobs.demo.training_configs import RERANK
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.evaluate.generation import Decoding, Stage2Generator
from training.evaluate.retrieval import Stage1Matcher, retrieve
from training.evaluate.validation import validate
from training.losses import IGNORED

# T5 has only learnt to go on from the beginning of a caption; so does OPT here.
_PROMPT = "a picture of"
_DECODING = Decoding(beams=1, min_tokens=0, max_tokens=16)
_IMAGES_AT_ONCE = 50


def evaluate_retrieval(stage: Stage1, held_out: HeldOutScenes) -> dict[str, float]:
    """Find the one right caption of each picture among all, and the one right picture of each caption.

    Returns recall at 1 by ITC, with ITM over the first of each list (``_reranked``), and ITM's accuracy; shares of 1.
    """
    pixels, captions = held_out.pixels_NCHW.split(_IMAGES_AT_ONCE), held_out.captions
    recalls = retrieve(Stage1Matcher(stage), lambda: iter(pixels), captions, range(len(captions)), RERANK)
    by_itc = {name: recalls[f"itc_{name}"] / 100 for name in ("text_r1", "image_r1")}
    by_itm = {f"{name}_reranked": recalls[name] / 100 for name in ("text_r1", "image_r1")}
    return {
        **by_itc,
        **by_itm,
        "itm_accuracy": validate(stage, held_out.samples, stage.config)["itm_accuracy"],
    }


@torch.no_grad()
def evaluate_language(stage: Stage2, held_out: HeldOutScenes) -> dict[str, float]:
    """Score the held-out captions by the language model with the soft prompt and without, and let it write its own.

    Returns the losses a word, with the picture and without, and the share of its own captions that are entirely true.
    """
    stage.eval()
    language = stage.language
    pixels_BCHW = held_out.pixels_NCHW
    soft_BQW = stage.soft_prompt(pixels_BCHW)
    target = language.target(held_out.captions, [sample.uid for sample in held_out.samples], seed=0)
    before_BQW = soft_BQW[:, :0]
    if language.name == "opt":
        # OPT has to have read something before it can predict: the </s> that begins every text is given, not asked.
        assert (target.labels_BT[:, 0] != IGNORED).all()
        before_BQW = language.embed(target.inputs_BL[:, :1])
        target = replace(
            target,
            inputs_BL=target.inputs_BL[:, 1:],
            mask_BL=target.mask_BL[:, 1:],
            labels_BT=target.labels_BT[:, 1:],
        )

    def loss(prompt_BQW: Tensor) -> float:
        return language.loss(prompt_BQW, target).item() / target.num_tokens

    written = Stage2Generator(stage).caption(pixels_BCHW, _PROMPT, _DECODING)
    return {
        "caption_loss": loss(torch.cat([soft_BQW, before_BQW], dim=1)),
        "text_only_loss": loss(before_BQW),
        "true_share": held_out.true_share(f"{_PROMPT} {text}" for text in written),
    }
