"""The typed config tree of a training run: one TOML file, unknown keys rejected, every number with its unit.

``tuning()`` marks the fields that change speed, memory or reach but not what is learnt: a run may be resumed
with other values of these, and of these alone.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.config import ConfigKeyError, Name, Section, tuning

# What a run trains: one of BLIP-2's stages, or one of BLIP's models.
BlipKind = Literal["blip-pretrain", "blip-captioner", "blip-filter"]
TrainingStage = Literal[1, 2, "blip-pretrain", "blip-captioner", "blip-filter"]
# What text encoder and text decoder have in common.
Share = Literal["all", "all-but-cross-attention", "all-but-self-attention", "none"]


def stage_folder(stage: TrainingStage) -> str:
    """Return the folder of the runs of a stage, which checkpoints record as their stage."""
    return stage if isinstance(stage, str) else f"stage{stage}"


Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class RunConfig(Section):
    """``[run]``: what this run is called and where it writes."""

    name: Name = Field(description="in the checkpoints' folder, the metrics and the manifest")
    stage: TrainingStage = Field(
        description="1: BLIP-2's Q-Former on a frozen image encoder; 2: with a frozen language model; "
        "else one of BLIP's models"
    )
    output: str = Field(
        "", description="folder or URL of checkpoints and metrics; empty: checkpoints/ of the first corpus"
    )
    seed: int = Field(42, ge=0, lt=2**63, description="of the order, the crops and the dropout")
    init_from: str = Field(
        "", description="checkpoint to begin with: capfilt's, or a LAVIS .pth; stage 2 needs stage 1's"
    )
    max_hours: float | None = tuning(
        None,
        gt=0,
        description="end after the step at which the command has lasted so long, with a checkpoint",
    )


class CorpusSlice(Section):
    """``[[data.corpus]]``: curated shards to train on."""

    path: str = Field(
        min_length=1, description="a corpus, or a folder of WebDataset shards from another program"
    )
    snapshot: str = Field("", description="digest of the curated shards, to pin them; empty: all there are")
    captions: Literal["curated", "web"] = Field(
        "curated",
        description="curated: what the selection kept; web: every crawled image with its list's own text",
    )
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
    rand_augment: bool = Field(False, description="BLIP's RandAugment(2, 5) of the crops")
    captions_per_image: int = Field(
        2, ge=1, description="of web sources: one of this many best kept captions is drawn"
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


class BertShape(Section):
    """What every text model here is made of: BERT-base, unless told otherwise."""

    tokenizer: str = Field("google-bert/bert-base-uncased", description="hub id or local folder")
    layers: int = Field(12, ge=1)
    width: int = Field(768, ge=1)
    heads: int = Field(12, ge=1)
    ffn_width: int = Field(3072, ge=1)
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
    def _divisible(self) -> "BertShape":
        if self.width % self.heads:
            raise ConfigKeyError(f"must divide width ({self.width})", ("heads",))
        return self


class QFormerConfig(BertShape):
    """``[qformer]``: BERT-base with cross-attention, unless told otherwise."""

    weights: str = Field(
        "google-bert/bert-base-uncased", description='hub id or local folder of BERT; "" starts at random'
    )
    num_queries: int = Field(32, ge=1)
    cross_attention_every: int = Field(2, ge=1, description="layers 0, 2, 4 ... see the image")
    projection_width: int = Field(256, ge=1, description="of the contrastive embeddings")


class ViTConfig(Section):
    """``[blip.vision]``: BLIP's image encoder, which is trained; ViT-B/16, unless told otherwise."""

    init: str = Field(
        "",
        description="ViT or DeiT to begin with, hub id or local folder; empty: at random, or run.init_from",
    )
    layers: int = Field(12, ge=1)
    width: int = Field(768, ge=1)
    heads: int = Field(12, ge=1)
    patch_px: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0, description="inner width of the feed-forward networks, by width")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="share of images that skip the last block; less before it; ViT-L: 0.1"
    )
    initializer_range: float = Field(0.02, gt=0, description="of weights that start at random")

    @model_validator(mode="after")
    def _divisible(self) -> "ViTConfig":
        if self.width % self.heads:
            raise ConfigKeyError(f"must divide width ({self.width})", ("heads",))
        return self


class TextConfig(BertShape):
    """``[blip.text]``: BLIP's text encoder and text decoder, BERT-base with cross-attention in every layer."""

    init: str = Field(
        "", description="BERT to begin with, hub id or local folder; empty: at random, or run.init_from"
    )
    max_text_tokens: int = Field(30, ge=4, description="of a caption, special tokens and prompt included")
    vocab_size: int = Field(30524, ge=6, description="the tokenizer's words, [DEC] and, last, [ENC]")


class BlipConfig(Section):
    """``[blip]``: a model of BLIP, and what its losses have beyond those of BLIP-2."""

    vision: ViTConfig = ViTConfig()
    text: TextConfig = TextConfig()
    share: Share = Field("all-but-self-attention", description="of text encoder and decoder (BLIP, table 3)")
    tied_head: bool = Field(
        True,
        description="the decoder's output matrix is its word embeddings, as BLIP's; false: a parameter of its own",
    )
    projection_width: int = Field(256, ge=1, description="of the contrastive embeddings")
    prompt: str = Field("", description="begins every caption of the decoder and stays out of the loss")
    queue_size: int = Field(57600, ge=1, description="earlier embeddings that ITC compares with")
    momentum: float = Field(0.995, ge=0, le=1, description="share that the momentum encoders keep in a step")
    alpha: float = Field(0.4, ge=0, le=1, description="share of ITC's targets that is the momentum encoders'")
    alpha_epochs: float = Field(2.0, ge=0, description="over which alpha rises from 0; BLIP's filter: 1")
    negatives_of: int = Field(
        75, ge=0, description="samples whose texts and images are each other's negatives; 0: the whole step"
    )


class LanguageConfig(Section):
    """``[language]``: the frozen language model of stage 2."""

    model: str = Field(description="hub id or local folder: facebook/opt-2.7b, google/flan-t5-xl, ...")
    revision: str = Field("main", description="hub commit or tag")
    family: Literal["opt", "t5"] = Field(description="opt: decoder, LM loss; t5: prefix-LM loss")
    prompt: str = Field("", description="begins every caption, with a space after it; not part of the loss")
    max_text_tokens: int = Field(32, ge=4)
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="of its frozen weights")


class ObjectiveConfig(Section):
    """``[objective]``: weights and smoothing of the losses of stage 1 and of BLIP."""

    label_smoothing: float = Field(0.1, ge=0, lt=1, description="of ITC and ITG; of BLIP's LM alone")
    temperature: float = Field(0.07, gt=0, description="of ITC at the start; learnt, at least 0.001")
    itc: float = Field(1.0, ge=0, description="weight of the contrastive loss")
    itm: float = Field(1.0, ge=0, description="weight of the matching loss")
    itg: float = Field(1.0, ge=0, description="weight of the captioning loss, which BLIP calls LM")


class OptimConfig(Section):
    """``[optim]``: AdamW and its schedule; ``preset`` fills what the file leaves out."""

    preset: Literal["paper", "lavis"] = Field(
        "paper", description="paper: what the paper says; lavis: what the released yaml does"
    )
    steps: int | None = Field(
        None, ge=1, description="optimiser steps; preset paper: 250,000 and 80,000; of BLIP its epochs"
    )
    epoch_steps: int | None = Field(
        None, ge=1, description="of an epoch, by which BLIP's rates change; none: one pass over the images"
    )
    batch_size: int = Field(ge=1, description="images of one step over all ranks: ITC's negatives")
    peak_lr: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "epochs"] = Field(
        "cosine", description="after the warm-up; epochs: the rate falls by epoch_decay an epoch"
    )
    epoch_decay: float = Field(0.9, gt=0, le=1, description="factor of the rate, an epoch")
    min_lr: float | None = Field(
        None, ge=0, description="at the end of the cosine; the least of any schedule"
    )
    warmup_steps: int | None = Field(None, ge=0)
    warmup_lr: float | None = Field(None, ge=0, description="at step 0")
    betas: Betas | None = None
    weight_decay: float = Field(0.05, ge=0, description="not on vectors and biases, unless decay_vectors")
    decay_vectors: bool = Field(False, description="weight decay on every parameter, as BLIP")
    eps: float = Field(1e-8, gt=0)
    clip_norm: float = Field(0.0, ge=0, description="of the gradient; 0: no clipping, as published")


class PerformanceConfig(Section):
    """``[performance]``: how a step is computed; nothing here changes what is learnt beyond rounding."""

    precision: Literal["auto", "bf16", "fp32"] = tuning("auto", description="auto: bf16 on a GPU, else fp32")
    micro_batch_size: int = tuning(0, ge=0, description="images at once on one rank; 0: all of its share")
    compile: bool = tuning(True, description="torch.compile the blocks, on CUDA")
    gradient_sum: Literal["after", "overlapped", "overlapped-bf16"] = tuning(
        "after",
        description="over the ranks: after the backward passes, or during them and the next encoding; bf16: rounded",
    )
    shard_language: bool = tuning(False, description="FSDP2 for the frozen language model, over all ranks")


class CheckpointConfig(Section):
    """``[checkpoint]``: when a state is kept."""

    every_steps: int = tuning(1000, ge=1)
    keep_last: int = tuning(3, ge=1, description="older ones are removed; the last one of a run stays")
    keep_every: int = tuning(
        0, ge=0, description="checkpoints at multiples of it stay too; a multiple of every_steps; 0: none"
    )
    keep_best: Literal["", "probe_cider"] = tuning(
        "", description="the one with the highest CIDEr stays too: the probe looks at each; empty: none"
    )
    asynchronous: bool = tuning(True, description="written while training goes on")

    @model_validator(mode="after")
    def _kept_ones_are_written(self) -> "CheckpointConfig":
        if self.keep_every % self.every_steps:
            raise ConfigKeyError(f"must be a multiple of every_steps ({self.every_steps})", ("keep_every",))
        return self


class MetricsConfig(Section):
    """``[metrics]``: what a training logs, and where; always to JSON lines."""

    every_steps: int = tuning(10, ge=1)
    tensorboard: bool = tuning(False)
    wandb_project: str = tuning("", description="empty: none")


class ProbeConfig(Section):
    """``[probe]``: a cheap look at held-out images while training."""

    every_steps: int = tuning(
        0, ge=0, description="and at each checkpoint that is kept for good; 0: only for checkpoint.keep_best"
    )
    images: int = tuning(500, ge=2, description="of data.held_out")


class TrainingResources(Section):
    """``[cluster]``: where it runs. Nothing here changes what is learnt."""

    address: str = tuning("", description="Ray cluster to run on; empty: this machine, without Ray")
    gpus: int = tuning(0, ge=0, description="ranks, one GPU each; 0: every GPU of this machine, else the CPU")
    cpus_per_gpu: float = tuning(8.0, ge=1, description="of one rank, on a cluster")
    cpu_ranks: int = tuning(1, ge=1, description="processes where there is no GPU")
    requirements: Literal["pinned", "installed"] = tuning(
        "pinned",
        description="libraries of a job; pinned: pip installs this machine's versions; installed: nodes have them",
    )
    image: str = tuning("", description="container image with capfilt, for `submit --print rayjob`")
    env: tuple[str, ...] = tuning(
        (), description="names of environment variables that a job passes on: credentials, endpoint, proxies"
    )
    driver_cpus: float = tuning(0.0, ge=0, description="of a job's driver; 0: not counted")
    driver_memory_gb: float = tuning(0.0, ge=0, description="of a job's driver; 0: not counted")
    max_restarts: int = tuning(
        3,
        ge=0,
        description="from the last checkpoint, when a rank dies; counted anew after the next checkpoint",
    )
    min_ranks: int = tuning(
        0,
        ge=0,
        description="on a Ray cluster that loses nodes: the fewest ranks to go on with; 0: as many as began",
    )


class PretrainConfig(Section):
    """One training run, whole."""

    run: RunConfig
    data: DataConfig
    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    language: LanguageConfig | None = Field(None, description="of stage 2")
    blip: BlipConfig | None = Field(None, description="of a model of BLIP")
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
        if isinstance(self.run.stage, str) != (self.blip is not None):
            raise ValueError("[blip] belongs to the stages blip-..., and they need it")
        if self.blip and self.blip.prompt and self.run.stage != "blip-captioner":
            raise ConfigKeyError('has an effect only with run.stage = "blip-captioner"', ("blip", "prompt"))
        return self

    @property
    def probe_key(self) -> str:
        """The key that asks for a probe; empty where none does."""
        if self.probe.every_steps:
            return "probe.every_steps"
        return "checkpoint.keep_best" if self.checkpoint.keep_best else ""

    @model_validator(mode="after")
    def _blip_fits_the_batch(self) -> "PretrainConfig":
        if self.blip is None or self.run.stage == "blip-captioner":
            return self
        batch, queue, group = self.optim.batch_size, self.blip.queue_size, self.blip.negatives_of
        if queue % batch:
            raise ConfigKeyError(f"must be a multiple of optim.batch_size ({batch})", ("blip", "queue_size"))
        if batch % (group or batch) or min(group or batch, batch) < 2:
            raise ConfigKeyError(
                f"must be at least 2 and divide optim.batch_size ({batch})", ("blip", "negatives_of")
            )
        return self
