"""The decoding engine: transformers' logits and tokens, with the work that is shared done once."""

import functools
import itertools

import pytest
import torch
from tiny_models import END_ID, START_ID, save_captioner
from torch import Tensor
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import pipeline.models.blip.generation
import pipeline.models.blip.text_layers
from jobs.bench.fixtures.compute import counted_flops
from pipeline.models.blip.decoder import BlipDecoder
from pipeline.models.blip.generation import NO_TOKEN, GridSampler, RowSampler
from pipeline.models.blip.nucleus import largest_by_blocks
from pipeline.models.blip.text_layers import PackedLinear
from pipeline.models.blip.vision import ImageKeysValues, VisionTower
from pipeline.rng import caption_seeds, uniforms
from schemas.config import CaptionConfig

PROMPTS = ([START_ID], [START_ID, 7], [START_ID, 9, 40, 11, 6])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlipForConditionalGeneration:
    folder = save_captioner(tmp_path_factory.mktemp("captioner"))
    return BlipForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def decoder(model: BlipForConditionalGeneration) -> BlipDecoder:
    return BlipDecoder(model.text_decoder).eval()


@functools.cache
def pixels(images: int) -> Tensor:
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(images))


@torch.inference_mode()
def features(model: BlipForConditionalGeneration, images: int) -> Tensor:
    return model.vision_model(pixels(images)).last_hidden_state


def numbers(images: int, samples: int, steps: int) -> Tensor:
    return torch.from_numpy(uniforms(caption_seeds(3, [str(i) for i in range(images)], samples), steps))


class FedByUniforms(LogitsProcessor):
    """transformers' own processors, then the inverse of the distribution in vocabulary order."""

    def __init__(self, uniforms_RT: Tensor, prompt_length: int, config: CaptionConfig) -> None:
        self.uniforms_RT, self.prompt_length, self.config = uniforms_RT, prompt_length, config
        self.shape = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
                TemperatureLogitsWarper(config.temperature),
                *([TopKLogitsWarper(config.top_k)] if config.top_k else []),
                *([TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []),
            ]
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        scores = scores.float().clone()
        if input_ids.shape[1] < self.config.min_length:
            # Before the others, as transformers puts it; the penalty multiplies what is there.
            scores[:, END_ID] = -torch.inf
        cumulative_RV = self.shape(input_ids, scores).double().softmax(-1).cumsum(-1)
        target_R1 = self.uniforms_RT[:, step : step + 1] * cumulative_RV[:, -1:]
        chosen_R1 = (cumulative_RV <= target_R1).sum(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_R1, 0.0)


@torch.inference_mode()
def generated(
    model: BlipForConditionalGeneration,
    image_BPE: Tensor,
    prompt: list[int],
    uniforms_BNT: Tensor,
    config: CaptionConfig,
) -> Tensor:
    """Return transformers' tokens for the same uniform numbers, laid out as the engine's."""
    images, samples, steps = uniforms_BNT.shape
    image_RPE = image_BPE.repeat_interleave(samples, dim=0)
    prompt_RL = torch.tensor([prompt]).expand(len(image_RPE), -1)
    tokens_RL = model.text_decoder.generate(
        input_ids=prompt_RL,
        attention_mask=torch.ones_like(prompt_RL),
        encoder_hidden_states=image_RPE,
        encoder_attention_mask=torch.ones(image_RPE.shape[:2], dtype=torch.long),
        generation_config=GenerationConfig(
            do_sample=False, max_length=config.max_length, eos_token_id=END_ID, pad_token_id=0
        ),
        logits_processor=LogitsProcessorList(
            [FedByUniforms(uniforms_BNT.flatten(0, 1), len(prompt), config)]
        ),
    )[:, len(prompt) :]
    ended_RT = (tokens_RL == END_ID).int().cumsum(1) - (tokens_RL == END_ID).int() > 0
    said_RT = torch.full((images * samples, steps), NO_TOKEN)
    said_RT[:, : tokens_RL.shape[1]] = tokens_RL.masked_fill(ended_RT, NO_TOKEN)
    return said_RT.view(uniforms_BNT.shape)


OPTIONS = [
    {},
    {"num_captions": 1},
    {"num_captions": 40, "repetition_penalty": 1.0},
    {"top_k": 0, "top_p": 0.8},
    {"top_k": 7, "top_p": 1.0, "temperature": 0.6},
    {"temperature": 1.7, "repetition_penalty": 1.5},
    {"repetition_penalty": 0.8, "min_length": 0},
    {"min_length": 12, "max_length": 30},
    {"top_k": 1, "min_length": 0},
    {"max_length": 6, "min_length": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("images", [1, 2, 7])
def test_samples_what_transformers_samples(
    model: BlipForConditionalGeneration, decoder: BlipDecoder, options: dict, prompt: list[int], images: int
) -> None:
    config = CaptionConfig(**options)
    image_BPE = features(model, images)
    uniforms_BNT = numbers(images, config.num_captions, config.max_length - len(prompt))
    expected = generated(model, image_BPE, prompt, uniforms_BNT, config)
    rows = RowSampler(decoder, prompt, config)(image_BPE, uniforms_BNT)
    assert torch.equal(rows, expected)
    grid = GridSampler(decoder, prompt, config, images)
    assert torch.equal(grid(image_BPE, uniforms_BNT), expected)
    # A second, smaller batch through the same buffers.
    assert torch.equal(grid(image_BPE[:1], uniforms_BNT[:1]), expected[:1])
    if config.top_k != 1:
        assert len(set(map(tuple, expected.flatten(0, 1).tolist()))) > expected.shape[1] / 2


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Collect the tokens and logits of every row that is computed."""
    rows: list[tuple[Tensor, Tensor]] = []
    nucleus = pipeline.models.blip.generation.nucleus

    def recording(logits_RV: Tensor, tokens_RL: Tensor, *rest: object) -> object:
        rows.append((tokens_RL.clone(), logits_RV.clone()))
        return nucleus(logits_RV, tokens_RL, *rest)

    monkeypatch.setattr(pipeline.models.blip.generation, "nucleus", recording)
    return rows


@torch.inference_mode()
def teacher_forced(model: BlipForConditionalGeneration, tokens_RL: Tensor, image_1PE: Tensor) -> Tensor:
    image_RPE = image_1PE.expand(len(tokens_RL), -1, -1)
    return model.text_decoder(tokens_RL, encoder_hidden_states=image_RPE).logits[:, -1]


@pytest.mark.parametrize("sampler", [RowSampler, functools.partial(GridSampler, num_images=1)])
def test_logits_are_transformers(
    model: BlipForConditionalGeneration, decoder: BlipDecoder, recorded: list, sampler: type
) -> None:
    config, prompt = CaptionConfig(), PROMPTS[1]
    image_BPE = VisionTower(model.vision_model)(pixels(1))
    assert torch.allclose(image_BPE, features(model, 1), atol=1e-5)
    assert image_BPE.std() > 0.1, "a dead vision tower proves nothing"
    sampler(decoder, prompt, config)(image_BPE, numbers(1, 10, 18))
    assert len(recorded) > 10
    for tokens_RL, logits_RV in recorded:
        expected_RV = teacher_forced(model, tokens_RL, image_BPE)
        assert (logits_RV - expected_RV).abs().max() < 1e-4
        assert expected_RV.std() > 0.5
    other_1PE = features(model, 2)[1:]
    assert (teacher_forced(model, recorded[3][0], other_1PE) - recorded[3][1]).abs().max() > 1e-2


def test_a_row_is_computed_for_each_distinct_unfinished_caption(
    model: BlipForConditionalGeneration, decoder: BlipDecoder, recorded: list
) -> None:
    config = CaptionConfig(num_captions=40, top_k=3, temperature=0.5, min_length=0)
    said_BNT = RowSampler(decoder, [START_ID], config)(features(model, 2), numbers(2, 40, 19))
    expected = [2]
    for step in range(1, 19):
        prefixes = {
            (image, tuple(tokens[:step]))
            for image, row in enumerate(said_BNT.tolist())
            for tokens in row
            if NO_TOKEN not in tokens[:step] and END_ID not in tokens[:step]
        }
        expected.append(len(prefixes))
    rows = [len(tokens_RL) for tokens_RL, _ in recorded]
    assert rows == list(itertools.takewhile(bool, expected))
    unfinished = int((said_BNT[..., 1:] != NO_TOKEN).sum())
    assert sum(rows[1:]) < 0.8 * unfinished, "captions of few likely tokens share their beginnings"


def test_an_image_is_projected_once_a_layer(
    model: BlipForConditionalGeneration, decoder: BlipDecoder
) -> None:
    projected: list[tuple[int, ...]] = []

    def record(_: ImageKeysValues, inputs: tuple[Tensor, ...], keys_values: Tensor) -> None:
        images, positions = inputs[0].shape[:2]
        projected.append((images, positions, keys_values.numel() // (images * positions)))

    hook = decoder.image_keys_values.register_forward_hook(record)
    image_BPE, config = features(model, 3), CaptionConfig()
    layers, width = len(decoder.layers), decoder.width
    RowSampler(decoder, [START_ID], config)(image_BPE, numbers(3, 10, 19))
    assert projected == [(3, image_BPE.shape[1], layers * 2 * width)]
    projected.clear()
    GridSampler(decoder, [START_ID], config, 3)(image_BPE, numbers(3, 10, 19))
    assert projected == [(3, image_BPE.shape[1], 2 * width)] * layers
    hook.remove()


def test_the_image_text_matching_model_reads_the_same_tower_and_keys(
    model: BlipForConditionalGeneration,
) -> None:
    """What a filter with BLIP's matching head needs: no part of it belongs to the captioner."""
    torch.manual_seed(0)
    matching = BlipForImageTextRetrieval(model.config).eval()
    with torch.inference_mode():
        image_BPE = VisionTower(matching.vision_model)(pixels(2))
        reference_BPE = matching.vision_model(pixels(2)).last_hidden_state
        assert torch.allclose(image_BPE, reference_BPE, atol=1e-5)
        layers = matching.text_encoder.encoder.layer
        keys_values = ImageKeysValues([layer.crossattention.self for layer in layers])(image_BPE)
        for layer, both in zip(layers, keys_values, strict=True):
            cross = layer.crossattention.self
            for projection, heads_BHPd in zip((cross.key, cross.value), both, strict=True):
                joined_BPE = heads_BHPd.transpose(1, 2).flatten(2)
                assert torch.allclose(joined_BPE, projection(image_BPE), atol=1e-5)


def test_the_operations_are_those_of_the_rows(
    model: BlipForConditionalGeneration, decoder: BlipDecoder, recorded: list
) -> None:
    image_BPE, config, uniforms_BNT = features(model, 4), CaptionConfig(), numbers(4, 10, 19)
    flops = counted_flops(lambda: RowSampler(decoder, [START_ID], config)(image_BPE, uniforms_BNT))
    text, positions = model.config.text_config, image_BPE.shape[1]
    width, inner = text.hidden_size, text.intermediate_size
    layers, rows = text.num_hidden_layers, sum(len(tokens_RL) for tokens_RL, _ in recorded)
    image = layers * positions * model.config.vision_config.hidden_size * 2 * width
    # Self-attention's four maps, cross-attention's two and its attention, the feed-forward, the output.
    row = layers * (6 * width**2 + 2 * width * inner + 2 * positions * width) + width**2
    row += width * text.vocab_size
    attended = sum(tokens_RL.numel() for tokens_RL, _ in recorded) * layers * 2 * width
    assert flops == 2 * (4 * image + rows * row + attended)
    reference_errors = counted_flops(lambda: generated(model, image_BPE, [START_ID], uniforms_BNT, config))
    assert reference_errors > 1.3 * flops, "even where an image has 17 positions"


def test_bfloat16_is_as_exact_as_transformers(model: BlipForConditionalGeneration, recorded: list) -> None:
    config, image_BPE = CaptionConfig(), features(model, 1)
    RowSampler(BlipDecoder(model.text_decoder).eval(), [START_ID], config)(image_BPE, numbers(1, 10, 19))
    rows = [row for tokens_RL, _ in recorded for row in tokens_RL]
    exact = [teacher_forced(model, row[None], image_BPE)[0] for row in rows]
    lowered = BlipForConditionalGeneration(model.config).eval()
    lowered.load_state_dict(model.state_dict())
    lowered = lowered.bfloat16()
    decoder = BlipDecoder(lowered.text_decoder).eval()
    image_kv = decoder.image_keys_values(image_BPE.bfloat16())
    errors, reference_errors = [], []
    with torch.inference_mode():
        for row, expected_V in zip(rows, exact, strict=True):
            actual_V = decoder.prefix(row.tolist(), image_kv)[0][0]
            assert actual_V.dtype == torch.float32
            reference_V = teacher_forced(lowered, row[None], image_BPE.bfloat16())[0].float()
            errors.append((actual_V - expected_V).square().mean())
            reference_errors.append((reference_V - expected_V).square().mean())
    assert 0 < torch.stack(errors).mean() <= torch.stack(reference_errors).mean()


def test_one_compilation_serves_all_layers(
    model: BlipForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile_(f, backend=backend, **k))
    torch._dynamo.reset()
    decoder = BlipDecoder(model.text_decoder, compiled=True).eval()
    tower = VisionTower(model.vision_model, compiled_batch=3)
    config, image_BPE = CaptionConfig(), features(model, 3)
    assert torch.allclose(tower(pixels(3)), image_BPE, atol=1e-5)
    assert torch.allclose(tower(pixels(3)[:2]), image_BPE[:2], atol=1e-5)
    assert len(graphs) == 1
    uniforms_BNT = numbers(3, 10, 19)
    sampled = GridSampler(decoder, [START_ID], config, 3)(image_BPE, uniforms_BNT)
    # Two pieces of a layer, for the prompt's rows and for those of all samples.
    assert len(graphs) == 1 + 4
    assert torch.equal(sampled, generated(model, image_BPE, [START_ID], uniforms_BNT, config))


def test_the_largest_are_found_among_the_blocks_with_the_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (30_524, 30_522, 128 * 101):
        logits_RV = torch.randn(6, vocabulary, generator=generator)
        logits_RV[0, :200] += 9  # all in two blocks
        logits_RV[1, -60:] += 9  # in what is left over after the last whole block
        logits_RV[2, 5] = -torch.inf
        values_RK, ids_RK = largest_by_blocks(logits_RV, 50)
        expected = logits_RV.topk(50)
        assert torch.equal(values_RK, expected.values)
        assert torch.equal(ids_RK, expected.indices)


@pytest.mark.parametrize("rows", [1, 3, 16, 33, 200])
def test_packed_layers_compute_the_same(rows: int) -> None:
    layer = torch.nn.Linear(48, 80)
    x_RI = torch.randn(rows, 48)
    with torch.inference_mode():
        assert torch.allclose(PackedLinear(layer.weight, layer.bias)(x_RI), layer(x_RI), atol=1e-5)


def test_samplers_keep_nothing_of_the_last_batch(
    model: BlipForConditionalGeneration, decoder: BlipDecoder
) -> None:
    config = CaptionConfig()
    grid_sampler = GridSampler(decoder, [START_ID], config, 4)
    uniforms_BNT = numbers(4, 10, 19)
    image_BPE = features(model, 7)
    first = grid_sampler(image_BPE[:4], uniforms_BNT)
    second = grid_sampler(image_BPE[3:], uniforms_BNT)
    assert torch.equal(grid_sampler(image_BPE[:4], uniforms_BNT), first)
    assert torch.equal(GridSampler(decoder, [START_ID], config, 4)(image_BPE[3:], uniforms_BNT), second)
    assert not torch.equal(first, second)
