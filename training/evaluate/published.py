"""The result of an evaluation, and the paper's figures for the same task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from schemas.json_record import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Json):
    """The outcome of one evaluation.

    ``protocol`` is every setting the numbers depend on. ``published``: the numbers of BLIP-2's paper under the same
    names, by model.
    """

    task: str
    dataset: str
    samples: int
    metrics: Mapping[str, float]
    protocol: Mapping[str, Any]
    checkpoint: str = ""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0


# BLIP-2's paper, in per cent: table 5 (retrieval: Flickr30k zero-shot, COCO fine-tuned at 364 pixels), table 3
# (captioning after fine-tuning on COCO at 364 pixels), table 2 (zero-shot question answering at 224 pixels).
_ZERO_SHOT, _FINE_TUNED = ("ViT-L", "ViT-g"), ("ViT-L, fine-tuned", "ViT-g, fine-tuned")
_CAPTION = ("ViT-g OPT-2.7B, fine-tuned", "ViT-g OPT-6.7B, fine-tuned", "ViT-g FlanT5-XL, fine-tuned")
_VQA = (
    "ViT-L OPT-2.7B", "ViT-g OPT-2.7B", "ViT-g OPT-6.7B", "ViT-L FlanT5-XL", "ViT-g FlanT5-XL", "ViT-g FlanT5-XXL"
)  # fmt: skip
# By task and dataset: the models, and each metric's values in their order.
_PUBLISHED: dict[tuple[str, str], tuple[tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    ("retrieval", "flickr30k"): (_ZERO_SHOT, {"text_r1": (96.9, 97.6), "image_r1": (88.6, 89.7)}),
    ("retrieval", "coco"): (_FINE_TUNED, {"text_r1": (83.5, 85.4), "image_r1": (66.3, 68.3)}),
    ("caption", "nocaps"): (_CAPTION, {"cider": (119.7, 121.0, 121.6)}),
    ("caption", "coco"): (_CAPTION, {"bleu4": (43.7, 43.5, 42.4), "cider": (145.8, 145.2, 144.5)}),
    ("vqa", "vqav2-val"): (_VQA, {"accuracy": (50.1, 53.5, 54.3, 62.6, 63.1, 65.2)}),
    ("vqa", "vqav2-test-dev"): (_VQA, {"accuracy": (49.7, 52.3, 52.6, 62.3, 63.0, 65.0)}),
    ("vqa", "okvqa"): (_VQA, {"accuracy": (30.2, 31.7, 36.4, 39.4, 40.7, 45.9)}),
    ("vqa", "gqa"): (_VQA, {"accuracy": (33.9, 34.6, 36.4, 44.4, 44.2, 44.7)}),
}


def published(task: str, dataset: str) -> dict[str, dict[str, float]]:
    """Return BLIP-2's published numbers by model; none where the paper has none for the dataset."""
    models, metrics = _PUBLISHED.get((task, dataset), ((), {}))
    return {
        model: {metric: values[index] for metric, values in metrics.items()}
        for index, model in enumerate(models)
    }
