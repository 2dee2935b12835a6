"""The frozen encoders: open_clip's own features before the last block, frozen, normalised on the device."""

from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from tiny_models import IMAGE_PX, save_ranker
from torch import Tensor, nn

from schemas.errors import CapfiltError
from schemas.pretrain import VisionConfig
from training.models.layers import LayerNorm
from training.models.vision import FrozenVision, empty_vision, load_vision


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ranker(tmp_path_factory.mktemp("clip"))


def tiny(folder: Path, **values: object) -> VisionConfig:
    return VisionConfig.model_validate({"model": f"local-dir:{folder}", "pretrained": "", **values})


def pixels(size: int = IMAGE_PX) -> Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def reference(visual: nn.Module, pixels_BCHW: Tensor, block: int, mean: float, std: float) -> Tensor:
    """Return open_clip's features after a block, class token first, from its own forward pass."""
    seen: list[Tensor] = []
    blocks = visual.transformer.resblocks if hasattr(visual, "transformer") else visual.trunk.blocks
    hook = blocks[block].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        visual.eval()((pixels_BCHW / 255 - mean) / std)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("drop_blocks", [1, 0])
def test_clip_features_are_of_the_block_before_the_dropped_ones(folder: Path, drop_blocks: int) -> None:
    vision = load_vision(tiny(folder, drop_blocks=drop_blocks), IMAGE_PX, torch.float32)
    visual = open_clip.create_model(f"local-dir:{folder}").visual
    expected = reference(visual, pixels(), -1 - drop_blocks, 0.5, 0.25)
    assert vision(pixels()).shape == (3, vision.num_tokens, vision.width) == (3, 17, 32)
    assert torch.allclose(vision(pixels()), expected, atol=1e-5)


def small_eva(depth: int = 3) -> TimmModel:
    """Return open_clip's tower of ViT-g/14, its trunk of the same class with a few narrow blocks."""
    torch.manual_seed(0)
    with torch.device("meta"):
        tower = TimmModel("eva_giant_patch14_224", embed_dim=24, pool="token", proj=None)
    shape = {"img_size": 28, "embed_dim": 32, "depth": depth, "num_heads": 4}
    tower.trunk = timm.create_model("eva_giant_patch14_224", num_classes=24, global_pool="token", **shape)
    tower.image_size = (28, 28)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return tower


def test_eva_features_are_of_the_block_before_the_dropped_one() -> None:
    tower = small_eva()
    expected = reference(tower, pixels(28), -2, 0.5, 0.25)
    vision = FrozenVision(tower, 1, torch.float32, (0.5,) * 3, (0.25,) * 3)
    assert vision.num_tokens == 5 and vision.width == 32 and len(vision.blocks) == 2
    assert torch.allclose(vision(pixels(28)), expected, atol=1e-5)


def test_full_size_encoders_are_the_published_ones() -> None:
    for model, tag, blocks, width in (
        ("EVA01-g-14", "laion400m_s11b_b41k", 39, 1408),
        ("ViT-L-14", "openai", 23, 1024),
    ):
        vision = empty_vision(VisionConfig(model=model, pretrained=tag), "meta", torch.bfloat16)
        assert (len(vision.blocks), vision.width, vision.num_tokens) == (blocks, width, 257)
        # Neither the last block nor what follows it is kept.
        names = " ".join(name for name, _ in vision.named_parameters())
        assert not any(
            part in names for part in ("ln_post", "proj_out", "head", f"blocks.{blocks}.", "fc_norm")
        )


def test_lower_precision_keeps_the_norms(folder: Path) -> None:
    whole = load_vision(tiny(folder), IMAGE_PX, torch.float32)
    half = load_vision(tiny(folder), IMAGE_PX, torch.bfloat16)
    norms = [module for module in half.modules() if isinstance(module, LayerNorm)]
    assert len(norms) == 3 and all(norm.weight.dtype == torch.float32 for norm in norms)
    others = {
        parameter.dtype
        for module in half.modules()
        if not isinstance(module, LayerNorm) and module is not half.tower
        for parameter in module.parameters(recurse=False)
    }
    assert others == {torch.bfloat16}
    actual, expected = half(pixels()), whole(pixels())
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.02 * expected.norm()


def deep_tower(kind: str) -> nn.Module:
    """Return a tower of 24 narrow blocks with one channel of hundreds, as real towers have."""
    torch.manual_seed(0)
    if kind == "eva":
        tower = small_eva(depth=24)
        positions = tower.trunk.pos_embed
    else:
        tower = VisionTransformer(28, 14, width=32, layers=24, heads=4, mlp_ratio=2.0, output_dim=8)
        tower.image_size = (28, 28)
        positions = tower.ln_pre.bias
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    with torch.no_grad():
        positions[..., 3] += 300
    return tower


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", ["clip", "eva"])
def test_lower_precision_keeps_the_residual_stream(kind: str) -> None:
    """In bfloat16 each of its 48 sums would round every channel to 8 bits, the one of hundreds to whole numbers."""
    where = (0.5,) * 3, (0.25,) * 3
    images = pixels(28)
    channels = [channel for channel in range(32) if channel != 3]
    expected = FrozenVision(deep_tower(kind), 1, torch.float32, *where)(images)[..., channels]
    vision = FrozenVision(deep_tower(kind), 1, torch.bfloat16, *where)
    kept = vision(images)
    assert kept.dtype == torch.bfloat16
    tower = vision.tower
    token, positions = (
        (tower.class_embedding, tower.positional_embedding)
        if kind == "clip"
        else (tower.cls_token, tower.pos_embed)
    )
    assert token.dtype == positions.dtype == torch.float32
    rounded = FrozenVision(deep_tower(kind), 1, torch.float32, *where)
    rounded.tower.to(torch.bfloat16)
    rounded.dtype = torch.bfloat16
    errors = [relative_error(features[..., channels], expected) for features in (kept, rounded(images))]
    assert errors[0] < 0.6 * errors[1], errors


def test_quick_gelu_comes_with_the_tag() -> None:
    openai = empty_vision(VisionConfig(), "meta", torch.float32)
    laion = empty_vision(VisionConfig(pretrained="laion2b_s32b_b82k"), "meta", torch.float32)
    assert type(openai.blocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert isinstance(laion.blocks[0].mlp.gelu, nn.GELU)


def test_other_towers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CapfiltError, match="ModifiedResNet has no blocks"):
        empty_vision(VisionConfig(model="RN50"), "meta", torch.float32)
    with pytest.raises(
        CapfiltError, match=r"vision.model = 'ViT-L-41' is not an architecture.*did you mean ViT-L"
    ):
        empty_vision(VisionConfig(model="ViT-L-41"), "meta", torch.float32)
    with pytest.raises(CapfiltError, match="open_clip_config.json is missing"):
        load_vision(tiny(tmp_path), IMAGE_PX, torch.float32)
