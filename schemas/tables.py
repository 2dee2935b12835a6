"""Arrow schemas of every table; each column is declared, and described, here alone.

The descriptions are the source of docs/manifest.md and of ``capfilt sql CORPUS "DESCRIBE ..."``'s comments.
"""

import pyarrow as pa

from schemas.stages import Stage

DOC = b"doc"

# Of samples.detail.
MAX_DETAIL_CHARS = 200


def _column(name: str, dtype: pa.DataType, doc: str) -> pa.Field:
    return pa.field(name, dtype, metadata={DOC: doc.encode()})


def column_doc(field: pa.Field) -> str:
    """Return the description that a table's field carries."""
    description: bytes = field.metadata[DOC]
    return description.decode()


_IDENTITY = [
    _column("uid", pa.string(), "the sample's identity: 32 hex digits of sha256(source, url)"),
    _column("source", pa.string(), "name of the [[source]]"),
    _column("shard", pa.string(), "shard number within the source, five digits"),
    _column("key", pa.string(), "the sample's name inside its shard's tar"),
]

URLS = pa.schema(
    [
        *_IDENTITY,
        _column("url", pa.string(), "the URL as the list gives it"),
        _column(
            "captions", pa.list_(pa.string()), "every distinct caption the list gives for this URL, in order"
        ),
        _column("input_rows", pa.int32(), "rows of the list with this URL: duplicates are crawled once"),
        _column("extra", pa.string(), "the source's extra_columns as a JSON object"),
        _column("retry_of", pa.string(), "the shard in which this URL failed: this row tries it again"),
    ]
)

SAMPLES = pa.schema(
    [
        *URLS,
        _column("status", pa.string(), "ok, failed, refused, opted_out or invalid"),
        _column("reason", pa.string(), "why it is not ok; NULL where it is"),
        _column(
            "detail",
            pa.string(),
            f"what the library or the server said, at most {MAX_DETAIL_CHARS} characters",
        ),
        _column("http_status", pa.int16(), "code of the last response, NULL where there was none"),
        _column("attempts", pa.int16(), "requests made for it, redirects not counted"),
        _column("final_url", pa.string(), "the URL after redirects"),
        _column("content_type", pa.string(), "Content-Type of the last response"),
        _column("body_bytes", pa.int64(), "bytes of the body, decompressed where it came compressed"),
        _column("sha256", pa.string(), "of those bytes (a property: it changes between crawls)"),
        _column("format", pa.string(), "format of those bytes: JPEG, PNG, WEBP, ..."),
        _column("original_width", pa.int32(), "pixels, after EXIF orientation"),
        _column("original_height", pa.int32(), "pixels, after EXIF orientation"),
        _column("width", pa.int32(), "pixels as stored"),
        _column("height", pa.int32(), "pixels as stored"),
        _column("image_bytes", pa.int64(), "bytes of the stored JPEG"),
        _column("seconds", pa.float32(), "from the first request to the stored image, waits included"),
    ]
)

CAPTIONS = pa.schema(
    [
        *_IDENTITY,
        _column("origin", pa.string(), "synthetic, web or human"),
        _column("candidate", pa.int16(), "index within the origin, from 0"),
        _column("raw_text", pa.string(), "exactly what the captioner or the list said"),
        _column("text", pa.string(), "cleaned: what is scored and kept"),
        _column("seed", pa.uint64(), "of the sample's random stream; NULL for given captions"),
        _column(
            "num_tokens", pa.int16(), "tokens sampled, end of sequence included; NULL for given captions"
        ),
        _column(
            "duplicate_of", pa.int16(), "the first candidate of this origin with the same text, but for case"
        ),
    ]
)

CANDIDATES = pa.schema(
    [
        *CAPTIONS,
        _column("score", pa.float32(), "CLIP cosine similarity to the image; NULL until ranked"),
        _column("rerank_score", pa.float32(), "the second CLIP's, for the first [rank.rerank] candidates"),
        _column("truncated", pa.bool_(), "the text is longer than CLIP's context and was cut for scoring"),
    ]
)

MATCHES = pa.schema(
    [
        *CANDIDATES,
        _column(
            "match_probability", pa.float32(), "that the text matches the image, by [filter]; NULL without it"
        ),
    ]
)

CURATED = pa.schema(
    [
        *_IDENTITY,
        _column("url", pa.string(), "the URL as the list gives it"),
        _column("status", pa.string(), "kept or dropped"),
        _column("reason", pa.string(), "why it was dropped"),
        _column("caption", pa.string(), "the best caption: KEY.txt"),
        _column("captions", pa.list_(pa.string()), "the kept captions, best first: KEY.json"),
        _column("scores", pa.list_(pa.float32()), "their scores"),
        _column("origins", pa.list_(pa.string()), "their origins"),
        _column("candidates", pa.list_(pa.int16()), "their indexes within the origin"),
        _column("width", pa.int32(), "pixels as stored"),
        _column("height", pa.int32(), "pixels as stored"),
        _column("sha256", pa.string(), "of the bytes downloaded"),
    ]
)

# What the files of crawl and select hold beside their table: where a sample's image lies in the tar of the same shard.
# SQL does not show it; files of earlier versions lack it.
_OFFSET = _column(
    "offset", pa.int64(), "first byte of the image in the shard's tar; NULL where there is none"
)
SAMPLES_FILE = pa.schema([*SAMPLES, _OFFSET])
CURATED_FILE = pa.schema([*CURATED, _OFFSET, _column("image_bytes", pa.int64(), "bytes of the image")])

_SHARE = [
    _column("cpus", pa.float64(), "that its worker held"),
    _column("gpus", pa.float64(), "that its worker held; 0.2 is a fifth of one"),
    _column("node_type", pa.string(), "Ray's label ray.io/accelerator-type, else the GPU's name, or cpu"),
]

SHARDS = pa.schema(
    [
        _column("stage", pa.string(), "urls, crawl, caption, rank, filter or select"),
        _column("source", pa.string(), "name of the [[source]]"),
        _column("shard", pa.string(), "shard number within the source, five digits"),
        _column(
            "state",
            pa.string(),
            "committed, retired (recomputed since) or quarantined (failed every attempt)",
        ),
        _column("run_id", pa.string(), "the run that made it"),
        _column("attempt", pa.string(), "the attempt that won; part of the file names"),
        _column("fingerprint", pa.string(), "digest of config section, weights, stage version and input"),
        _column("inputs", pa.map_(pa.string(), pa.string()), "sha256 of each input file"),
        _column("models", pa.list_(pa.string()), "digests of the models used"),
        _column("paths", pa.map_(pa.string(), pa.string()), "output files, relative to the corpus"),
        _column("sha256", pa.map_(pa.string(), pa.string()), "sha256 of each output file"),
        _column("bytes", pa.int64(), "bytes of all output files"),
        _column("rows_in", pa.int64(), "rows the stage was given"),
        _column("rows_out", pa.int64(), "rows it passed on (images stored, captions, scores, images kept)"),
        _column("images", pa.int64(), "images it worked on"),
        _column(
            "counts",
            pa.map_(pa.string(), pa.int64()),
            "rows by status and by status/reason; `device_batch`: images at a time, where the device's memory allowed "
            "no more",
        ),
        _column("histograms", pa.string(), "JSON: {name: {edges: [...], counts: [...]}}"),
        _column(
            "seconds",
            pa.map_(pa.string(), pa.float64()),
            "seconds by part, which overlap; 'total' is the wall clock without 'wait', 'worker' the shard's part of "
            "the worker's time, which two shards may share",
        ),
        _column("started_at", pa.timestamp("us", tz="UTC"), "when the attempt began"),
        _column("finished_at", pa.timestamp("us", tz="UTC"), "when the record was made"),
        _column("host", pa.string(), "machine that did it"),
        _column("device", pa.string(), "cpu or the GPU's name"),
        _column("versions", pa.map_(pa.string(), pa.string()), "versions of the libraries that matter"),
        _column("error", pa.string(), "the last error of a quarantined shard"),
        *_SHARE,
    ]
)

LOST_ATTEMPTS = pa.schema(
    [
        _column("stage", pa.string(), "crawl, caption, rank, filter or select"),
        _column("source", pa.string(), "name of the [[source]]"),
        _column("shard", pa.string(), "shard number within the source, five digits"),
        _column("run_id", pa.string(), "the run that made it"),
        _column("number", pa.int64(), "which attempt at the shard in that run, from 1"),
        _column(
            "cause",
            pa.string(),
            "failed (the worker raised an error) or killed (it or its node died, or the run was stopped)",
        ),
        _column("error", pa.string(), "what the worker raised"),
        _column("started_at", pa.timestamp("us", tz="UTC"), "when it began"),
        _column(
            "ended_at", pa.timestamp("us", tz="UTC"), "when it failed; of a killed one, when that was seen"
        ),
        _column(
            "seconds", pa.float64(), "of its worker, as seconds['worker'] of a shard; of a killed one at most"
        ),
        _column("host", pa.string(), "machine that did it"),
        *_SHARE,
    ]
)

RUNS = pa.schema(
    [
        _column("run_id", pa.string(), "sortable by start: UTC time and a random part"),
        _column("command", pa.string(), "run, crawl, caption, rank, filter, select or pretrain"),
        _column("config", pa.string(), "the resolved config as JSON"),
        _column("config_digest", pa.string(), "sha256 of it"),
        _column("started_at", pa.timestamp("us", tz="UTC"), "start"),
        _column(
            "finished_at", pa.timestamp("us", tz="UTC"), "end; NULL while it runs, or where it was killed"
        ),
        _column("outcome", pa.string(), "done, partial, interrupted or error; NULL without an end"),
        _column("shards_done", pa.int64(), "shards committed by it, over all stages"),
        _column("shards_skipped", pa.int64(), "shards that were there already"),
        _column("shards_failed", pa.int64(), "shards it quarantined"),
        _column("host", pa.string(), "the driver's machine"),
        _column("versions", pa.map_(pa.string(), pa.string()), "versions of the libraries that matter"),
    ]
)

MODELS = pa.schema(
    [
        _column("digest", pa.string(), "sha256 over the weights and config files"),
        _column(
            "kind",
            pa.string(),
            "captioner, ranker, filter, or (of a training) vision, language, tokenizer, qformer",
        ),
        _column("name", pa.string(), "hub id, architecture or folder, as the config names it"),
        _column("revision", pa.string(), "hub revision or pretrained tag"),
        _column("files", pa.map_(pa.string(), pa.string()), "sha256 of each file"),
        _column("parameters", pa.int64(), "number of parameters"),
        _column("registered_at", pa.timestamp("us", tz="UTC"), "when a run first used it here"),
    ]
)

CHECKPOINTS = pa.schema(
    [
        _column("path", pa.string(), "relative to the corpus, or a URL"),
        _column("stage", pa.string(), "pretraining stage"),
        _column("run_id", pa.string(), "the run that wrote it"),
        _column("step", pa.int64(), "optimiser steps"),
        _column("samples", pa.int64(), "samples consumed"),
        _column("snapshot", pa.string(), "digest of the curated shards it ate"),
        _column("models", pa.list_(pa.string()), "digests of the models it loads or began from"),
        _column("sha256", pa.map_(pa.string(), pa.string()), "sha256 of each file"),
        _column("metrics", pa.string(), "JSON: losses at this step, and the probe's values if it was probed"),
        _column("created_at", pa.timestamp("us", tz="UTC"), "when it was complete"),
    ]
)

SNAPSHOTS = pa.schema(
    [
        _column("digest", pa.string(), "of the shards that a training reads: `snapshot` of its checkpoints"),
        _column("folder", pa.string(), "where the checkpoints are, relative to the corpus, or a URL"),
        _column("corpus", pa.string(), "the corpus or folder, as the training's config named it"),
        _column("source", pa.string(), "name of the [[source]]"),
        _column("shard", pa.string(), "shard number within the source"),
        _column("images", pa.int64(), "images that it trained on"),
        _column("held_out", pa.list_(pa.string()), "uids that it left out, for its probe"),
        _column("sha256", pa.map_(pa.string(), pa.string()), "sha256 of the curated files as they were then"),
    ]
)

MARKS = pa.schema(
    [
        _column("mark", pa.string(), "the mark's id; one mark may name several values"),
        _column("what", pa.string(), "drop, or not-this-caption"),
        _column("named_by", pa.string(), "what it names its samples by: uid, url, host or sha256"),
        _column("value", pa.string(), "the uid, URL, host or sha256"),
        _column("caption", pa.string(), "the text that is out of the running; NULL of a drop"),
        _column("reason", pa.string(), "why, in the words of who made it"),
        _column("made_at", pa.timestamp("us", tz="UTC"), "when it was made"),
        _column("host", pa.string(), "machine that it was made on"),
        _column("undone_at", pa.timestamp("us", tz="UTC"), "when it was taken back; NULL while it holds"),
    ]
)

# The Parquet of each stage.
STAGE_SCHEMAS: dict[Stage, pa.Schema] = {
    "urls": URLS,
    "crawl": SAMPLES,
    "caption": CAPTIONS,
    "rank": CANDIDATES,
    "filter": MATCHES,
    "select": CURATED,
}

# The tables that ``manifest.duckdb`` offers, in the order the docs show them.
TABLES: dict[str, pa.Schema] = {
    "samples": SAMPLES,
    "candidates": MATCHES,
    "curated": CURATED,
    "dropped": CURATED,
    "shards": SHARDS,
    "lost_attempts": LOST_ATTEMPTS,
    "runs": RUNS,
    "models": MODELS,
    "checkpoints": CHECKPOINTS,
    "snapshots": SNAPSHOTS,
    "marks": MARKS,
}

TABLE_DOCS: dict[str, str] = {
    "samples": "One row for every URL of every list, whatever became of it; of a retried URL, its last try.",
    "candidates": "One row for each image and caption, synthetic, web or human, with score. All are kept.",
    "curated": "One row for each image that training reads.",
    "dropped": "One row for each image that was captioned and scored, and of whose captions none was kept.",
    "shards": "One row for each shard and stage: the commits. Statistics are sums over these rows.",
    "lost_attempts": "One row for each attempt at a shard that did not commit it, with what it cost.",
    "runs": "One row for each run.",
    "models": "One row for each set of weights that a run used.",
    "checkpoints": "One row for each checkpoint trained on this corpus, or on copies of its images.",
    "snapshots": "One row for each training and shard: what its checkpoints were trained on.",
    "marks": "One row for each verdict on samples: what `capfilt mark` said, and whether it still holds.",
}
