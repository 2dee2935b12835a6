"""A corpus begins with the lists and the crawled images of another one, so that no URL is fetched again."""

from pipeline.corpus.records import Records
from schemas.records import OutputFile

# Verdicts on samples hold in every corpus that has them.
_MARKS = ("records/marks", "records/mark-searches")


def take_over_crawl(base: Records, records: Records) -> None:
    """Give a corpus the url shards, crawled shards and marks of another one, under the same names.

    Safe to repeat and to kill: files come before the crawl's records, and these before the lists', without which
    nothing is planned. What the corpus has already stays as it is. On local disk files are shared as hard links;
    imported tars stay where they lie.
    """
    # Listed first: a list that is read meanwhile is not taken over with shards that are not.
    lists, shards = base.intakes(), base.shards(("crawl",)).values()
    files = [file for batch in lists for file in batch.shards.values()]
    files += [file for shard in shards for file in shard.outputs.values()]
    records.storage.map(lambda file: _copy_file(base, records, file), files)
    makers = {batch.run_id for batch in lists} | {shard.run_id for shard in shards}
    runs = [info.path for info in base.storage.list("records/runs") if _run_id(info.path) in makers]
    marks = [info.path for folder in _MARKS for info in base.storage.list(folder)]
    for paths in (runs, marks, [shard.path for shard in shards], [batch.path for batch in lists]):
        records.storage.map(lambda path: _copy_record(base, records, path), paths)


def _run_id(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _copy_file(base: Records, records: Records, file: OutputFile) -> None:
    is_imported = base.storage.url(file.path) == file.path
    if is_imported or records.storage.exists(file.path):
        return
    with base.storage.local_copy(file.path) as local:
        records.storage.share(local, file.path)


def _copy_record(base: Records, records: Records, path: str) -> None:
    records.storage.create(path, base.storage.read(path))
