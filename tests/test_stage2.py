"""Stage 2: the losses are the language model's own, exactly accumulated; frozen parts stay frozen."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from tiny_models import IMAGE_PX
from tiny_training import NUM_QUERIES, save_opt, save_t5, tiny_config
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from trained import begun_stage
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip2.stage2 import Stage2
from training.build import compile_stage, meta_stage
from training.convert.export import export_model
from training.distributed import World
from training.evaluate.generation import Decoding, Stage2Generator
from training.models.language import load_language, split_caption

pytestmark = pytest.mark.training

CAPTIONS = [
    "a red circle",
    "the dog on grass",
    "two cats near a tree under the blue sky in the street with a large dog",
    "photo",
    "a large white square",
    "the small black cat running",
]
N = len(CAPTIONS)
FAMILIES = ("opt", "t5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stage2")


def exact_config(folder: Path, family: str, **overrides: Any) -> PretrainConfig:
    language = {"family": family, **overrides.pop("language", {})}
    return tiny_config(
        folder, folder, 2, qformer={"dropout": 0.0}, optim={"batch_size": N}, language=language, **overrides
    )


def exact_stage(config: PretrainConfig, world: World, double: bool = True) -> Stage2:
    """Return a float64 model whose weights are large enough for everything to matter; the same on every rank."""
    stage = begun_stage(config, world)
    torch.manual_seed(5)
    with torch.no_grad():
        for _, parameter in stage.trainable_named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if double:
        stage.visual_encoder.dtype = torch.float64
        stage.Qformer.dtype = torch.float64
        stage.double()
    return stage


def batch(rows: slice = slice(0, N)) -> SimpleNamespace:
    pixels = torch.randint(0, 256, (N, 3, IMAGE_PX, IMAGE_PX), generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(
        pixels_BCHW=pixels.to(torch.uint8)[rows],
        captions=CAPTIONS[rows],
        uids=[f"{index:032x}" for index in range(N)][rows],
        position=N,
    )


def gradients(stage: Stage2) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in stage.trainable_named_parameters()}


@pytest.mark.parametrize("embeddings_width", [0, 12])
def test_opt_loss_is_transformers_own(folder: Path, tmp_path: Path, embeddings_width: int) -> None:
    saved = save_opt(tmp_path / "opt", embeddings_width=embeddings_width)
    language = {"prompt": "a photo of ", "model": str(saved)}
    stage = exact_stage(exact_config(folder, "opt", language=language), World())
    actual = stage.training_step(batch(), N)["loss"]
    model = OPTForCausalLM.from_pretrained(saved).double().eval()
    total, words = 0.0, 0
    with torch.no_grad():
        prompts = stage.soft_prompt(batch().pixels_BCHW)
        for prompt, caption in zip(prompts, CAPTIONS, strict=True):
            # One at a time there is no padding. The prompt ("</s> a photo of", four tokens) is read, not predicted.
            text = stage.language.tokenizer(f"a photo of {caption}\n", truncation=True, max_length=12)
            ids = torch.tensor([text.input_ids])
            labels = torch.cat((torch.full((1, NUM_QUERIES), -100), ids), dim=1)
            labels[:, NUM_QUERIES : NUM_QUERIES + 4] = -100
            read = torch.cat((prompt[None], model.get_input_embeddings()(ids)), dim=1)
            predicted = ids.shape[1] - 4
            total += model(inputs_embeds=read, labels=labels).loss.item() * predicted
            words += predicted
    # transformers computes it in float32.
    assert actual.item() == pytest.approx(total / words, abs=1e-6)


def test_an_opt_with_narrow_embeddings_is_planned_and_generates_but_is_not_exported(
    folder: Path, tmp_path: Path
) -> None:
    config = exact_config(
        folder, "opt", language={"model": str(save_opt(tmp_path / "opt", embeddings_width=12))}
    )
    assert meta_stage(config).flops_per_sample() > 0
    stage = begun_stage(config)
    assert stage.opt_proj.out_features == 12
    decoding = Decoding(beams=2, max_tokens=4, min_tokens=4)
    assert all(Stage2Generator(stage).caption(batch().pixels_BCHW, "a photo of", decoding))
    with pytest.raises(CapfiltError, match=r"embeddings of width 12 .* blocks of width 24"):
        export_model(stage, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_opt_predicts_every_token_of_a_caption(folder: Path) -> None:
    language = load_language(exact_config(folder, "opt").language)
    target = language.target(CAPTIONS[:2], ["0", "1"], 0)
    newline = language.tokenizer("\n").input_ids[-1]
    # "</s> a red circle \n": the leading </s> too; padded to a multiple of 8.
    first = target.labels_BT[0]
    assert (
        first[0] == 2
        and first[4] == newline
        and (first[5:] == -100).all()
        and target.labels_BT.shape == (2, 8)
    )
    assert target.num_tokens == 5 + 6


@pytest.mark.parametrize("prompt", ["a photo of ", "a photo of"])
def test_a_prompt_of_byte_level_bpe_hides_no_word_of_the_caption(tmp_path: Path, prompt: str) -> None:
    model = save_opt(tmp_path / "opt", bpe=True)
    config = exact_config(tmp_path, "opt", language={"model": str(model), "prompt": prompt})
    language = load_language(config.language)
    # The layout of OPT's tokenizer: the blank belongs to the word behind it, and a blank alone is a token of its own.
    tokens = language.tokenizer.tokenize("a photo of dog")
    assert tokens == ["a", "Ġphoto", "Ġof", "Ġdog"] and language.tokenizer.tokenize("a photo of ")[-1] == "Ġ"
    target = language.target(["dog", "red circle"], ["0", "1"], 0)
    read = [
        language.tokenizer.decode(ids[mask])
        for ids, mask in zip(target.inputs_BL, target.mask_BL, strict=True)
    ]
    assert read == ["</s>a photo of dog\n", "</s>a photo of red circle\n"]
    predicted = [language.tokenizer.decode(labels[labels != -100]) for labels in target.labels_BT]
    assert predicted == [" dog\n", " red circle\n"]


def test_generation_continues_a_prompt_as_it_was_trained(tmp_path: Path) -> None:
    model = save_opt(tmp_path / "opt", bpe=True)
    stage = begun_stage(exact_config(tmp_path, "opt", language={"model": str(model)}))
    read: list[Tensor] = []
    words = stage.language.model.get_input_embeddings()
    words.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    Stage2Generator(stage).caption(
        batch().pixels_BCHW, "a photo of ", Decoding(beams=1, max_tokens=1, min_tokens=0)
    )
    # The first words that are read are the prompt's, which ends before the blank.
    assert stage.language.tokenizer.decode(read[0][0]) == "</s>a photo of"


@pytest.mark.parametrize("prompt", ["a photo of ", "a photo of"])
def test_a_prompt_of_t5_is_parted_from_the_caption(folder: Path, prompt: str) -> None:
    language = load_language(exact_config(folder, "t5", language={"prompt": prompt}).language)
    target = language.target(["red circle"], ["0"], 0)
    assert target.inputs_BL[0][target.mask_BL[0]].tolist() == language.tokenizer("a photo of red").input_ids


def test_t5_loss_is_transformers_own(folder: Path) -> None:
    stage = exact_stage(exact_config(folder, "t5"), World())
    actual = stage.training_step(batch(), N)["loss"]
    model = T5ForConditionalGeneration.from_pretrained(folder / "t5")
    # The exact GELU that LAVIS trains with.
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.act = torch.nn.GELU()
    model = model.double().eval()
    target = stage.language.target(CAPTIONS, batch().uids, stage_seed(stage))
    total, words = 0.0, 0
    with torch.no_grad():
        for index, prompt in enumerate(stage.soft_prompt(batch().pixels_BCHW)):
            ids = target.inputs_BL[index][target.mask_BL[index]][None]
            labels = target.labels_BT[index][target.labels_BT[index] != -100][None]
            read = torch.cat((prompt[None], model.get_input_embeddings()(ids)), dim=1)
            total += model(inputs_embeds=read, labels=labels).loss.item() * labels.shape[1]
            words += labels.shape[1]
    assert actual.item() == pytest.approx(total / words, abs=1e-9)


def stage_seed(stage: Stage2) -> int:
    """Return the seed that the step hands to ``target``."""
    seeds: list[int] = []
    target = stage.language.target
    stage.language.target = lambda captions, uids, seed: seeds.append(seed) or target(captions, uids, seed)
    stage.training_step(batch(), N)
    stage.language.target = target
    return seeds[0]


def test_t5_reads_a_beginning_and_writes_the_rest(folder: Path) -> None:
    language = load_language(exact_config(folder, "t5").language)
    seen: dict[str, set[int]] = {}
    for seed in range(300):
        for caption in CAPTIONS:
            first, rest = split_caption(caption, "0", seed)
            assert f"{first} {rest}".strip() == caption
            seen.setdefault(caption, set()).add(len(first.split()))
    for caption, lengths in seen.items():
        assert lengths == set(range(1, len(caption.split()) // 2 + 1)) or lengths == {0}
    target = language.target(["a red circle on grass"], ["0"], 3)
    first, rest = split_caption("a red circle on grass", "0", 3)
    assert target.inputs_BL[0][target.mask_BL[0]].tolist() == language.tokenizer(first).input_ids
    assert target.labels_BT[0][target.labels_BT[0] != -100].tolist() == language.tokenizer(rest).input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_mean_loss(folder: Path, family: str) -> None:
    # Against finite differences: the step's own gradient along a random direction.
    stage = exact_stage(exact_config(folder, family), World())
    stage.training_step(batch(), N)
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in stage.trainable_named_parameters()
    }
    slope = sum((gradients(stage)[name] * step).sum() for name, step in direction.items())
    assert all(gradient.abs().max() > 0 for gradient in gradients(stage).values())
    losses = []
    for sign in (1, -1):
        moved = exact_stage(exact_config(folder, family), World())
        with torch.no_grad():
            for name, parameter in moved.trainable_named_parameters():
                parameter.add_(direction[name], alpha=sign * 1e-5)
        losses.append(moved.training_step(batch(), N)["loss"])
    # T5's norms are in float32 whatever the weights are.
    assert ((losses[0] - losses[1]) / 2e-5).item() == pytest.approx(
        slope.item(), rel=1e-2 if family == "t5" else 1e-4
    )


def whole_batch(folder: Path, family: str, micro_batch_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    stage = exact_stage(exact_config(folder, family), World())
    return stage.training_step(batch(), micro_batch_size)["loss"], gradients(stage)


def half_batches(world: World, folder: Path) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Do both families, the second with its language model spread over the ranks."""
    results = []
    for family, shard in (("opt", False), ("t5", True), ("opt", True)):
        config = exact_config(folder, family, performance={"shard_language": shard})
        stage = exact_stage(config, world, double=not shard)
        size = N // world.size
        losses = stage.training_step(batch(slice(world.rank * size, (world.rank + 1) * size)), 2)
        summed = gradients(stage)
        world.all_reduce_sum_(summed.values())
        if shard:
            held = sum(p.to_local().numel() for p in stage.language.parameters() if hasattr(p, "to_local"))
            spread = sum(p.numel() for p in stage.language.parameters() if hasattr(p, "to_local"))
            assert spread and held <= 0.6 * spread
        results.append((losses["loss"], summed))
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_is_exact(folder: Path, family: str) -> None:
    loss, expected = whole_batch(folder, family, N)
    for size in (2, 4):
        actual_loss, actual = whole_batch(folder, family, size)
        assert actual_loss.item() == pytest.approx(loss.item(), abs=1e-10)
        assert all((actual[name] - expected[name]).abs().max() < 1e-9 for name in expected)


def test_two_ranks_are_exact_also_with_a_spread_language_model(folder: Path) -> None:
    expected = {family: whole_batch(folder, family, N) for family in FAMILIES}
    for results in on_ranks(2, half_batches, folder):
        for (loss, actual), family, tolerance in zip(
            results, ("opt", "t5", "opt"), (1e-9, 1e-4, 1e-4), strict=True
        ):
            wanted_loss, wanted = expected[family]
            assert loss.item() == pytest.approx(wanted_loss.item(), rel=tolerance)
            for name, tensor in wanted.items():
                assert (actual[name] - tensor).abs().max() < tolerance * max(1, tensor.abs().max()), name


def test_a_language_model_in_half_precision_gives_nearly_the_same_gradients(folder: Path) -> None:
    actual = []
    for precision in ("fp32", "fp16", "bf16"):
        config = exact_config(folder, "opt", language={"precision": precision})
        stage = exact_stage(config, World(), double=False)
        stage.training_step(batch(), 3)
        actual.append(torch.cat([gradient.flatten() for gradient in gradients(stage).values()]))
    whole, half, brain = actual
    assert whole.dtype == half.dtype == torch.float32
    assert not torch.equal(half, whole) and torch.cosine_similarity(half, whole, dim=0) > 0.995
    assert not torch.equal(brain, whole) and torch.cosine_similarity(brain, whole, dim=0) > 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_compiled_after_the_first_step(folder: Path, family: str) -> None:
    config = exact_config(folder, family, language={"max_text_tokens": 32})
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled, plain = (exact_stage(config, World()) for _ in range(2))
    compile_stage(compiled, backend=graphs)
    counts = []
    # Captions of 2 to 28 words, the shortest first: T5's two texts and OPT's one would get longer with each step.
    for step, words in enumerate((2, 10, 18, 28)):
        given = batch()
        given.captions = [" ".join(f"a red circle on grass {caption}".split() * 6) for caption in CAPTIONS]
        given.captions = [" ".join(caption.split()[:words]) for caption in given.captions]
        given.position = (step + 1) * N
        loss, expected = (stage.training_step(given, 3)["loss"].item() for stage in (compiled, plain))
        assert loss == pytest.approx(expected, rel=1e-7)  # T5's norms are in float32 whatever the weights are
        counts.append(graphs.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1
    wanted, actual = gradients(plain), gradients(compiled)
    for name, tensor in wanted.items():
        assert (actual[name] - tensor).abs().max() <= 1e-6 * max(1, tensor.abs().max()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_qformer_is_trained(folder: Path, family: str) -> None:
    stage = begun_stage(exact_config(folder, family))
    stage.train()
    assert not any(module.training for module in stage.language.modules())
    before = {name: value.clone() for name, value in stage.language.state_dict().items()}
    stage.training_step(batch(), 3)
    assert all(torch.equal(before[name], value) for name, value in stage.language.state_dict().items())
    assert all(parameter.grad is None for parameter in stage.language.parameters())
    names = {name.split(".")[0] for name, _ in stage.trainable_named_parameters()}
    assert names == {"ln_vision", "Qformer", "query_tokens", f"{family}_proj"}


@pytest.mark.parametrize(
    ("model", "pretrained", "language", "family", "parameters"),
    [
        ("EVA01-g-14", "laion400m_s11b_b41k", "facebook/opt-2.7b", "opt", 107_133_696),
        ("ViT-L-14", "openai", "facebook/opt-2.7b", "opt", 103_593_984),
        ("EVA01-g-14", "laion400m_s11b_b41k", "google/flan-t5-xl", "t5", 106_739_968),
        ("ViT-L-14", "openai", "google/flan-t5-xl", "t5", 103_200_256),
        ("EVA01-g-14", "laion400m_s11b_b41k", "facebook/opt-6.7b", "opt", 108_314_880),
        ("EVA01-g-14", "laion400m_s11b_b41k", "google/flan-t5-xxl", "t5", 108_314_880),
    ],
)
def test_full_size_counts(model: str, pretrained: str, language: str, family: str, parameters: int) -> None:
    stage = meta_stage(full_size(model, pretrained, language, family))
    assert sum(parameter.numel() for _, parameter in stage.trainable_named_parameters()) == parameters


def test_counted_operations() -> None:
    # ViT-g once, the Q-Former's queries three times with the image's keys and values, OPT-2.7B's 52 tokens twice.
    stage = meta_stage(full_size("EVA01-g-14", "laion400m_s11b_b41k", "facebook/opt-2.7b", "opt"))
    assert stage.flops_per_sample() / 1e9 == pytest.approx(1094, abs=1)


def full_size(model: str, pretrained: str, language: str, family: str) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run": {"name": "full", "stage": 2},
            "data": {"corpus": [{"path": "nowhere"}]},
            "vision": {"model": model, "pretrained": pretrained},
            "language": {"model": language, "family": family},
            "optim": {"batch_size": 1520},
        }
    )


def test_wrong_language_models_are_named(tmp_path: Path, folder: Path) -> None:
    for message, language in (
        (
            "is of the family 't5'; language.family = 'opt'",
            {"model": str(save_t5(tmp_path / "t5")), "family": "opt"},
        ),
        ("language.model = .*no such folder", {"model": str(tmp_path / "nothing"), "family": "opt"}),
        ("config.json is missing", {"model": str(tmp_path), "family": "t5"}),
    ):
        with pytest.raises(CapfiltError, match=message):
            begun_stage(tiny_config(folder, folder, 2, language=language))
    with pytest.raises(CapfiltError, match="of the family 't5'"):
        meta_stage(full_size("ViT-L-14", "openai", "google/flan-t5-xl", "opt"))


def test_older_files_are_refused_with_the_command_that_converts_them(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_opt(tmp_path / "opt")
    tensors = load_file(old / "model.safetensors")
    torch.save(tensors, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()

    def build(model: str) -> Stage2:
        return begun_stage(tiny_config(folder, folder, 2, language={"model": model}))

    with pytest.raises(CapfiltError, match="only safetensors are read") as refused:
        build(str(old))
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*)"', str(refused.value))[1])
    actual = build(
        re.search(r"set language.model = '(.*?)'", str(refused.value))[1]
    ).language.model.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in tensors.items())
