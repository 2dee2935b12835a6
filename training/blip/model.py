"""MED, BLIP's mixture of encoder and decoder (section 3.1): the three models of BLIP, which differ in their parts.

======================  ==============  ===================================  ==============
``run.stage``           image encoder   text encoder, projections, ITM head  text decoder
======================  ==============  ===================================  ==============
``blip-pretrain``       yes             yes                                  yes
``blip-captioner``      yes                                                  yes
``blip-filter``         yes             yes
======================  ==============  ===================================  ==============

A text begins with [CLS] for the text encoder alone, with [ENC] where the encoder reads an image too, and with [DEC] in
the decoder.

The legend of the names: B images, R pairs, P tokens of an image, E its width, D the text models' width, C width of the
contrastive embeddings, L text tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from schemas.pretrain import BlipConfig, PretrainConfig
from training.blip.momentum import Encoders
from training.blip.text import TextDecoder, TextModel, share_parameters
from training.blip.vision import ViT
from training.distributed import World
from training.losses import IGNORED, next_tokens
from training.models.layers import KeyValue, Linear
from training.models.parameters import PartlyTrained
from training.models.tokenizer import CaptionTokenizer, Texts


class Med(PartlyTrained):
    """A model of BLIP with the parts that ``run.stage`` needs. The parameters have BLIP's names.

    Args:
        config: of the run.
        tokenizer: of captions; None where no caption is ever given: on ``meta``, in benchmarks.
        world: the ranks.
        dtype: of the matrix products.
    """

    def __init__(
        self, config: PretrainConfig, tokenizer: CaptionTokenizer | None, world: World, dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert config.blip is not None, "a model of BLIP has [blip]"
        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.shape: BlipConfig = config.blip
        self.encodes_text = config.run.stage != "blip-captioner"
        self.decodes_text = config.run.stage != "blip-filter"
        text, width = self.shape.text, self.shape.text.width
        self.begin_id = tokenizer.begin_id if tokenizer else text.vocab_size - 2
        # [ENC] is the last token.
        self.match_id = text.vocab_size - 1
        self.visual_encoder = ViT(self.shape.vision, config.data.image_size_px, dtype)
        if self.encodes_text:
            self.text_encoder = TextModel(text, self.visual_encoder.width, dtype)
            self.vision_proj = Linear(self.visual_encoder.width, self.shape.projection_width)
            self.text_proj = Linear(width, self.shape.projection_width)
            self.itm_head = Linear(width, 2)
            self.temp = nn.Parameter(torch.tensor(config.objective.temperature))
        if self.decodes_text:
            bert = TextModel(text, self.visual_encoder.width, dtype)
            if self.encodes_text:
                share_parameters(bert, self.text_encoder, self.shape.share)
            self.text_decoder = TextDecoder(bert, text, self.shape.tied_head)

    @property
    def device(self) -> torch.device:
        """Return the device that the model computes on."""
        return self.visual_encoder.cls_token.device

    @property
    def encoders(self) -> Encoders:
        """Return the encoders of ITC; they share this model's parameters."""
        return Encoders(self.visual_encoder, self.text_encoder, self.vision_proj, self.text_proj)

    @property
    def text_models(self) -> list[nn.Module]:
        """Return the text encoder and the decoder, as far as there are any."""
        encoder = [self.text_encoder] if self.encodes_text else []
        return [*encoder, self.text_decoder] if self.decodes_text else encoder

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks that are compiled, each for the shapes it is called with."""
        encoder = [*self.text_encoder.blocks] if self.encodes_text else []
        decoder = [*self.text_decoder.bert.blocks] if self.decodes_text else []
        return [*self.visual_encoder.blocks, *encoder, *decoder]

    # -- images and texts ----------------------------------------------------------------------------------------

    def project(self, features_BPE: Tensor) -> tuple[list[KeyValue | None], list[KeyValue | None]]:
        """Return the keys and values of images for the text encoder and for the decoder: one list where they share.

        A list is empty where the model lacks its part.
        """
        encoder = self.text_encoder.project_image(features_BPE) if self.encodes_text else []
        if encoder and self.shares_projection:
            return encoder, encoder
        return encoder, self.text_decoder.bert.project_image(features_BPE) if self.decodes_text else []

    @property
    def shares_projection(self) -> bool:
        """Return whether text encoder and decoder read the same keys and values of an image."""
        return self.decodes_text and self.shape.share in ("all", "all-but-self-attention")

    def match(self, image: list[KeyValue | None], texts: Texts) -> Tensor:
        """Return ITM's logits (R, 2), index 1 where image and text belong together.

        Where there are more texts than images, the texts of one image follow each other.
        """
        texts = texts.beginning_with(self.match_id)
        hidden_RLD = self.text_encoder(texts.ids_BL, texts.mask_BL[:, None, None, :], image)
        return self.itm_head(hidden_RLD[:, 0].to(self.temp.dtype))

    def tokenize(self, captions: Sequence[str]) -> Texts:
        """Tokenise captions, behind the prompt if there is one."""
        assert self.tokenizer is not None, "a model that is given captions has a tokenizer"
        return self.tokenizer([f"{self.shape.prompt}{caption}" for caption in captions])

    def labels(self, texts: Texts) -> Tensor:
        """Return the decoder's label of each token (B, L): the next token, ``IGNORED`` in the prompt and at the end."""
        labels_BL = next_tokens(texts.ids_BL, texts.mask_BL)
        if self.shape.prompt:
            assert self.tokenizer is not None, "a model that is given captions has a tokenizer"
            # [CLS], the prompt's tokens and [SEP]: the last token of the prompt predicts the caption's first one.
            labels_BL[:, : len(self.tokenizer.tokenizer(self.shape.prompt).input_ids) - 2] = IGNORED
        return labels_BL
