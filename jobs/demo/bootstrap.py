"""``capfilt bootstrap`` on the demo world, and how true the captions of each round's corpus are.

    python -m jobs.demo.bootstrap --out demo-bootstrap

The first model learns from alt texts, half of which are wrong, vague or spam; a smaller part of the world is
captioned by people. It begins with the ViT of ``weights/vit``: texts alone do not teach it shapes in these minutes.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from jobs.bootstrap.rounds import Rounds, load_rounds
from jobs.bootstrap.run import bootstrap
from jobs.demo.world.scenes import true_share, write_caption
from jobs.demo.world.site import pages, scene_of, serving, write_url_list
from pipeline.corpus.records import Records
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.storage import Storage

_RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo-bootstrap.toml"
_PORT = 8422
# People's captions of an image, as COCO has; of pages that the web's list does not have.
_HUMAN_CAPTIONS, _HUMAN_SEED = 5, 1


def write_human_list(path: Path, base_url: str, num_urls: int) -> None:
    """Write the columns url and caption, of true captions."""
    rng = random.Random(_HUMAN_SEED)
    listed = pages(num_urls, _HUMAN_SEED)
    captions = [[write_caption(page.scene, rng) for _ in range(_HUMAN_CAPTIONS)] for page in listed]
    pq.write_table(pa.table({"url": [base_url + page.path for page in listed], "caption": captions}), path)


def demo_rounds(
    folder: Path, base_url: str, rounds: int, num_web: int, num_human: int, overrides: list[str]
) -> Rounds:
    """Return the demo's bootstrapping in a folder, of a world served at ``base_url``; write its lists once."""
    lists = {"world": folder / "world.parquet", "clean": folder / "clean.parquet"}
    if not lists["clean"].exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_url_list(lists["world"], base_url, num_web)
        write_human_list(lists["clean"], base_url, num_human)
    paths = {
        "bootstrap.path": str(folder),
        "corpus.corpus.path": str(folder / "crawled"),
        **{f"corpus.source.{name}.input": [str(path)] for name, path in lists.items()},
        "corpus.crawl.allow_hosts": [urlsplit(base_url).netloc],
    }
    given = [f"{key}={json.dumps(value)}" for key, value in paths.items()]
    return load_rounds(str(_RECIPE), [*given, *overrides], rounds)


def corpus_truth(corpus: str, source: str = "world") -> dict[str, float]:
    """Return the share of entirely true texts among the kept ones of a corpus, and the share of images kept."""
    records = Records(Storage(corpus))
    rows = [
        row
        for (_, name, _), record in records.shards(("select",)).items()
        if name == source
        for row in committed_table(records, record.outputs["parquet"]).to_pylist()
    ]
    kept = [row for row in rows if row["status"] == "kept"]
    described = ((text, scene_of(row["url"])) for row in kept for text in row["captions"])
    return {"true": true_share(described), "images_kept": len(kept) / max(1, len(rows))}


def main() -> None:
    """Parse the command line, bootstrap, and print each round's truth as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-bootstrap"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--num-web", type=int, default=7200)
    parser.add_argument("--num-human", type=int, default=720)
    parser.add_argument("--set", action="append", default=[], help="as of capfilt bootstrap")
    args = parser.parse_args()
    with serving(_PORT) as base_url:
        rounds = demo_rounds(
            args.out.absolute(), base_url, args.rounds, args.num_web, args.num_human, args.set
        )
        for step in bootstrap(rounds, Console(stderr=True, soft_wrap=True), local=True):
            print(f"{step.name}, {time.process_time():.0f} s", file=sys.stderr, flush=True)
    for number in range(1, args.rounds + 1):
        print(json.dumps({"round": number} | corpus_truth(rounds.corpus_path(number))))


if __name__ == "__main__":
    main()
