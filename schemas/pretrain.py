"""The typed config tree of a training run: one TOML file, unknown keys rejected, every number with its unit.

``tuning()`` marks the fields that change speed, memory or reach but not what is learnt: a run may be resumed
with other values of these, and of these alone.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.config import ConfigKeyError, Name, Section, tuning

Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class RunConfig(Section):
    """``[run]``: what this run is called and where it writes."""

    name: Name = Field(description="in the checkpoints' folder, the metrics and the manifest")
    stage: Literal[1, 2] = Field(description="1: Q-Former on frozen vision; 2: and a frozen language model")
    output: str = Field(
        "", description="folder or URL of checkpoints and metrics; empty: checkpoints/ of the first corpus"
    )
    seed: int = Field(42, ge=0, lt=2**63, description="of the order, the crops and the dropout")
    init_from: str = Field(
        "", description="checkpoint to begin with: capfilt's, or a LAVIS .pth; stage 2 needs stage 1's"
    )


class CorpusSlice(Section):
    """``[[data.corpus]]``: curated shards to train on."""

    path: str = Field(
        min_length=1, description="a corpus, or a folder of WebDataset shards from another program"
    )
    snapshot: str = Field("", description="digest of the curated shards, to pin them; empty: all there are")
    sources: tuple[str, ...] = Field((), description="only these sources; empty: all")
    weights: dict[str, float] = Field(
        {}, description="mixing weight by source; without one: its source.weight, else its number of images"
    )


class DataConfig(Section):
    """``[data]``: what a step sees of the corpora."""

    corpus: tuple[CorpusSlice, ...] = Field(min_length=1)
    image_size_px: int = Field(224, ge=16, description="side of the square crop")
    min_scale: float = Field(0.5, gt=0, le=1, description="least share of the area a random crop keeps")
    flip: bool = Field(True, description="mirror half of the images")
    captions_per_image: int = Field(
        2, ge=1, description="web sources: one is drawn of the first so many kept"
    )
    max_words: int = Field(50, ge=1, description="of a caption")
    held_out: int = Field(0, ge=0, description="images set aside, by the hash of their uid, for the probe")
    shuffle_shards: int = Field(8, ge=1, description="shards of a source whose samples are mixed at a time")
    read_ahead: int = tuning(4, ge=1, description="shards fetched and checked before one rank needs them")
    workers: int = tuning(2, ge=1, description="decoding threads of one rank")


class VisionConfig(Section):
    """``[vision]``: the frozen image encoder, of open_clip."""

    model: str = Field("ViT-L-14", description="open_clip architecture, hf-hub:ORG/NAME or local-dir:FOLDER")
    pretrained: str = Field(
        "openai", description='open_clip pretrained tag or a weights file; "" for hf-hub: and local-dir:'
    )
    drop_blocks: int = Field(1, ge=0, description="left off at the end: 1 gives second-to-last features")


class QFormerConfig(Section):
    """``[qformer]``: BERT-base with cross-attention, unless told otherwise."""

    weights: str = Field(
        "google-bert/bert-base-uncased", description='hub id or local folder of BERT; "" starts at random'
    )
    tokenizer: str = Field("google-bert/bert-base-uncased", description="hub id or local folder")
    num_queries: int = Field(32, ge=1)
    layers: int = Field(12, ge=1)
    width: int = Field(768, ge=1)
    heads: int = Field(12, ge=1)
    ffn_width: int = Field(3072, ge=1)
    cross_attention_every: int = Field(2, ge=1, description="layers 0, 2, 4 ... see the image")
    projection_width: int = Field(256, ge=1, description="of the contrastive embeddings")
    dropout: float = Field(0.1, ge=0, lt=1)
    initializer_range: float = Field(
        0.02,
        gt=0,
        description="of weights that start at random; BERT's 0.02 is right at width 768, too small below",
    )
    max_text_tokens: int = Field(32, ge=4, description="of a caption, special tokens included")
    vocab_size: int = Field(30523, ge=5, description="the tokenizer's words and [DEC]")
    max_positions: int = Field(512, ge=4, description="rows of BERT's table of positions")

    @model_validator(mode="after")
    def _divisible(self) -> "QFormerConfig":
        if self.width % self.heads:
            raise ConfigKeyError(f"must divide width ({self.width})", ("heads",))
        return self


class LanguageConfig(Section):
    """``[language]``: the frozen language model of stage 2."""

    model: str = Field(description="hub id or local folder: facebook/opt-2.7b, google/flan-t5-xl, ...")
    revision: str = Field("main", description="hub commit or tag")
    family: Literal["opt", "t5"] = Field(description="opt: decoder, LM loss; t5: prefix-LM loss")
    prompt: str = Field("", description="begins every caption and stays out of the loss")
    max_text_tokens: int = Field(32, ge=4)
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="of its frozen weights")


class ObjectiveConfig(Section):
    """``[objective]``: weights and smoothing of the losses of stage 1."""

    label_smoothing: float = Field(0.1, ge=0, lt=1, description="of ITC and ITG")
    temperature: float = Field(0.07, gt=0, description="of ITC at the start; learnt")
    itc: float = Field(1.0, ge=0, description="weight of the contrastive loss")
    itm: float = Field(1.0, ge=0, description="weight of the matching loss")
    itg: float = Field(1.0, ge=0, description="weight of the captioning loss")


class OptimConfig(Section):
    """``[optim]``: AdamW and its schedule; ``preset`` fills what the file leaves out."""

    preset: Literal["paper", "lavis"] = Field(
        "paper", description="paper: what the paper says; lavis: what the released yaml does"
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps; preset paper: 250,000 and 80,000")
    batch_size: int = Field(ge=1, description="images of one step over all ranks: ITC's negatives")
    peak_lr: float = Field(1e-4, gt=0)
    min_lr: float | None = Field(None, ge=0, description="at the end of the cosine")
    warmup_steps: int | None = Field(None, ge=0)
    warmup_lr: float | None = Field(None, ge=0, description="at step 0")
    betas: Betas | None = None
    weight_decay: float = Field(0.05, ge=0, description="not on vectors and biases")
    eps: float = Field(1e-8, gt=0)
    clip_norm: float = Field(0.0, ge=0, description="of the gradient; 0: no clipping, as published")


class PerformanceConfig(Section):
    """``[performance]``: how a step is computed; nothing here changes what is learnt beyond rounding."""

    precision: Literal["auto", "bf16", "fp32"] = tuning("auto", description="auto: bf16 on a GPU, else fp32")
    micro_batch_size: int = tuning(0, ge=0, description="images at once on one rank; 0: all of its share")
    compile: bool = tuning(True, description="torch.compile the blocks, on CUDA")
    shard_language: bool = tuning(False, description="FSDP2 for the frozen language model, over all ranks")


class CheckpointConfig(Section):
    """``[checkpoint]``: when a state is kept."""

    every_steps: int = tuning(1000, ge=1)
    keep_last: int = tuning(3, ge=1, description="older ones are removed; the last one of a run stays")
    asynchronous: bool = tuning(True, description="written while training goes on")


class MetricsConfig(Section):
    """``[metrics]``: what a training logs, and where; always to JSON lines."""

    every_steps: int = tuning(10, ge=1)
    tensorboard: bool = tuning(False)
    wandb_project: str = tuning("", description="empty: none")


class ProbeConfig(Section):
    """``[probe]``: a cheap look at held-out images while training."""

    every_steps: int = tuning(0, ge=0, description="0: never")
    images: int = tuning(500, ge=2, description="of data.held_out")


class TrainingResources(Section):
    """``[cluster]``: where it runs. Nothing here changes what is learnt."""

    address: str = tuning("", description="Ray cluster to run on; empty: this machine, without Ray")
    gpus: int = tuning(0, ge=0, description="ranks, one GPU each; 0: every GPU of this machine, else the CPU")
    cpus_per_gpu: float = tuning(8.0, ge=1, description="of one rank, on a cluster")
    cpu_ranks: int = tuning(1, ge=1, description="processes where there is no GPU")
    requirements: Literal["pinned", "installed"] = tuning(
        "pinned", description="of a job; pinned: pip installs this machine's; installed: nodes have them"
    )
    max_restarts: int = tuning(3, ge=0, description="from the last checkpoint, when a rank dies")


class PretrainConfig(Section):
    """One training run, whole."""

    run: RunConfig
    data: DataConfig
    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    language: LanguageConfig | None = Field(None, description="of stage 2")
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig
    performance: PerformanceConfig = PerformanceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    probe: ProbeConfig = ProbeConfig()
    cluster: TrainingResources = TrainingResources()

    @model_validator(mode="after")
    def _stage_has_its_sections(self) -> "PretrainConfig":
        if (self.run.stage == 2) != (self.language is not None):
            raise ValueError("[language] belongs to stage 2, and stage 2 needs it")
        return self
