"""Captions by transformers' beam search in place of nucleus sampling, for the experiment that compares them.

It is no choice of ``[caption]``: a corpus made with it has one caption an image, and its record does not tell how.
"""

from pathlib import Path

import torch
from transformers import BlipForConditionalGeneration

from pipeline.corpus.records import Records
from pipeline.images.preprocess import normalise
from pipeline.models.blip.captioner import BlipCaptioner, ImageBatch, TokenBatch
from pipeline.models.blip.generation import NO_TOKEN
from pipeline.models.transformers_loader import load_model
from pipeline.models.weights import Weights
from pipeline.runs.runner import Worker, load_worker
from pipeline.stages.caption import CaptionWorker
from schemas.config import CapfiltConfig, CaptionConfig
from schemas.stages import Stage

# BLIP's own (predict.py, train_caption.py).
_BEAMS = 3


class BeamCaptioner(BlipCaptioner):
    """BLIP's likeliest caption of an image; no random number enters."""

    def __init__(self, config: CaptionConfig, weights: Weights, seed: int) -> None:
        assert config.num_captions == 1, "there is one likeliest caption"
        super().__init__(config, weights, seed)
        model = load_model(
            BlipForConditionalGeneration,
            Path(weights.path),
            "caption.model",
            weights.name,
            dtype=torch.float32,
        )
        self._model = model.to(self.device).eval()

    @torch.inference_mode()
    def generate(self, batch: ImageBatch) -> TokenBatch:
        """Search the captions of a batch."""
        pixels_BCHW = batch.pixels_BCHW.to(self.device)
        ids_BT = self._model.generate(
            pixel_values=normalise(pixels_BCHW, self.preprocess, torch.float32),
            num_beams=_BEAMS,
            do_sample=False,
            min_length=self.config.min_length,
            max_length=self.config.max_length,
        )[:, 1:]
        end_id = self._model.config.text_config.sep_token_id
        is_behind_end_BT = (ids_BT == end_id).cumsum(dim=1) - (ids_BT == end_id).int() > 0
        tokens_BNT = ids_BT.masked_fill(is_behind_end_BT, NO_TOKEN)[:, None].cpu()
        return TokenBatch(tokens_BNT=tokens_BNT, seeds_BN=batch.seeds_BN)


class BeamCaptionWorker(CaptionWorker):
    """The caption stage with a beam search."""

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        super().__init__(config, records)
        self.captioner = BeamCaptioner(config.caption, self.weights, config.corpus.seed)


def load_with_beam_search(stage: Stage, config: CapfiltConfig, records: Records) -> Worker:
    """Return the worker of a stage, that of captions with a beam search."""
    return BeamCaptionWorker(config, records) if stage == "caption" else load_worker(stage, config, records)
