"""The shortened towers and the quick tokenizer: open_clip's own numbers, whatever the model, length or batch."""

from collections.abc import Iterator

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from tiny_models import tokenizer as bert_tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.clip.tokenizer import ClipTokenizer
from pipeline.models.clip.towers import ImageTower, TextTower, image_encoder, text_encoder

LENGTH = 16
VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": LENGTH, "vocab_size": 1000, "width": 32, "heads": 2, "layers": 3}
END = 999


def clip(model_class: type = open_clip.CLIP, *, quick_gelu: bool = True, **changes: dict) -> nn.Module:
    """Return a model whose every part matters: biases, norms and scales are not what they start as."""
    torch.manual_seed(0)
    model = model_class(
        embed_dim=24,
        vision_cfg=VISION | changes.get("vision", {}),
        text_cfg=TEXT | changes.get("text", {}),
        quick_gelu=quick_gelu,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    return model.eval()


def tokens(lengths: list[int], end: int = END) -> Tensor:
    """Return random texts of these lengths, start and end included, with rubbish behind the end."""
    generator = torch.Generator().manual_seed(len(lengths))
    tokens_TL = torch.randint(1, end, (len(lengths), LENGTH), generator=generator)
    tokens_TL[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = end
    return tokens_TL


def similarities(model: nn.Module, image_BE: Tensor, text_TE: Tensor) -> Tensor:
    return normalize(image_BE, dim=-1) @ normalize(text_TE, dim=-1).T


PLAIN = {
    "CLIP": {},
    "GELU": {"quick_gelu": False},
    "two modules": {"model_class": open_clip.CustomTextCLIP},
    "end by its id": {"text": {"pool_type": "eos", "eos_id": 7}},
    "one block": {"text": {"layers": 1}, "vision": {"layers": 1}},
    "layer scale": {"text": {"ls_init_value": 0.5}, "vision": {"ls_init_value": 0.5}},
    "norm after the pool": {"vision": {"final_ln_after_pool": True, "no_ln_pre": True}},
    "projection with a bias": {"model_class": open_clip.CustomTextCLIP, "text": {"proj_bias": True}},
    "no text projection": {"text": {"proj_type": "none", "width": 24}},
}


@pytest.mark.parametrize("changes", PLAIN.values(), ids=PLAIN)
def test_shortened_towers_give_open_clips_similarities(changes: dict) -> None:
    model = clip(**changes)
    encode_text, encode_image = text_encoder(model), image_encoder(model)
    assert isinstance(encode_text, TextTower) and isinstance(encode_image, ImageTower)
    # Every length, from the start token alone to a text that was cut; several of one, in no order.
    tokens_TL = tokens([5, 16, 1, 9, 5, 2, 3, 16, 4, 6, 7, 8, 10, 11, 12, 13, 14, 15, 5])
    tokens_TL[:, 0] = 998
    tokens_TL[2] = 5  # no end at all: open_clip reads the first token
    pixels_BCHW = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        expected = similarities(model, model.encode_image(pixels_BCHW), model.encode_text(tokens_TL))
        actual = similarities(model, encode_image(pixels_BCHW), encode_text(tokens_TL))
    assert torch.allclose(actual, expected, rtol=0, atol=1e-6)
    assert torch.equal(actual.topk(2).indices, expected.topk(2).indices)
    assert expected.std() > 0.01


OTHER_TEXT = {
    "bidirectional": {"no_causal_mask": True},
    "bidirectional, last token": {"no_causal_mask": True, "pool_type": "last"},
    "last token": {"pool_type": "last"},
    "own class token": {"embed_cls": True},
    "further norms": {"scale_attn": True},
    "norms of query and key": {"qk_norm": True},
}


@pytest.mark.parametrize("text", OTHER_TEXT.values(), ids=OTHER_TEXT)
def test_other_text_towers_are_left_to_open_clip(text: dict) -> None:
    model = clip(open_clip.CustomTextCLIP, text=text)
    encode_text = text_encoder(model)
    tokens_TL = tokens([5, 16, 9])
    assert not isinstance(encode_text, TextTower)
    with torch.inference_mode():
        assert torch.allclose(encode_text(tokens_TL), model.encode_text(tokens_TL), atol=1e-5)


OTHER_VISION = {
    "mean of the patches": {"pool_type": "avg"},
    "attentional pooler": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "further norms": {"scale_fc": True},
    "ResNet": {"layers": (1, 1, 1, 1), "head_width": 64},
}


@pytest.mark.parametrize("vision", OTHER_VISION.values(), ids=OTHER_VISION)
def test_other_image_towers_are_left_to_open_clip(vision: dict) -> None:
    model = clip(vision=vision)
    encode_image = image_encoder(model)
    pixels_BCHW = torch.randn(2, 3, 32, 32)
    assert not isinstance(encode_image, ImageTower)
    with torch.inference_mode():
        assert torch.equal(encode_image(pixels_BCHW), model.encode_image(pixels_BCHW))


def test_a_hugging_face_text_tower_is_left_to_open_clip(tmp_path) -> None:
    from transformers import BertConfig

    tokenizer = bert_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertConfig(vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False}
    model = open_clip.CustomTextCLIP(embed_dim=24, vision_cfg=VISION, text_cfg=text).eval()
    tokens_TL = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 7, 8, 6, 3]])
    with torch.inference_mode():
        assert torch.equal(text_encoder(model)(tokens_TL), model.encode_text(tokens_TL))
    assert isinstance(image_encoder(model), ImageTower)


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    model = clip()
    encode_text, encode_image = text_encoder(model), image_encoder(model)
    encode_text._tokens_at_once = 40  # several chunks, some within one length
    tokens_TL = tokens([5, 16, 4, 9, 5, 16, 5, 3, 12, 12, 12, 12, 16])
    pixels_BCHW = torch.randn(6, 3, 32, 32)
    with torch.inference_mode():
        text_TE, image_BE = encode_text(tokens_TL), encode_image(pixels_BCHW)
        for row, text_E in zip(tokens_TL, text_TE, strict=True):
            assert torch.allclose(encode_text(row[None])[0], text_E, atol=1e-5)
        for image, image_E in zip(pixels_BCHW, image_BE, strict=True):
            assert torch.allclose(encode_image(image[None])[0], image_E, atol=1e-5)


@pytest.mark.parametrize("step", [3, 8])
def test_lengths_rounded_up_for_a_gpu_change_nothing(step: int) -> None:
    model = clip()
    encode_text = text_encoder(model)
    tokens_TL = tokens([5, 16, 2, 9, 5, 16, 8, 7])
    with torch.inference_mode():
        exact_TE = encode_text(tokens_TL)
        encode_text._length_step = step
        assert torch.allclose(encode_text(tokens_TL), exact_TE, atol=1e-5)


def test_half_precision_is_as_exact_as_open_clips() -> None:
    model = clip(text={"layers": 6}, vision={"layers": 6})
    cast = open_clip.CLIP(
        embed_dim=24,
        vision_cfg=VISION | {"layers": 6},
        text_cfg=TEXT | {"layers": 6},
        quick_gelu=True,
        cast_dtype=torch.bfloat16,
    ).eval()
    cast.load_state_dict(model.state_dict())
    open_clip.convert_weights_to_lp(cast, torch.bfloat16)
    tokens_TL, pixels_BCHW = tokens([5, 16, 3, 9, 5, 12] * 4), torch.randn(12, 3, 32, 32)
    half_BCHW = pixels_BCHW.bfloat16()
    with torch.inference_mode():
        exact = similarities(model, model.encode_image(pixels_BCHW), model.encode_text(tokens_TL))
        reference = similarities(
            cast, cast.encode_image(half_BCHW).float(), cast.encode_text(tokens_TL).float()
        )
        text_TE, image_BE = text_encoder(cast)(tokens_TL), image_encoder(cast)(half_BCHW)
    assert text_TE.dtype == image_BE.dtype == torch.bfloat16
    computed = similarities(cast, image_BE.float(), text_TE.float())
    error, reference_error = (score.sub(exact).square().mean().sqrt() for score in (computed, reference))
    assert 0 < error < 1.2 * reference_error < 0.05


def test_no_more_is_computed_than_what_is_read() -> None:
    model = clip(text={"width": 64, "layers": 4}, vision={"width": 64, "layers": 4})
    lengths = [3, 5, 5, 9]
    tokens_TL, pixels_BCHW = tokens(lengths), torch.randn(2, 3, 32, 32)

    def flops(encode, inputs: Tensor) -> int:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            encode(inputs)
        return counter.get_total_flops()

    def block(num_tokens: int, attention: int, rows: int, row_attention: int) -> int:
        """Return what three blocks and the last cost: query, key, value, output 4 D², MLP 8 D², attention."""
        whole = 2 * num_tokens * 12 * 64 * 64 + 4 * 64 * attention
        last = 2 * (num_tokens * 2 + rows * 10) * 64 * 64 + 4 * 64 * row_attention
        return 3 * whole + last

    squares = sum(length**2 for length in lengths)
    projection = 2 * 64 * 24
    text = block(sum(lengths), squares, 4, sum(lengths)) + 4 * projection
    assert flops(text_encoder(model), tokens_TL) == text
    patches = 2 * 2 * 16 * 3 * 64 * 64
    image = block(2 * 17, 2 * 17**2, 2, 2 * 17) + 2 * projection + patches
    assert flops(image_encoder(model), pixels_BCHW) == image


def test_towers_share_the_models_weights() -> None:
    model = clip()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for tower in (text_encoder(model), image_encoder(model)):
        assert {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()} <= own


# -- compiled, as on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Have torch.compile run what it captures as it is, and say what it captured."""
    captured: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        captured.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, backend=keep, **kwargs))
    torch._dynamo.reset()
    yield captured
    torch._dynamo.reset()


def test_one_graph_serves_all_blocks_and_all_batches(graphs: list[torch.fx.GraphModule]) -> None:
    model = clip(text={"layers": 12}, vision={"layers": 12})
    encode_text = text_encoder(model, compiled=True)
    encode_image = image_encoder(model, compiled_batch=4)
    with torch.inference_mode():
        for lengths in ([5, 16, 3, 9, 5], [2, 2], [16] * 9, [7]):
            tokens_TL = tokens(lengths)
            assert torch.allclose(encode_text(tokens_TL), model.encode_text(tokens_TL), atol=1e-5)
        assert len(graphs) == 2
        for size in (4, 1, 3, 9):
            pixels_BCHW = torch.randn(size, 3, 32, 32)
            assert torch.allclose(encode_image(pixels_BCHW), model.encode_image(pixels_BCHW), atol=1e-5)
        assert len(graphs) == 4


# -- tokens --------------------------------------------------------------------------------------------------


TOKENIZERS = {
    "CLIP": SimpleTokenizer(),
    "short context": SimpleTokenizer(context_length=6),
    "no punctuation": SimpleTokenizer(clean="canonicalize"),
    "case kept": SimpleTokenizer(clean="whitespace"),
    "cut otherwise": SimpleTokenizer(context_length=6, reduction_mask="simple"),
}
WORDS = ["a", "Dog's", "  ", "\t", "&amp;", "&lt;b", "<start_of_text>", "<end_of_text>", "isn't", "GRÖSSE", "don’t",
         "Ã©tÃ©", "12.5", "\x1b[1m", "ﬁsh", "日本", "🙂", "\u200b", "<b>", "--", "photograph"]  # fmt: skip


@pytest.mark.parametrize("name", ["CLIP", "short context", "no punctuation", "case kept"])
@settings(deadline=None)
@given(
    texts=st.lists(
        st.text()
        | st.text(st.characters(max_codepoint=127))
        | st.lists(st.sampled_from(WORDS)).map(" ".join),
        min_size=1,
        max_size=8,
    )
)
def test_tokens_are_open_clips(name: str, texts: list[str]) -> None:
    reference = TOKENIZERS[name]
    tokens_TL, truncated = ClipTokenizer(reference)(texts)
    assert torch.equal(tokens_TL, reference(texts))
    assert truncated == [len(reference.encode(text)) + 2 > reference.context_length for text in texts]


def test_texts_that_are_cut_otherwise_are_left_to_open_clip() -> None:
    texts = ["a dog", "one two three four five six seven"]
    tokens_TL, truncated = ClipTokenizer(TOKENIZERS["cut otherwise"])(texts)
    assert torch.equal(tokens_TL[0], TOKENIZERS["cut otherwise"](texts)[0])
    assert truncated == [False, True]


def test_words_of_a_crawl_do_not_fill_the_memory() -> None:
    reference = SimpleTokenizer()
    tokenize = ClipTokenizer(reference)
    kept = len(reference.cache)
    tokenize([f"word{number}x <end_of_text>" for number in range(500)])
    assert len(reference.cache) == kept
    assert tokenize(["<end_of_text>"])[0][0, 1] == reference.eot_token_id
