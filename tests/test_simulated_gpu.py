"""What code for a GPU does with its tensors, on a GPU that the CPU computes: it ends as on the CPU."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from raw_shards import encoded, picture
from simulated_gpu import NAME, simulated_gpu
from tiny_models import save_captioner, save_matcher, save_qformer_matcher, save_ranker
from tiny_training import tiny_blip_config, tiny_config
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from jobs.run_record import begin_run
from pipeline.corpus.records import Records
from pipeline.images.preprocess import Preprocess, decode_pixels, stack_pinned
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.blip.matcher import Matcher
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.weights import captioner_weights, filter_weights, ranker_weights
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.storage import Storage
from schemas.config import CaptionConfig, FilterConfig
from schemas.pretrain import PretrainConfig
from tests.corpora import make_corpus
from tests.runs import do_run, small_config, with_values
from training.convert.export import export_model
from training.convert.load import load_trained
from training.distributed import World
from training.trainer.run import pretrain
from training.trainer.summary import Summary

TEXTS = [
    ["a red circle", "the dog", "a blue square"],
    ["dog"],
    [],
    ["a red circle"] * 2,
    ["running dog sky"],
    ["the"],
]
# A batch that fills its buffers, one that does not, and one behind that.
BATCHES = [range(4), range(4, 6), range(3)]


def pixels(preprocess: Preprocess, images: Sequence[int]) -> Tensor:
    return stack_pinned(
        [decode_pixels(encoded(picture(number)), [preprocess], "exact")[0] for number in images]
    )


# -- the rules -------------------------------------------------------------------------------------------------


def test_tensors_of_both_devices_do_not_meet() -> None:
    with simulated_gpu():
        on_gpu = torch.arange(6.0, device="cuda").view(2, 3)
        assert on_gpu.is_cuda and (on_gpu * 2)[:, 1].cpu().tolist() == [2, 8]
        with pytest.raises(RuntimeError, match="same device"):
            on_gpu + torch.ones(2, 3)
        with pytest.raises(TypeError, match="numpy"):
            on_gpu.numpy()
        layer = torch.nn.Linear(3, 2).to("cuda")
        layer(on_gpu).sum().backward()
        assert layer.weight.grad.device == on_gpu.device
    assert not torch.cuda.is_available()


def test_a_graph_computes_with_what_its_memory_has_when_it_is_launched() -> None:
    with simulated_gpu():
        number, total, seen = (torch.zeros(2, device="cuda") for _ in range(3))
        graph, on_host = torch.cuda.CUDAGraph(), 1.0
        with torch.cuda.graph(graph):
            total += number * on_host
            seen[:1] = total[1:]
            with pytest.raises(RuntimeError, match="captured"):
                bool((total > 0).any())
            with pytest.raises(RuntimeError, match="captured"):
                total.cpu()
        on_host = 100.0
        for value in (2.0, 3.0):
            number.fill_(value)
            graph.replay()
        assert on_host and total.tolist() == [5, 5] and seen.tolist() == [5, 0]


def test_behind_it_everything_is_as_before() -> None:
    to, done = torch.Tensor.to, threading.Event()
    with simulated_gpu():
        # Threads of a loader end later.
        late = threading.Thread(target=done.wait)
        late.start()
    done.set()
    late.join()
    graphs = CompileCounter()
    assert torch.compile(lambda tensor: tensor + 1, backend=graphs)(torch.zeros(2)).tolist() == [1, 1]
    assert graphs.frame_count == 1 and torch.Tensor.to is to and not torch.cuda.is_available()


# -- models of the pipeline ------------------------------------------------------------------------------------


def test_captions_are_those_of_the_cpu(tmp_path: Path) -> None:
    config = CaptionConfig(
        model=str(save_captioner(tmp_path / "captioner")),
        num_captions=3,
        max_length=12,
        batch_size=4,
        precision="fp32",
    )

    def captions() -> list[object]:
        captioner = BlipCaptioner(config, captioner_weights(config), 0)
        batches = [[encoded(picture(number)) for number in images] for images in BATCHES]
        uids = [[f"{number:02x}" for number in images] for images in BATCHES]
        return [captioner(*batch) for batch in zip(batches, uids, strict=True)]

    expected = captions()
    with simulated_gpu():
        assert captions() == expected


@pytest.mark.parametrize("save", [save_matcher, save_qformer_matcher], ids=["blip", "blip2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_match_probabilities_are_those_of_the_cpu(tmp_path: Path, save: object, precision: str) -> None:
    config = FilterConfig(
        model=str(save(tmp_path / "filter")), max_tokens=12, batch_size=4, precision=precision
    )

    def probabilities() -> list[float]:
        matcher = Matcher(config, filter_weights(config))
        batches = [
            matcher.match(pixels(matcher.preprocess, images), [TEXTS[number] for number in images])
            for images in BATCHES
        ]
        return [number for batch in batches for row in batch for number in row]

    expected = probabilities()
    with simulated_gpu():
        assert probabilities() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bert", [True, False])
def test_scores_are_those_of_the_cpu(tmp_path: Path, bert: bool) -> None:
    folder = save_ranker(tmp_path / "ranker", bert=bert)

    def scores() -> list[float]:
        ranker = ClipRanker(ranker_weights(f"local-dir:{folder}", ""), "fp32", 4)
        batches = [
            ranker.score_pixels(pixels(ranker.preprocess, images), [TEXTS[number] for number in images])
            for images in BATCHES
        ]
        return [score.similarity for batch in batches for row in batch for score in row]

    expected = scores()
    with simulated_gpu():
        assert scores() == pytest.approx(expected, abs=1e-6)


def test_a_run_keeps_the_captions_that_it_keeps_on_the_cpu(base_url: str, tmp_path: Path) -> None:
    def kept(name: str, gpus: float) -> tuple[list[object], set[str]]:
        given = small_config(str(tmp_path / name), tmp_path / "urls.parquet", base_url, 16, 8, filtered=True)
        workers = {stage: {"gpus": gpus} for stage in ("caption", "rank", "filter")}
        precision = {stage: {"precision": "fp32"} for stage in workers}
        assert do_run(with_values(given, cluster=workers, **precision)).exit_code == 0
        records = Records(Storage(given.corpus.path))
        shards = records.shards(("select",)).values()
        rows = [
            row
            for record in shards
            for row in committed_table(records, record.outputs["parquet"]).to_pylist()
        ]
        return [(row["uid"], row["captions"]) for row in rows], {
            record.device for record in records.shards(("caption", "rank", "filter")).values()
        }

    expected, devices = kept("cpu", 0)
    assert devices == {"cpu"} and any(captions for _, captions in expected)
    with simulated_gpu():
        assert kept("gpu", 1) == (expected, {NAME})


# -- trainings -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    make_corpus(str(folder / "corpus"), sources=("cc", "coco"), shards=1, images=24)
    tiny_config(folder, folder / "corpus")  # saves the models, which two ranks at once would
    return folder


def trained(config: PretrainConfig, device: str, stop_after: int = 0) -> Summary:
    """Train on a device; with ``stop_after`` looks at it, stop and go on."""
    looks = iter(range(100))

    def train(stop_asked: Callable[[], bool]) -> Summary:
        run = begin_run("pretrain", config)
        return pretrain(config, World(device), run, stop_asked=stop_asked, log=lambda text: None)

    if stop_after:
        assert train(lambda: next(looks) >= stop_after).outcome == "interrupted"
    return train(lambda: False)


def run_of(workspace: Path, name: str) -> dict[str, str]:
    return {"name": name, "output": str(workspace / "run")}


def assert_as_on_the_cpu(made: PretrainConfig, workspace: Path) -> str:
    """Train on the CPU, and on the GPU with a stop in between; return the folder of the latter."""
    on_cpu, on_gpu = (
        made.model_copy(update={"run": made.run.model_copy(update=run_of(workspace, name))})
        for name in ("cpu", "gpu")
    )
    expected = trained(on_cpu, "cpu")
    with simulated_gpu():
        actual = trained(on_gpu, "cuda:0", stop_after=5)
    losses = {
        name: value for name, value in expected.metrics.items() if name in {"loss", "itc", "itm", "itg", "lm"}
    }
    assert losses == pytest.approx({name: actual.metrics[name] for name in losses}, rel=1e-4)
    return actual.folder


@pytest.mark.training
def test_both_stages_train_as_on_the_cpu(workspace: Path) -> None:
    looks = {"data": {"held_out": 8}, "probe": {"every_steps": 4, "images": 4}}
    stage1 = assert_as_on_the_cpu(
        tiny_config(
            workspace,
            workspace / "corpus",
            performance={"precision": "fp32", "micro_batch_size": 4},
            checkpoint={"every_steps": 2, "asynchronous": True},
            **looks,
        ),
        workspace,
    )
    for family in ("opt", "t5"):
        run = {"init_from": stage1}
        config = tiny_config(
            workspace, workspace / "corpus", 2, language={"family": family}, run=run, **looks
        )
        assert_as_on_the_cpu(config, workspace / family)


@pytest.mark.training
def test_blips_models_train_as_on_the_cpu(workspace: Path) -> None:
    med = assert_as_on_the_cpu(tiny_blip_config(workspace, workspace / "corpus"), workspace)
    for kind in ("blip-captioner", "blip-filter"):
        run = {"init_from": med}
        trained_one = assert_as_on_the_cpu(
            tiny_blip_config(workspace, workspace / "corpus", kind, run=run), workspace
        )
    assert export_model(load_trained(trained_one), workspace / "exported") == "huggingface"
    # As transformers saves it, without a temperature: the model's own is on the GPU.
    for ours in (workspace / "exported").glob("capfilt*"):
        ours.unlink()
    run = {"init_from": str(workspace / "exported")}
    again = tiny_blip_config(workspace, workspace / "corpus", "blip-filter", run=run)
    assert_as_on_the_cpu(again, workspace / "again")


def losses_of_ranks(world: World, workspace: Path, device: str) -> list[dict[str, float]]:
    """Train stage 1 and a MED as a rank of several."""
    looks = {"data": {"held_out": 8}, "probe": {"every_steps": 4, "images": 4}}
    run = run_of(workspace, f"ranks-{device[:3]}")
    configs = [
        tiny_config(workspace, workspace / "corpus", run=run, **looks),
        tiny_blip_config(workspace, workspace / "corpus", run=run),
    ]
    with simulated_gpu() if device != "cpu" else contextlib.nullcontext():
        summaries = [trained(config, device) for config in configs]
    names = {"loss", "itc", "itm", "itg", "lm"}
    return [{name: summary.metrics[name] for name in names & summary.metrics.keys()} for summary in summaries]


@pytest.mark.training
def test_two_ranks_train_as_on_the_cpu(workspace: Path) -> None:
    [expected, _] = on_ranks(2, losses_of_ranks, workspace, "cpu")
    [actual, _] = on_ranks(2, losses_of_ranks, workspace, "cuda:0")
    assert actual == [pytest.approx(losses, rel=1e-4) for losses in expected] and len(expected[0]) == 4
