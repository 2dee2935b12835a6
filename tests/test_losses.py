"""The parts of the losses: smoothing, negatives, what is predicted, sums that add up."""

import pytest
import torch
from blip2_reference import smooth_cross_entropy
from torch.nn.functional import normalize

from training.losses import (
    IGNORED,
    captioning_loss,
    contrastive_loss,
    draw_negatives,
    matching_loss,
    next_tokens,
    similarity,
)


def embeddings(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    images, texts = torch.randn(n, 3, 5, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
    return normalize(images, dim=-1), normalize(texts, dim=-1), torch.tensor(0.2, dtype=torch.float64)


def test_contrastive_loss_is_the_mean_of_both_directions() -> None:
    image, text, temperature = embeddings(6)
    loss = contrastive_loss(image, text, image, text, temperature, torch.arange(6), 0.1)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        to_text = torch.stack([(image[i] @ text[j]).max() for j in range(6)]) / temperature
        to_image = torch.stack([(image[j] @ text[i]).max() for j in range(6)]) / temperature
        expected += (smooth_cross_entropy(to_text, i) + smooth_cross_entropy(to_image, i)) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    parts = [
        contrastive_loss(image[rows], text[rows], image, text, temperature, torch.arange(6)[rows], 0.1)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert sum(parts).item() == pytest.approx(loss.item(), abs=1e-12)


def test_smoothed_contrastive_loss_has_its_known_floor() -> None:
    # With 0.1 spread over 1,024, the entropy of the target: a perfect model's loss is 1.02, not 0.
    n, temperature = 1024, torch.tensor(1.0)
    images, texts = torch.eye(n)[:, None], torch.eye(n)
    best = min(
        contrastive_loss(
            images[:4], texts[:4], images, texts, temperature / scale, torch.arange(4), 0.1
        ).item()
        / 4
        for scale in torch.linspace(5, 15, 41)
    )
    assert best == pytest.approx(1.02, abs=0.01)


def test_negatives_follow_the_similarities_and_are_never_of_their_own() -> None:
    image, text, temperature = embeddings(5)
    same = torch.eye(5, dtype=torch.bool)
    # Images 1 and 3 belong together.
    same[1, 3] = same[3, 1] = True
    num_draws = 4000
    uniforms = torch.rand(num_draws, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    counts = torch.zeros(2, 5, 5)
    for uniform in uniforms:
        for direction, drawn in enumerate(draw_negatives(image, text, temperature, same, uniform)[:2]):
            counts[direction, torch.arange(5), drawn] += 1
    to_text = similarity(image, text) / temperature
    for direction, logits in enumerate((to_text, to_text.T)):
        wanted = logits.masked_fill(same, -torch.inf).softmax(1)
        assert (counts[direction] / num_draws - wanted).abs().max() < 0.035
        assert counts[direction][same].sum() == 0


def test_the_share_of_false_negatives_is_what_would_be_drawn_without_the_mask() -> None:
    image, text, temperature = embeddings(5)
    same = torch.eye(5, dtype=torch.bool)
    same[1, 3] = True
    uniforms = torch.rand(2, 5, dtype=torch.float64)
    *_, share = draw_negatives(image, text, temperature, same, uniforms)
    # Image 1 would get text 3, and text 3 image 1, each as often as the softmax over the other four says.
    logits = (similarity(image, text) / temperature).fill_diagonal_(-torch.inf)
    expected = (logits.softmax(1)[1, 3] + logits.T.softmax(1)[3, 1]) / (2 * 5)
    assert share.item() == pytest.approx(expected.item()) and share > 0
    apart = torch.zeros(5, 5, dtype=torch.bool)
    apart[1, 3] = apart[3, 1] = True
    assert draw_negatives(image, text, temperature, same, uniforms, apart)[2] == 0


def test_negatives_depend_on_their_numbers_alone() -> None:
    image, text, temperature = embeddings(6)
    same = torch.eye(6, dtype=torch.bool)
    uniforms = torch.rand(2, 6, dtype=torch.float64)
    drawn = draw_negatives(image, text, temperature, same, uniforms)
    torch.manual_seed(99)
    assert all(map(torch.equal, drawn, draw_negatives(image, text, temperature, same, uniforms)))
    edge = torch.full((2, 6), 1 - 1e-16, dtype=torch.float64)
    assert all((uniform < 6).all() for uniform in draw_negatives(image, text, temperature, same, edge)[:2])


def test_matching_takes_the_mean_of_the_queries_logits_and_leaves_out_what_fills_up() -> None:
    logits = torch.tensor([[[3.0, 0.0], [-1.0, 0.0]], [[0.0, 4.0], [0.0, -1.0]], [[9.0, 0.0], [9.0, 0.0]]])
    labels, weights = torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 0.0])
    loss, right = matching_loss(logits, labels, weights)
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.5])
    expected = -first.log_softmax(0)[0] - second.log_softmax(0)[0]
    assert loss.item() == pytest.approx(expected.item())
    assert right.item() == 1


def test_next_tokens_end_with_the_end() -> None:
    ids = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0], [2, 5, 6, 7, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    i = IGNORED
    assert next_tokens(ids, mask).tolist() == [[7, 8, 3, i, i], [9, 3, i, i, i], [5, 6, 7, 3, i]]


def test_captioning_in_parts_is_the_whole() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11).double()
    words = torch.randint(11, (23,))
    results = []
    for rows in (4, 1000):
        hidden = torch.randn(
            23, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        head.zero_grad()
        loss = captioning_loss(head, hidden, words, 0.1, rows_at_once=rows)
        loss.backward()
        results.append((loss.detach(), hidden.grad, head.weight.grad.clone()))
    for uniform, other in zip(*results, strict=True):
        assert torch.allclose(uniform, other, atol=1e-12)
    expected = sum(smooth_cross_entropy(row, word) for row, word in zip(head(hidden), words, strict=True))
    assert results[0][0].item() == pytest.approx(expected.item(), abs=1e-10)
