"""The reference list: well-known architectures by name, built with random weights, with an example input.

torchvision, timm and transformers are needed here only. torchvision has no build for torch's CPU wheels: it is
installed without its dependencies, and its compiled operators are declared, not loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ZOO", "Entry"]

_declared: list[Any] = []  # torch forgets the operators of a library that nobody holds


def declare_torchvision() -> None:
    """Make ``import torchvision`` work without its compiled operators, which no model here runs."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return  # transformers does without it, and timm says that it cannot
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Args:
        family: the package it comes from.
        build: makes the network.
        example: makes the input.
        options: how it differs from the package's defaults.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    options: str = ""


def image(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tokens(batch: int = 2, length: int = 8, vocabulary: int = 50, **more: Callable[[], Tensor]) -> Callable[[], Any]:
    def make() -> Any:
        ids = torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, **{key: value() for key, value in more.items()}}

    return make


# -- torchvision -----------------------------------------------------------------------------------


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision()
        import torchvision.models as models

        path, _, attribute = name.rpartition(".")
        source = models
        for part in filter(None, path.split(".")):
            source = getattr(source, part)
        return getattr(source, attribute)(weights=None, **options)

    return build


def _vision_entries() -> list[Entry]:
    plain = """alexnet vgg11 vgg16_bn resnet18 resnet50 wide_resnet50_2 resnext50_32x4d densenet121 mobilenet_v2
        mobilenet_v3_small mobilenet_v3_large shufflenet_v2_x1_0 mnasnet1_0 efficientnet_b0 efficientnet_v2_s
        regnet_y_400mf convnext_tiny swin_t swin_v2_t squeezenet1_1"""
    entries = [Entry(name, "torchvision", _torchvision(name), image(1, 3, 64, 64)) for name in plain.split()]
    no_weights = {"init_weights": False}
    entries += [
        Entry(
            "googlenet", "torchvision", _torchvision("googlenet", aux_logits=False, **no_weights), image(1, 3, 64, 64)
        ),
        Entry("inception_v3", "torchvision", _torchvision("inception_v3", **no_weights), image(1, 3, 96, 96)),
        Entry("vit_b_16", "torchvision", _torchvision("vit_b_16", image_size=64), image(1, 3, 64, 64), "image 64"),
        Entry("maxvit_t", "torchvision", _torchvision("maxvit_t"), image(1, 3, 224, 224)),
        Entry("r3d_18", "torchvision", _torchvision("video.r3d_18"), image(1, 3, 4, 32, 32)),
    ]
    for name in ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        build = _torchvision(f"segmentation.{name}", weights_backbone=None)
        entries.append(Entry(name, "torchvision", build, image(1, 3, 64, 64)))
    return entries


# -- timm ------------------------------------------------------------------------------------------


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision()
        import timm

        return timm.create_model(name)

    return build


def _timm_entries() -> list[Entry]:
    sizes = {
        "mixer_s16_224": 224,
        "resmlp_12_224": 224,
        "nfnet_l0": 64,
        "dm_nfnet_f0": 64,
        "vit_tiny_patch16_224": 224,
        "levit_128s": 224,
        "convmixer_768_32": 64,
        "gmlp_s16_224": 224,
        "poolformer_s12": 64,
        "repvgg_a0": 64,
    }
    return [Entry(name, "timm", _timm(name), image(1, 3, size, size)) for name, size in sizes.items()]


# -- transformers ----------------------------------------------------------------------------------


def _transformer(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision()
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


def _language_entries() -> list[Entry]:
    bert = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    llama = {**bert, "num_key_value_heads": 2}
    bart = {
        "vocab_size": 50,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }

    def decoder_ids() -> Tensor:
        return torch.tensor([[4, 5, 6, 7]] * 2)

    small = "2 layers, 32 wide, 4 heads"
    text = tokens()
    both = tokens(decoder_input_ids=decoder_ids)
    pixels = lambda: {"pixel_values": image(1, 3, 32, 32)()}  # noqa: E731
    vit = {k: v for k, v in bert.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
    return [
        Entry("bert", "transformers", _transformer("BertForMaskedLM", "BertConfig", **bert), text, small),
        Entry(
            "distilbert",
            "transformers",
            _transformer(
                "DistilBertForMaskedLM", "DistilBertConfig", vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64
            ),
            text,
            small,
        ),
        Entry(
            "electra",
            "transformers",
            _transformer("ElectraForPreTraining", "ElectraConfig", embedding_size=16, **bert),
            text,
            small,
        ),
        Entry(
            "gpt2",
            "transformers",
            _transformer(
                "GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16
            ),
            text,
            small,
        ),
        Entry(
            "opt",
            "transformers",
            _transformer(
                "OPTForCausalLM",
                "OPTConfig",
                vocab_size=50,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=64,
                word_embed_proj_dim=16,
                max_position_embeddings=32,
            ),
            text,
            small,
        ),
        Entry("llama", "transformers", _transformer("LlamaForCausalLM", "LlamaConfig", **llama), text, small),
        Entry("mistral", "transformers", _transformer("MistralForCausalLM", "MistralConfig", **llama), text, small),
        Entry("qwen2", "transformers", _transformer("Qwen2ForCausalLM", "Qwen2Config", **llama), text, small),
        Entry(
            "t5",
            "transformers",
            _transformer(
                "T5ForConditionalGeneration",
                "T5Config",
                vocab_size=50,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
            ),
            both,
            small,
        ),
        Entry("bart", "transformers", _transformer("BartForConditionalGeneration", "BartConfig", **bart), both, small),
        Entry("vit", "transformers", _transformer("ViTForImageClassification", "ViTConfig", **vit), pixels, small),
        Entry(
            "dinov2", "transformers", _transformer("Dinov2ForImageClassification", "Dinov2Config", **vit), pixels, small
        ),
        Entry(
            "resnet",
            "transformers",
            _transformer(
                "ResNetForImageClassification",
                "ResNetConfig",
                embedding_size=16,
                hidden_sizes=[16, 32, 64],
                depths=[1, 2, 1],
            ),
            pixels,
            "16 to 64 wide",
        ),
        Entry(
            "convnext",
            "transformers",
            _transformer(
                "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]
            ),
            pixels,
            "16 to 64 wide",
        ),
        Entry(
            "whisper",
            "transformers",
            _transformer(
                "WhisperForConditionalGeneration",
                "WhisperConfig",
                num_mel_bins=8,
                max_source_positions=16,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                **bart,
            ),
            lambda: {"input_features": image(1, 8, 32)(), "decoder_input_ids": decoder_ids()[:1]},
            small,
        ),
        Entry(
            "clip",
            "transformers",
            _clip,
            lambda: {**tokens(1)(), "pixel_values": image(1, 3, 32, 32)()},
            small,
        ),
        Entry(
            "mamba",
            "transformers",
            _transformer(
                "MambaForCausalLM", "MambaConfig", vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8
            ),
            text,
            "2 layers, 32 wide",
        ),
        Entry(
            "mixtral",
            "transformers",
            _transformer("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, **llama),
            text,
            f"{small}, 4 experts",
        ),
    ]


def _clip() -> nn.Module:
    declare_torchvision()
    import transformers

    half = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 50, "eos_token_id": 2, **half},
        vision_config={"image_size": 32, "patch_size": 8, **half},
        projection_dim=24,
    )
    return transformers.CLIPModel(config)


# -- torch.nn --------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, layer: Callable[..., nn.Module], width: int = 16, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.layer = layer(12, width, batch_first=True, **options)
        out = options.get("proj_size") or width
        self.head = nn.Linear(out * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x).relu())[0])


class SelfAttention(nn.Module):
    """nn.MultiheadAttention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 5)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Encoder(nn.Module):
    """nn.TransformerEncoder between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)))


class Translator(nn.Module):
    """nn.Transformer between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.head = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 5)
        self.transformer = nn.Transformer(16, 4, 2, 2, 32, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.transformer(self.source(x), self.target(y)))


class Gated(nn.Module):
    """Two gated linear units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.GLU(), nn.Linear(16, 24), nn.GLU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class UNet(nn.Module):
    """A U-Net of two levels whose way up is a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(12, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU())
        self.middle = nn.Conv2d(20, 28, 3, padding=1)
        self.up2 = nn.Sequential(nn.Conv2d(28, 64, 1), nn.PixelShuffle(2))
        self.join2 = nn.Conv2d(16 + 20, 20, 3, padding=1)
        self.up1 = nn.Sequential(nn.Conv2d(20, 32, 1), nn.PixelShuffle(2))
        self.join1 = nn.Conv2d(8 + 12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(nn.functional.max_pool2d(one, 2))
        low = self.middle(nn.functional.max_pool2d(two, 2)).relu()
        two = self.join2(torch.cat([self.up2(low), two], 1)).relu()
        return self.join1(torch.cat([self.up1(two), one], 1))


def _module_entries() -> list[Entry]:
    sequence = image(2, 7, 6)
    made: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
        "LSTM": (lambda: Recurrent(nn.LSTM, num_layers=2), sequence),
        "LSTM bidirectional": (lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2), sequence),
        "LSTM projected": (lambda: Recurrent(nn.LSTM, proj_size=8, num_layers=2), sequence),
        "GRU": (lambda: Recurrent(nn.GRU, num_layers=2), sequence),
        "RNN": (lambda: Recurrent(nn.RNN, num_layers=2), sequence),
        "MultiheadAttention": (SelfAttention, sequence),
        "TransformerEncoder": (Encoder, sequence),
        "Transformer": (Translator, lambda: (sequence(), image(2, 5, 6)())),
        "GLU": (Gated, image(4, 6)),
        "U-Net with pixel shuffle": (UNet, image(1, 3, 16, 16)),
    }
    return [Entry(name, "torch.nn", build, example) for name, (build, example) in made.items()]


ZOO: dict[str, Entry] = {
    entry.name: entry for entry in [*_vision_entries(), *_timm_entries(), *_language_entries(), *_module_entries()]
}
