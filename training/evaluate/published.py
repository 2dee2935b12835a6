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


# BLIP-2's paper: table 5 (retrieval: Flickr30k zero-shot, COCO fine-tuned at 364 pixels), table 3 (captioning after
# fine-tuning on COCO at 364 pixels), table 2 (zero-shot question answering at 224 pixels). In per cent.
_RETRIEVAL = {
    "flickr30k": {
        "ViT-L": {"text_r1": 96.9, "image_r1": 88.6},
        "ViT-g": {"text_r1": 97.6, "image_r1": 89.7},
    },
    "coco": {
        "ViT-L, fine-tuned": {"text_r1": 83.5, "image_r1": 66.3},
        "ViT-g, fine-tuned": {"text_r1": 85.4, "image_r1": 68.3},
    },
}
_CAPTION = {
    "nocaps": {
        "ViT-g OPT-2.7B, fine-tuned": {"cider": 119.7},
        "ViT-g OPT-6.7B, fine-tuned": {"cider": 121.0},
        "ViT-g FlanT5-XL, fine-tuned": {"cider": 121.6},
    },
    "coco": {
        "ViT-g OPT-2.7B, fine-tuned": {"bleu4": 43.7, "cider": 145.8},
        "ViT-g OPT-6.7B, fine-tuned": {"bleu4": 43.5, "cider": 145.2},
        "ViT-g FlanT5-XL, fine-tuned": {"bleu4": 42.4, "cider": 144.5},
    },
}
_VQA_MODELS = (
    "ViT-L OPT-2.7B", "ViT-g OPT-2.7B", "ViT-g OPT-6.7B", "ViT-L FlanT5-XL", "ViT-g FlanT5-XL", "ViT-g FlanT5-XXL"
)  # fmt: skip
_VQA_ACCURACY = {
    "vqav2-val": (50.1, 53.5, 54.3, 62.6, 63.1, 65.2),
    "vqav2-test-dev": (49.7, 52.3, 52.6, 62.3, 63.0, 65.0),
    "okvqa": (30.2, 31.7, 36.4, 39.4, 40.7, 45.9),
    "gqa": (33.9, 34.6, 36.4, 44.4, 44.2, 44.7),
}
_VQA = {
    dataset: {model: {"accuracy": value} for model, value in zip(_VQA_MODELS, values, strict=True)}
    for dataset, values in _VQA_ACCURACY.items()
}
_PUBLISHED: dict[str, dict[str, dict[str, dict[str, float]]]] = {
    "retrieval": _RETRIEVAL,
    "caption": _CAPTION,
    "vqa": _VQA,
}


def published(task: str, dataset: str) -> dict[str, dict[str, float]]:
    """Return BLIP-2's published numbers by model; none where the paper has none for the dataset."""
    return _PUBLISHED.get(task, {}).get(dataset, {})
