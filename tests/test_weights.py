"""Weights: local folders, the hub's cache and the hub itself; everything missing is refused by name."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_captioner, save_ranker
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

from jobs.bench.fixtures.s3 import S3Server
from pipeline.models.weights import captioner_weights, ranker_weights
from pipeline.storage.storage import Storage
from schemas.config import CaptionConfig
from schemas.errors import CapfiltError

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "353689b859bcf0523410b1806dace5fb46ecdf41"
OTHER_COMMIT = "0" * 40


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ranker(tmp_path_factory.mktemp("ranker"))


def config(model: object, revision: str = "main") -> CaptionConfig:
    return CaptionConfig(model=str(model), revision=revision)


# -- local folders -------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_content(captioner: Path, tmp_path: Path) -> None:
    weights = captioner_weights(config(captioner))
    assert weights.path == str(captioner) and weights.kind == "captioner"
    names = set(weights.files)
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"} <= names
    for name, sha256 in weights.files.items():
        assert sha256 == hashlib.sha256((captioner / name).read_bytes()).hexdigest()
    copy = Path(shutil.copytree(captioner, tmp_path / "copy"))
    (copy / "README.md").write_text("no part of the model")
    assert captioner_weights(config(copy)).digest == weights.digest
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        changed = Path(shutil.copytree(captioner, tmp_path / f"changed-{name}"))
        (changed / name).write_bytes((changed / name).read_bytes() + b" ")
        assert captioner_weights(config(changed)).digest != weights.digest


def test_a_file_that_changes_under_the_process_is_digested_again(captioner: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(captioner, tmp_path / "copy"))
    before = captioner_weights(config(copy)).digest
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    assert captioner_weights(config(copy)).digest != before


def test_the_record_counts_parameters(captioner: Path, ranker: Path) -> None:
    record = captioner_weights(config(captioner)).to_record()
    model = BlipForConditionalGeneration.from_pretrained(captioner)
    assert record.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (record.kind, record.name, record.revision) == ("captioner", str(captioner), "")
    record = ranker_weights(f"local-dir:{ranker}", "").to_record()
    clip = open_clip.create_model(f"local-dir:{ranker}")
    assert record.parameters == sum(parameter.numel() for parameter in clip.parameters())


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_missing_captioner_file_is_named(captioner: Path, tmp_path: Path, missing: str) -> None:
    folder = Path(shutil.copytree(captioner, tmp_path / "folder"))
    (folder / missing).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle does not replace it")
    with pytest.raises(CapfiltError, match=rf"^{missing} is missing in {folder}; caption\.model must be"):
        captioner_weights(config(folder))


def test_a_missing_part_of_sharded_weights_is_named(captioner: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(captioner, tmp_path / "folder"))
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors").rename(folder / parts[0])
    index = {"weight_map": {"a": parts[0], "b": parts[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CapfiltError, match=f"^{parts[1]} is missing"):
        captioner_weights(config(folder))


@pytest.mark.parametrize(
    "missing", ["open_clip_model.safetensors", "open_clip_config.json", "tokenizer.json"]
)
def test_a_missing_ranker_file_is_named(ranker: Path, tmp_path: Path, missing: str) -> None:
    folder = Path(shutil.copytree(ranker, tmp_path / "folder"))
    (folder / missing).unlink()
    with pytest.raises(CapfiltError, match=rf"^{missing} is missing in {folder}; rank\.model must name"):
        ranker_weights(f"local-dir:{folder}", "")


@pytest.mark.parametrize("model", ["/no/such/folder", "./captioner", "captioner", "a/b/c", "~/nowhere"])
def test_what_is_neither_folder_nor_hub_id(model: str) -> None:
    with pytest.raises(CapfiltError, match=r"caption\.model = .* no such folder"):
        captioner_weights(config(model))


def put_folder(folder: Path, root: str) -> None:
    storage = Storage(root)
    for file in folder.iterdir():
        if file.is_file():
            storage.put(file, file.name)


def test_weights_on_object_storage_are_fetched_once_a_machine(
    captioner: Path,
    ranker: Path,
    s3_root: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    put_folder(captioner, f"{s3_root}/blip")
    put_folder(ranker, f"{s3_root}/clip")
    Storage(f"{s3_root}/blip").write("other/model.safetensors", b"of another model")
    s3_server.requests.clear()
    with ThreadPoolExecutor(4) as workers:
        found = list(workers.map(lambda _: captioner_weights(config(f"{s3_root}/blip")), range(4)))
    assert {weights.digest for weights in found} == {captioner_weights(config(captioner)).digest}
    assert (found[0].name, found[0].revision) == (f"{s3_root}/blip", "")
    fetched = [request.key for request in s3_server.requests if request.kind == "GET"]
    assert len(fetched) == len(set(fetched)) and any(key.endswith("model.safetensors") for key in fetched)
    assert not any("other/" in key for key in fetched)
    clip = ranker_weights(f"{s3_root}/clip", "")
    assert clip.digest == ranker_weights(f"local-dir:{ranker}", "").digest
    # What is put there in its place is another model; what was fetched in part is fetched again.
    config_json = json.loads((captioner / "config.json").read_text()) | {"projection_dim": 7}
    Storage(f"{s3_root}/blip").write("config.json", json.dumps(config_json).encode())
    again = captioner_weights(config(f"{s3_root}/blip"))
    assert again.digest != found[0].digest and again.path != found[0].path
    Path(again.path, "config.json").rename(Path(again.path, ".config.json.part"))
    assert captioner_weights(config(f"{s3_root}/blip")).digest == again.digest


def test_a_place_without_weights_is_named(s3_root: str) -> None:
    with pytest.raises(
        CapfiltError, match=rf"caption\.model = '{s3_root}/nothing': there is none of config\.json"
    ):
        captioner_weights(config(f"{s3_root}/nothing"))
    with pytest.raises(CapfiltError, match=r"rank\.model = 's3://no-such-bucket/x': "):
        ranker_weights("s3://no-such-bucket/x", "")


def test_other_models_are_refused(captioner: Path, ranker: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(captioner, tmp_path / "folder"))
    (folder / "config.json").write_text('{"model_type": "git"}')
    with pytest.raises(CapfiltError, match="a 'git' model; the captioner must be a 'blip' one"):
        captioner_weights(config(folder))
    folder = Path(shutil.copytree(ranker, tmp_path / "clip"))
    text = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(
        text.replace('"strip_sep_token": false', '"trust_remote_code": true')
    )
    with pytest.raises(CapfiltError, match="trust_remote_code"):
        ranker_weights(f"local-dir:{folder}", "")


def test_architectures_and_tags_are_checked(tmp_path: Path) -> None:
    with pytest.raises(
        CapfiltError, match=r"'ViT-L14' is not an architecture of open_clip.*did you mean ViT-L-14"
    ):
        ranker_weights("ViT-L14", "openai")
    with pytest.raises(
        CapfiltError, match=r"'opnai' is neither a file nor a pretrained tag of ViT-L-14 .*openai"
    ):
        ranker_weights("ViT-L-14", "opnai")
    pickle = tmp_path / "weights.pt"
    pickle.write_bytes(b"x")
    with pytest.raises(CapfiltError, match="only safetensors are read"):
        ranker_weights("ViT-L-14", str(pickle))
    with pytest.raises(CapfiltError, match=r"rank\.rerank\.pretrained = 'openai' has no effect"):
        ranker_weights("hf-hub:a/b", "openai", "rank.rerank")


def test_an_architectures_digest_covers_more_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(3)}, file)
    plain = ranker_weights("ViT-L-14", str(file))
    assert plain.digest != ranker_weights("ViT-L-14-quickgelu", str(file)).digest
    assert plain.to_record().parameters == 3


# -- the hub's cache -----------------------------------------------------------------------------------------


def save_cache(hub: Path, repository: str, folder: Path, ref: str = "main") -> Path:
    """Lay a folder out as the hub's client does: blobs by digest, links to them in a commit's snapshot."""
    root = hub / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / ref).write_text(COMMIT)
    for file in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def python(code: str, hub: Path, **environment: str) -> tuple[dict, float]:
    """Run code that prints JSON in a process of its own: the hub's client reads its settings at import."""
    start = time.monotonic()
    environment = {**os.environ, "HF_HOME": str(hub.parent), "HF_HUB_CACHE": str(hub)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), time.monotonic() - start


FIND = """
import json
from pipeline.models.weights import captioner_weights
from schemas.config import CaptionConfig
from schemas.errors import CapfiltError
answers = []
for model, revision in {queries}:
    try:
        weights = captioner_weights(CaptionConfig(model=model, revision=revision))
        answers.append([weights.path, weights.digest, weights.revision])
    except CapfiltError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def test_the_cache_answers_offline(captioner: Path, tmp_path: Path) -> None:
    digest = captioner_weights(config(captioner)).digest
    hub = tmp_path / "hub"
    snapshot = save_cache(hub, "org/blip", Path(shutil.copytree(captioner, tmp_path / "copy")))
    partial = Path(shutil.copytree(captioner, tmp_path / "partial"))
    (partial / "model.safetensors").unlink()
    save_cache(hub, "org/partial", partial)
    queries = [
        ("org/blip", "main"),
        ("org/blip", COMMIT),
        ("org/blip", OTHER_COMMIT),
        ("org/blip", "v2"),
        ("org/partial", "main"),
        ("org/unknown", "main"),
    ]
    answers, _ = python(FIND.format(queries=queries), hub, HF_HUB_OFFLINE="1")
    assert answers[0] == [str(snapshot), digest, "main"]
    assert answers[1] == [str(snapshot), digest, COMMIT]
    for answer, revision in ((answers[2], OTHER_COMMIT), (answers[3], "v2")):
        assert f"org/blip at revision '{revision}' cannot be fetched (HF_HUB_OFFLINE is set)" in answer
        assert f"has only main, {COMMIT}" in answer
    assert "the cache lacks its model.safetensors" in answers[4]
    assert (
        "org/unknown at revision 'main' cannot be fetched" in answers[5] and "has nothing of it" in answers[5]
    )


# -- the hub itself, on loopback -----------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as a download needs; ``asked`` is what was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder = folder
        self.asked: list[str] = []


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        files = sorted(self.server.folder.iterdir())
        if path in ("/api/models/org/blip/revision/main", f"/api/models/org/blip/revision/{COMMIT}"):
            self._send(200, json.dumps({"id": "org/blip", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/org/blip/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files
            ]
            self._send(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/org/blip/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/org/blip/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            etag = hashlib.sha256(name.encode()).hexdigest()
            self._send(
                200, (self.server.folder / name).read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
            )
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def hub_server(captioner: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = Path(shutil.copytree(captioner, tmp_path / "published"))
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md", "code.py"):
        (folder / name).write_bytes(b"not for us")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_once_and_for_our_files_alone(
    captioner: Path, hub_server: Hub, tmp_path: Path
) -> None:
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub_server.server_port}"}
    queries = [("org/blip", COMMIT), ("org/blip", "v2"), ("org/none", "main")]
    answers, _ = python(FIND.format(queries=queries), tmp_path / "hub", **online)
    assert answers[0][1:] == [captioner_weights(config(captioner)).digest, COMMIT]
    assert "org/blip at revision 'v2': the hub has no such revision" in answers[1]
    assert "org/none at revision 'main': the hub has no such model" in answers[2]
    fetched = {line.rpartition("/")[2] for line in hub_server.asked if "/resolve/" in line}
    assert "model.safetensors" in fetched
    assert not fetched & {"pytorch_model.bin", "tf_model.h5", "README.md", "code.py"}
    # A commit in the cache needs no network; a branch is looked up, and stands where the hub is gone.
    hub_server.asked.clear()
    python(FIND.format(queries=[("org/blip", COMMIT)]), tmp_path / "hub", **online)
    assert not [line for line in hub_server.asked if "org/blip" in line]
    queried, _ = python(FIND.format(queries=[("org/blip", "main")]), tmp_path / "hub", **online)
    assert [line for line in hub_server.asked if "org/blip" in line]
    gone, _ = python(FIND.format(queries=[("org/blip", "main")]), tmp_path / "hub", HF_HUB_OFFLINE="1")
    assert queried == gone == [[answers[0][0], answers[0][1], "main"]]


def test_no_network_is_said_at_once(tmp_path: Path) -> None:
    code = FIND.format(queries=[("org/blip", "main")])
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    (answer,), seconds = python(code, tmp_path / "hub", **online)
    assert "caption.model: org/blip at revision 'main' cannot be fetched" in answer
    assert seconds < 20


def test_a_network_that_swallows_everything_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code = "import pipeline.models.files.hub; pipeline.models.files.hub._TIMEOUT_S = 1.0\n" + FIND.format(
            queries=[("org/blip", "main")]
        )
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (answer,), seconds = python(code, tmp_path / "hub", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
    assert "org/blip at revision 'main' cannot be fetched" in answer
    assert seconds < 20


# -- the published models at full size -----------------------------------------------------------------------

# As Salesforce/blip-image-captioning-large publishes them, leftovers of old versions included.
BLIP_LARGE = {
    "architectures": ["BlipForConditionalGeneration"],
    "image_text_hidden_size": 256,
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "blip",
    "projection_dim": 512,
    "text_config": {
        "_name_or_path": "",
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": 30522,
        "diversity_penalty": 0.0,
        "do_sample": False,
        "encoder_hidden_size": 1024,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "is_decoder": True,
        "layer_norm_eps": 1e-12,
        "length_penalty": 1.0,
        "max_length": 20,
        "max_position_embeddings": 512,
        "min_length": 0,
        "model_type": "blip_text_model",
        "num_attention_heads": 12,
        "num_beams": 1,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "projection_dim": 768,
        "repetition_penalty": 1.0,
        "sep_token_id": 102,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "torch_dtype": None,
        "use_cache": True,
        "vocab_size": 30524,
    },
    "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config": {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 384,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "model_type": "blip_vision_model",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 16,
        "projection_dim": 512,
    },
}
BLIP_PREPROCESSOR = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "BlipImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "BlipProcessor",
    "size": {"height": 384, "width": 384},
}


def random_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Fill a model that lies on the meta device: one block of random numbers, over and over."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    state = {}
    for name, tensor in model.state_dict().items():
        repeats = -(-tensor.numel() // len(block))
        state[name] = block.repeat(repeats)[: tensor.numel()].reshape(tensor.shape)
    return state


def run_offline(code: str, hub: Path) -> dict:
    return python(code, hub, HF_HUB_OFFLINE="1")[0]


@pytest.mark.slow
def test_blip_large_loads_from_the_cache_at_full_size(tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    with torch.device("meta"):
        model = BlipForConditionalGeneration(BlipConfig.from_dict(BLIP_LARGE))
    state = random_state(model)
    state["text_decoder.cls.predictions.bias"][102] = 5.0
    # Saved by transformers 4: tied tensors and a buffer that 5 no longer has are in the file.
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(512)[None]
    save_file(state, published / "model.safetensors", {"format": "pt"})
    (published / "config.json").write_text(json.dumps(BLIP_LARGE))
    (published / "preprocessor_config.json").write_text(json.dumps(BLIP_PREPROCESSOR))
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    vocabulary = {special.get(index, f"w{index}"): index for index in range(30_522)}
    BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(published)
    (published / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    hub = tmp_path / "hub"
    save_cache(hub, "Salesforce/blip-image-captioning-large", published)
    del state
    result = run_offline(
        """
import io
import json
import numpy as np
from PIL import Image
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.weights import captioner_weights
from schemas.config import CaptionConfig
from schemas.errors import CapfiltError
config = CaptionConfig(num_captions=2, max_length=6, min_length=3)
weights = captioner_weights(config)
image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
data = io.BytesIO()
image.save(data, "PNG")
captions = BlipCaptioner(config, weights, 0)([data.getvalue()], ["00"])
try:
    captioner_weights(config.model_copy(update={"revision": "1" * 40}))
except CapfiltError as error:
    refused = str(error)
print(json.dumps([weights.to_record().parameters, [[c.text, c.num_tokens] for c in captions[0]], refused]))
""",
        hub,
    )
    shutil.rmtree(hub)
    parameters, captions, refused = result
    assert parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    assert len(captions) == 2 and all(text and 2 <= tokens <= 5 for text, tokens in captions)
    assert f"Salesforce/blip-image-captioning-large at revision '{'1' * 40}'" in refused


@pytest.mark.slow
def test_openai_clip_loads_from_the_cache_at_full_size(tmp_path: Path) -> None:
    published, hub = tmp_path / "published", tmp_path / "hub"
    published.mkdir()
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14"))
    state = random_state(model)
    state["logit_scale"] = torch.tensor(4.6052)
    save_file(state, published / "open_clip_model.safetensors", {"format": "pt"})
    repository = "timm/vit_large_patch14_clip_224.openai"
    save_cache(hub, repository, published)
    del state
    snapshot = hub / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
    # Then again without the file.
    code = f"""
import json
from pathlib import Path
import torch
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.weights import ranker_weights
from schemas.errors import CapfiltError
weights = ranker_weights("ViT-L-14", "openai")
ranker = ClipRanker(weights, "fp32")
pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
scores = ranker.score_pixels(pixels, [["a dog", "word " * 80]])[0]
activation = type(ranker._encode_text._last._mlp.gelu).__name__
record = weights.to_record()
next(Path({str(snapshot)!r}).iterdir()).unlink()
try:
    ranker_weights("ViT-L-14", "openai")
except CapfiltError as error:
    refused = str(error)
print(json.dumps([record.parameters, activation, weights.name, weights.revision,
                  [[score.similarity, score.truncated] for score in scores], refused]))
"""
    parameters, activation, name, revision, scores, refused = run_offline(code, hub)
    shutil.rmtree(hub)
    assert parameters == 427_616_513
    assert (activation, name, revision) == ("QuickGELU", "ViT-L-14", "openai")
    assert [truncated for _, truncated in scores] == [False, True]
    assert all(-1 <= similarity <= 1 for similarity, _ in scores)
    assert "rank.pretrained: timm/vit_large_patch14_clip_224.openai" in refused
    assert "open_clip_model.safetensors" in refused
