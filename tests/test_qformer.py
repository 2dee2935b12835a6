"""The Q-Former: equal to transformers' and to the definition; its passes see what they should."""

from pathlib import Path

import pytest
import torch
from blip2_reference import Reference, full
from tiny_training import VOCAB_SIZE, save_bert
from torch import Tensor
from transformers import BertForMaskedLM, Blip2QFormerConfig, Blip2QFormerModel

from schemas.pretrain import QFormerConfig
from training.convert.key_map import hf_name
from training.models.layers import LayerNorm, Linear
from training.models.qformer import QFormer, copy_bert, initial_queries

IMAGE_WIDTH, NUM_QUERIES, LENGTH, PATCHES = 20, 4, 7, 9
SHAPE = QFormerConfig(
    num_queries=NUM_QUERIES,
    layers=4,
    width=32,
    heads=4,
    ffn_width=48,
    vocab_size=VOCAB_SIZE,
    max_positions=16,
    dropout=0.0,
)


@pytest.fixture(scope="module")
def qformer() -> QFormer:
    torch.manual_seed(0)
    model = QFormer(SHAPE, IMAGE_WIDTH, dtype=torch.float64).double().eval()
    # At the initial 0.02 hardly anything depends on anything.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    ids_BL = torch.randint(5, VOCAB_SIZE, (3, LENGTH))
    mask_BL = torch.arange(LENGTH) < torch.tensor([7, 3, 5])[:, None]
    image_BPE = torch.randn(3, PATCHES, IMAGE_WIDTH, dtype=torch.float64)
    return (
        torch.randn(1, NUM_QUERIES, 32, dtype=torch.float64),
        ids_BL.masked_fill(~mask_BL, 0),
        mask_BL,
        image_BPE,
    )


@torch.no_grad()
def test_equals_transformers_under_the_mapped_weights(qformer: QFormer, inputs: tuple[Tensor, ...]) -> None:
    queries, ids_BL, mask_BL, image_BPE = inputs
    reference_model = Blip2QFormerModel(
        Blip2QFormerConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=16,
            cross_attention_frequency=2,
            encoder_hidden_size=IMAGE_WIDTH,
            use_qformer_text_input=True,
        )
    ).eval()
    mapped = {
        hf_name(f"Qformer.{name}"): value.float()
        for name, value in qformer.state_dict().items()
        if hf_name(f"Qformer.{name}") is not None
    }
    reference_model.load_state_dict(
        {
            name.removeprefix("qformer."): value
            for name, value in mapped.items()
            if name.startswith("qformer.")
        }
    )
    image = qformer.project_image(image_BPE)
    alone, _ = qformer.queries(queries, image)
    expected = reference_model(
        query_embeds=queries.float().expand(3, -1, -1), encoder_hidden_states=image_BPE.float()
    )
    assert (alone - expected.last_hidden_state).abs().max() < 1e-5

    together = qformer.pairs(queries, ids_BL, mask_BL, image)
    embedded = torch.cat((queries.expand(3, -1, -1), qformer.bert.embeddings.of_text(ids_BL)), dim=1)
    mask_BS = torch.cat((torch.ones(3, NUM_QUERIES), mask_BL), dim=1)
    expected = reference_model(
        query_embeds=embedded.float(),
        query_length=NUM_QUERIES,
        attention_mask=mask_BS.long(),
        encoder_hidden_states=image_BPE.float(),
    )
    assert (together - expected.last_hidden_state[:, :NUM_QUERIES]).abs().max() < 1e-5
    assert (together - alone).abs().max() > 1e-2


@torch.no_grad()
def test_each_pass_equals_the_definition(qformer: QFormer, inputs: tuple[Tensor, ...]) -> None:
    queries, ids_BL, mask_BL, image_BPE = inputs
    parameters = {f"Qformer.{name}": value for name, value in qformer.state_dict().items()}
    reference = Reference({**parameters, "query_tokens": queries}, heads=4, layers=4, begin_id=VOCAB_SIZE - 1)
    image = qformer.project_image(image_BPE)
    alone, seen = qformer.queries(queries, image)
    text, captions = qformer.text(ids_BL, mask_BL), qformer.captions(ids_BL, seen)
    pairs = qformer.pairs(queries, ids_BL, mask_BL, image)
    for index, length in enumerate(mask_BL.sum(1).tolist()):
        ids, q = ids_BL[index, :length].tolist(), NUM_QUERIES
        expected = reference(q, [], full(q), image_BPE[index])
        assert torch.allclose(alone[index], expected, atol=1e-10)
        assert torch.allclose(text[index, :length], reference(0, ids, full(length), None), atol=1e-10)
        expected = reference(q, ids, full(q + length), image_BPE[index])
        assert torch.allclose(pairs[index], expected[:q], atol=1e-10)
        sees = full(q + length).tril()
        sees[:q, :q] = True
        expected = reference(q, ids, sees, image_BPE[index])
        assert torch.allclose(captions[index, :length], expected[q:], atol=1e-10)


@torch.no_grad()
def test_texts_may_share_an_image(qformer: QFormer, inputs: tuple[Tensor, ...]) -> None:
    queries, ids_BL, mask_BL, image_BPE = inputs
    two_each = [0, 1, 2, 0, 1, 2]
    image = qformer.project_image(image_BPE)
    shared = qformer.pairs(queries, ids_BL[two_each], mask_BL[two_each], image)
    repeated = qformer.project_image(image_BPE[[0, 0, 1, 1, 2, 2]])
    assert torch.allclose(
        shared, qformer.pairs(queries, ids_BL[two_each], mask_BL[two_each], repeated), atol=1e-12
    )


@torch.no_grad()
def test_a_word_sees_no_later_word(qformer: QFormer, inputs: tuple[Tensor, ...]) -> None:
    queries, ids_BL, _, image_BPE = inputs
    _, seen = qformer.queries(queries, qformer.project_image(image_BPE))
    changed = ids_BL.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB_SIZE
    before, after = qformer.captions(ids_BL, seen), qformer.captions(changed, seen)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_begins_as_bert(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert")
    bert = BertForMaskedLM.from_pretrained(folder).eval()
    shape = SHAPE.model_copy(update={"ffn_width": 64, "max_positions": 48})
    model = QFormer(shape, IMAGE_WIDTH).eval()
    words = model.bert.embeddings.word_embeddings.weight[-1].clone()
    copy_bert(model, bert.state_dict())
    # Reading text alone it is BERT, head included, but for the token types, which LAVIS leaves out; [DEC] is new.
    bert.bert.embeddings.token_type_embeddings.weight.data.zero_()
    ids_BL = torch.tensor([[2, 9, 12, 20, 3]])
    hidden = model.text(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))
    expected = bert(ids_BL).logits
    assert torch.allclose(model.logits(hidden)[..., :-1], expected, atol=1e-4)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight[-1], words)
    block = model.bert.encoder.layer[1]
    assert torch.equal(block.intermediate_query.dense.weight, block.intermediate.dense.weight)
    assert torch.equal(block.output_query.LayerNorm.bias, block.output.LayerNorm.bias)
    with pytest.raises(ValueError, match="word_embeddings"):
        copy_bert(QFormer(shape.model_copy(update={"width": 64}), IMAGE_WIDTH), bert.state_dict())


def test_lower_precision_is_of_the_products_alone() -> None:
    torch.manual_seed(0)
    norm, linear = LayerNorm(64), Linear(64, 64)
    # A mean far from zero is lost in bfloat16's eight bits.
    input_BD = (torch.randn(4, 64) + 300).bfloat16()
    expected = torch.nn.functional.layer_norm(input_BD.float(), (64,))
    assert norm(input_BD).dtype == torch.bfloat16
    assert torch.allclose(norm(input_BD).float(), expected, atol=0.02)
    output = linear(input_BD)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and linear.weight.grad.dtype == torch.float32
    model = QFormer(SHAPE, IMAGE_WIDTH, dtype=torch.bfloat16)
    image = model.project_image(torch.randn(2, PATCHES, IMAGE_WIDTH).bfloat16())
    hidden, _ = model.queries(initial_queries(NUM_QUERIES, 32), image)
    assert hidden.dtype == torch.bfloat16
    assert model.logits(hidden).dtype == torch.float32
