"""The typed config tree of a corpus: one TOML file, unknown keys rejected, every number with its unit.

``tuning()`` marks the fields that change speed or reach but not what a sample becomes; every other field of
a stage's section enters that stage's fingerprint (see pipeline/corpus/fingerprint.py).
"""

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from schemas.names import header_text, name_server

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
HeaderText = Annotated[str, AfterValidator(header_text)]
Precision = Literal["auto", "fp32", "bf16"]
# Of a model that is run as it is, not trained.
InferencePrecision = Annotated[
    Literal["auto", "fp32", "bf16", "fp8"],
    Field(
        description="auto: bf16 on a GPU, fp32 on a CPU; fp8: bf16, with fp8 products in the vision tower's blocks"
    ),
]
# Of one image: decoding 50M pixels takes up to 600 MB.
MAX_PIXELS = 50_000_000
PixelPath = Annotated[
    Literal["exact", "fast"],
    Field(description="exact: Pillow's resize, as the model was trained; fast: at most a level or two off"),
]


def tuning(default: Any, **constraints: Any) -> Any:
    """Declare a field that does not enter the fingerprint: changing it makes nothing stale."""
    return Field(default, json_schema_extra={"tuning": True}, **constraints)


class ConfigKeyError(ValueError):
    """Report a value that another one forbids; ``key`` leads from the section that raises it to the value."""

    def __init__(self, message: str, key: tuple[str | int, ...]) -> None:
        super().__init__(message)
        self.key = key


class Section(BaseModel):
    """Base of every section: frozen, unknown keys rejected, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _host_and_port(entry: str) -> str:
    """Reject an entry that does not name a host and a port: it could never match."""
    host, _, port = entry.rpartition(":")
    if _is_host(host) and port.isascii() and port.isdigit() and 0 < int(port) < 65_536:
        return entry
    scheme, _, rest = entry.strip().rpartition("://")
    place = rest.partition("/")[0].rpartition("@")[2]
    host, _, port = (place, "", "") if _is_host(place) else place.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        port = "443" if scheme == "https" else "80"
    host = f"[{host}]" if _is_ipv6(host) and not host.startswith("[") else host
    form = f"{host}:{port}" if _is_host(host) else "example.org:443"
    raise ValueError(f'"{entry}" is not a host with its port; write "{form}"')


def _is_host(text: str) -> bool:
    return _is_ipv6(text) or re.fullmatch(r"[\w.-]+", text) is not None


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text.removeprefix("[").removesuffix("]")).version == 6
    except ValueError:
        return False


def _name_server(entry: str) -> str:
    name_server(entry)
    return entry


NameServer = Annotated[str, AfterValidator(_name_server)]
HostAndPort = Annotated[str, AfterValidator(_host_and_port)]


class CorpusConfig(Section):
    """``[corpus]``: where it lies, its seed, and the size of its shards."""

    path: str = Field(
        min_length=1, description="folder or URL (s3://bucket/prefix, gs://..., az://...) of the corpus"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of all random numbers, together with the sample's uid")
    samples_per_shard: int = Field(10_000, ge=1, le=99_999, description="URLs per shard, for new shards")
    order: Literal["list", "shuffled"] = Field(
        "list",
        description="of the URLs in new shards. shuffled: those of a host spread over all shards that its list becomes",
    )


class SourceConfig(Section):
    """``[[source]]``: a list of image-text pairs, or the pictures in folders, tars and tables as they lie."""

    name: Name = Field(description="unique, and never to be changed: part of every uid and of folder names")
    kind: Literal["web", "human"] = Field(
        "web", description="web: captioned, its text is one more candidate; human: its captions are kept"
    )
    input: tuple[str, ...] = Field(min_length=1, description="files or globs, local or remote; or one folder")
    format: Literal[
        "auto",
        "parquet",
        "csv",
        "tsv",
        "tsv-quoted",
        "jsonl",
        "txt",
        "img2dataset",
        "imagefolder",
        "webdataset",
        "huggingface",
    ] = Field(
        "auto",
        description="auto: a list, by the file's name; txt: a URL a line; img2dataset: folders of its shards; "
        "imagefolder: images in folders; webdataset: tars; huggingface: Parquet or Arrow with images inside",
    )
    url_column: str = Field(
        "url",
        min_length=1,
        description="rows without a URL are counted and left out; huggingface: the column of images",
    )
    caption_column: str | None = Field(
        "caption", description='of a text or a list of texts; "" if there is none'
    )
    uid_column: str | None = Field(None, description="an identity of your own instead of sha256(source, url)")
    extra_columns: tuple[str, ...] = Field((), description="columns to carry along as JSON in samples.extra")
    weight: float | None = Field(None, gt=0, description="mixing weight in pretraining; default: by images")


class CrawlConfig(Section):
    """``[crawl]``: how images are fetched and stored."""

    # what a stored image is: fingerprint
    image_size_px: int = Field(384, ge=16, description="target of the resize")
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = Field(
        "keep_ratio", description="img2dataset's modes; keep_ratio: the shorter side becomes image_size_px"
    )
    resize_only_if_bigger: bool = Field(True, description="smaller images are kept at their size")
    jpeg_scaling: bool = Field(
        False,
        description="decode JPEGs of over four times image_size_px at 1/2, 1/4 or 1/8, but no smaller than twice it: "
        "half the CPU, other bytes than img2dataset's (docs/benchmarks.md)",
    )
    encode_quality: int = Field(95, ge=1, le=100, description="JPEG quality of the stored image")
    formats: tuple[Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF"], ...] = Field(
        ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF"),
        description="accepted, with one frame; HEIF needs capfilt[heic]; AVIF and HEIF make nothing stale: "
        "--retry format_refused fetches what was refused",
    )
    min_size_px: int = Field(64, ge=1, description="shorter side, as delivered")
    max_aspect_ratio: float = Field(4.0, ge=1, description="long side / short side, as delivered")
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, le=178_956_970, description="by the header; decoding one takes up to 12 bytes"
    )
    opt_out_directives: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex"), description="of X-Robots-Tag, to be respected"
    )
    tdm_reservation: bool = Field(True, description="respect TDM-Reservation: 1")
    robots_txt: bool = Field(False, description="fetch and respect robots.txt, cached per site")
    # how it is asked for: tuning
    user_agent: HeaderText = tuning("capfilt/0.1", min_length=1, description="say truthfully who asks")
    contact: HeaderText = tuning("", description="URL or address for a site's owner; part of the User-Agent")
    threads: int = tuning(64, ge=1, le=1024, description="fetches at once in one worker")
    timeout_s: float = tuning(30.0, gt=0, description="of one URL in all, retries and waits included")
    connect_timeout_s: float = tuning(10.0, gt=0, description="of one connection or silent read")
    max_redirects: int = tuning(5, ge=0, description="followed for one URL, each checked")
    max_header_bytes: int = tuning(65_536, ge=1024, description="of one response")
    max_body_bytes: int = tuning(20_000_000, ge=1024, description="of one response, whatever it declares")
    max_attempts: int = tuning(3, ge=1, description="tries of one URL; only transient errors are tried again")
    backoff_s: float = tuning(0.5, ge=0, description="before the second try; doubles, with jitter")
    requests_per_host: int = tuning(
        8,
        ge=1,
        description="at once, over all workers at work on the corpus: each takes an equal share, one at least",
    )
    rate_per_host: float = tuning(
        50.0,
        gt=0,
        description="requests per second to one host, over all workers at work: each takes an equal share",
    )
    allow_hosts: tuple[HostAndPort, ...] = tuning(
        (),
        description='"host:port" entries exempt from the address check; --retry forbidden_address fetches '
        "what was refused",
    )
    nameservers: tuple[NameServer, ...] = tuning(
        (), description="IP addresses of DNS servers, with a port or without, to ask instead of the system's"
    )
    allow_files: tuple[str, ...] = tuning(
        (), description="folders whose files a list may name, by file:// or a path relative to one of them"
    )


class CaptionConfig(Section):
    """``[caption]``: the captioner and its sampling; BLIP's own values as defaults."""

    model: str = Field(
        "Salesforce/blip-image-captioning-large",
        description="hub id, local folder, or a folder on s3://, gs:// or az://",
    )
    revision: str = Field("main", description="hub commit or tag; pin a commit for a corpus that lasts")
    prompt: str = Field(
        "", description='begins every caption, then cut off; BLIP\'s COCO captioner learnt "a picture of "'
    )
    num_captions: int = Field(10, ge=1, le=1000, description="sampled for an image")
    top_p: float = Field(0.9, gt=0, le=1, description="nucleus sampling: probability to draw from")
    top_k: int = Field(50, ge=0, description="0 switches it off; transformers' silent default is 50")
    temperature: float = Field(1.0, gt=0, description="under 1: closer to the likeliest caption")
    repetition_penalty: float = Field(1.1, gt=0, description="on tokens already said; 1 switches it off")
    min_length: int = Field(5, ge=0, description="tokens, start and prompt included, before the end may come")
    max_length: int = Field(20, ge=2, description="tokens; start, prompt and end included")
    pixels: PixelPath = "exact"
    precision: InferencePrecision = "auto"
    batch_size: int = tuning(32, ge=1, description="images")

    @model_validator(mode="after")
    def _ordered(self) -> "CaptionConfig":
        if self.max_length <= self.min_length:
            raise ConfigKeyError(f"must be over min_length ({self.min_length})", ("max_length",))
        return self


class RerankConfig(Section):
    """``[rank.rerank]``: a second CLIP over the first's best (LAION-COCO's recipe)."""

    model: str = Field(description="as rank.model")
    pretrained: str = Field("", description="as rank.pretrained")
    first: int = Field(5, ge=1, description="how many of the first CLIP's best it sees")


class RankConfig(Section):
    """``[rank]``: the CLIP that scores candidates."""

    model: str = Field(
        "ViT-L-14",
        description="open_clip architecture, hf-hub:ORG/NAME[@REVISION], local-dir:FOLDER, or s3://, gs://, az://",
    )
    pretrained: str = Field(
        "openai", description='open_clip pretrained tag or a weights file; "" for hf-hub: and local-dir:'
    )
    pixels: PixelPath = "exact"
    precision: InferencePrecision = "auto"
    batch_size: int = tuning(64, ge=1, description="images")
    rerank: RerankConfig | None = Field(None, description="a second CLIP; without the section there is none")


class FilterConfig(Section):
    """``[filter]``: BLIP's filter or BLIP-2's stage 1, which says of every candidate whether it matches the image."""

    model: str = Field(
        "Salesforce/blip-itm-large-coco",
        description="hub id, local folder, or a folder on s3://, gs:// or az://; BLIP's retrieval model, or a stage 1 "
        "of BLIP-2, as Salesforce/blip2-itm-vit-g",
    )
    revision: str = Field("main", description="hub commit or tag; pin a commit for a corpus that lasts")
    first_token: Literal["encoder", "cls"] = Field(
        "encoder",
        description="of each text; encoder: [ENC], as BLIP trained it; cls: as transformers' own class, and BLIP-2",
    )
    max_tokens: int = Field(
        35, ge=3, description="of a text, the first and the last one included; the rest is cut"
    )
    pixels: PixelPath = "exact"
    precision: Precision = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    batch_size: int = tuning(32, ge=1, description="images")


class SelectConfig(Section):
    """``[select]``: which candidates reach training. Costs no GPU to change."""

    top_k: int = Field(2, ge=1, description="captions kept for an image")
    by: Literal["clip", "itm", "both"] = Field(
        "clip",
        description="clip: CLIP's best; itm: the best of those that [filter] says match; both: CLIP's best of those",
    )
    min_match: float = Field(
        0.5, ge=0, le=1, description="match probability a caption must reach, by itm and both"
    )
    min_score: float | None = Field(None, ge=-1, le=1, description="cosine similarity a caption must reach")
    web_caption: Literal["compete", "never", "always"] = Field(
        "compete", description="compete: one candidate more (BLIP-2); always: kept on top of the top_k"
    )


class StageResources(Section):
    """Resources of one stage's workers."""

    cpus: float = Field(1.0, ge=0, description="per worker")
    gpus: float = Field(0.0, ge=0, description="per worker; fractions share a GPU")
    memory_gb: float = Field(0.0, ge=0, description="per worker, taken from a node's; 0: not counted")
    labels: dict[str, str] = Field(
        {}, description="that a node must have to run the workers, as `ray start --labels` gives them"
    )
    min_workers: int = Field(1, ge=1, description="kept while there is work")
    max_workers: int = Field(1, ge=1, description="as many as work and cluster allow")

    @model_validator(mode="after")
    def _ordered(self) -> "StageResources":
        if self.max_workers < self.min_workers:
            raise ValueError(f"max_workers ({self.max_workers}) is under min_workers ({self.min_workers})")
        return self


class ClusterConfig(Section):
    """``[cluster]``: how Ray runs it. Nothing here changes the corpus."""

    address: str = Field("", description="Ray cluster to join; empty: start a local one")
    crawl: StageResources = StageResources()
    caption: StageResources = StageResources()
    rank: StageResources = StageResources()
    filter: StageResources = StageResources()
    select: StageResources = StageResources()
    requirements: Literal["pinned", "installed"] = Field(
        "pinned",
        description="libraries of a job; pinned: pip installs this machine's versions; installed: nodes have them",
    )
    image: str = Field("", description="container image with capfilt, for `submit --print rayjob`")
    env: tuple[str, ...] = Field(
        (), description="names of environment variables that a job passes on: credentials, endpoint, proxies"
    )
    driver_cpus: float = Field(0.0, ge=0, description="of a job's driver; 0: not counted")
    driver_memory_gb: float = Field(0.0, ge=0, description="of a job's driver; 0: not counted")
    prices: dict[str, float] = Field(
        {},
        description="an hour's price of a GPU, by node type as in `costs`, and of a CPU, by the name `cpu`",
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="of what a run says on standard error; json: an object a line, every event of every shard",
    )
    max_attempts: int = Field(3, ge=1, description="tries of one shard before it is quarantined")
    storage_patience_s: float = Field(
        3600.0,
        ge=0,
        description="how long a storage that is away is waited for, before the run ends with exit code 4",
    )
    stop_grace_s: float = Field(
        0.0,
        ge=0,
        description="after a signal to stop, how long shards in work may go on, to be committed; no new one begins",
    )
    stall_timeout_s: float = Field(
        21_600.0,
        gt=0,
        description="workers are started anew when no shard was done for so long",
    )
    compact_interval_s: float = Field(15.0, gt=0, description="how often a run refreshes the manifest")


class CapfiltConfig(Section):
    """One corpus, whole."""

    corpus: CorpusConfig
    source: tuple[SourceConfig, ...] = Field(min_length=1)
    crawl: CrawlConfig = CrawlConfig()
    caption: CaptionConfig = CaptionConfig()
    rank: RankConfig = RankConfig()
    filter: FilterConfig | None = Field(None, description="without the section there is no filter")
    select: SelectConfig = SelectConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _names_unique(self) -> "CapfiltConfig":
        names = [source.name for source in self.source]
        if double := {name for name in names if names.count(name) > 1}:
            name = sorted(double)[0]
            again = len(names) - 1 - names[::-1].index(name)
            raise ConfigKeyError(f"two [[source]] share the name {name!r}", ("source", again, "name"))
        return self

    @model_validator(mode="after")
    def _has_a_filter(self) -> "CapfiltConfig":
        if self.select.by != "clip" and self.filter is None:
            raise ConfigKeyError(
                f"{self.select.by!r} needs a filter; add a section [filter]", ("select", "by")
            )
        return self
