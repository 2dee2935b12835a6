"""The typed config of a bootstrapping: one TOML file that names a corpus's config and three training recipes."""

from pydantic import Field

from schemas.config import Section


class BootstrapSection(Section):
    """``[bootstrap]``: where the rounds go, and the configs of their steps."""

    path: str = Field(
        min_length=1,
        description="folder or URL; round 1's corpus is PATH/round-1, its models in PATH/checkpoints",
    )
    rounds: int = Field(
        1, ge=1, description="corpora, each captioned and filtered by models of the one before"
    )
    min_fetched: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the URLs of each kind of source that has to give an image before the first training, "
        "so that none learns from what an outage left",
    )
    models: str = Field("", description="folder of this machine for exported models; empty: PATH/models")
    corpus: str = Field(
        min_length=1, description="config of the corpus: crawled at its corpus.path, the start of round 1"
    )
    pretrain: str = Field(
        min_length=1, description="recipe with run.stage = blip-pretrain: the model of a round"
    )
    captioner: str = Field(min_length=1, description="recipe with run.stage = blip-captioner")
    filter: str = Field(min_length=1, description="recipe with run.stage = blip-filter")


class BootstrapConfig(Section):
    """One bootstrapping, whole."""

    bootstrap: BootstrapSection
