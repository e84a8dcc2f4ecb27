"""Write the ONNX files that `benchmarks.real_models` tunes: architectures that users meet.

    python -m benchmarks.export_models FOLDER              # all that FOLDER does not have yet
    python -m benchmarks.export_models FOLDER bert_base    # some

It needs packages that the project does not depend on, best in an environment of their own:
`pip install torch torchvision transformers timm ultralytics onnx onnxscript onnxruntime`. Nothing is
downloaded: weights are random (seeded), so outputs mean nothing, but operators, shapes and the habits
of the exporters are those of the real models. Batch 1, static shapes. Names that end with `_ts` come
from torch's TorchScript exporter, all others from the one based on torch.export. `int8` and `fp16`
variants are made of the float32 files by ONNX Runtime's tools, `optimised` ones by its optimiser.
"""

from __future__ import annotations

import argparse
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks import small_architectures as small

Example = tuple[nn.Module, tuple[Tensor, ...]]


class First(nn.Module):
    """A model of transformers that takes tensors by position and returns its first result."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        """Return the first result."""
        named = dict(zip(self.names, values, strict=True))
        return self.model(**named, return_dict=False)[0]


class Detections(First):
    """A detector of transformers: classes and boxes."""

    def forward(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the boxes."""
        found = self.model(**dict(zip(self.names, values, strict=True)))
        return found.logits, found.pred_boxes


def picture(size: int = 224, height: int | None = None) -> tuple[Tensor]:
    """An image of the usual layout."""
    return (torch.randn(1, 3, height or size, size),)


def tokens(vocabulary: int, length: int) -> Tensor:
    """Indices of tokens."""
    return torch.randint(0, vocabulary, (1, length))


def calibrate(module: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Set the statistics of batch norms to those of random images.

    Without, the values of a deep network with random weights vanish, in float16 altogether.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    module.train()
    with torch.no_grad():
        for _ in range(2 if norms else 0):
            module(*(torch.randn(4, *value.shape[1:]) for value in example))
    module.eval()


def vision(name: str, size: int = 224, **options: Any) -> Callable[[], Example]:
    """A classifier of torchvision."""

    def make() -> Example:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options), picture(size)

    return make


def segmenter(name: str, size: int = 256) -> Callable[[], Example]:
    """A segmentation model of torchvision; its first result."""

    def make() -> Example:
        import torchvision

        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        return small.Named(model, "out"), picture(size)

    return make


def from_timm(name: str, size: int = 224) -> Callable[[], Example]:
    """A model of timm."""

    def make() -> Example:
        import timm

        return timm.create_model(name, pretrained=False), picture(size)

    return make


def yolo(name: str, size: int = 640) -> Callable[[], Example]:
    """A detector of ultralytics, its batch norms folded, as its own export does."""

    def make() -> Example:
        from ultralytics import YOLO

        model, example = YOLO(f"{name}.yaml").model.float(), picture(size)
        calibrate(model, example)
        model = model.eval().fuse()
        head = model.model[-1]
        head.export, head.format = True, "onnx"
        with torch.no_grad():
            model(*example)
        return model, example

    return make


def hugging(
    model: str, config: str, names: tuple[str, ...], values: Callable[[Any], tuple[Tensor, ...]],
    wrapper: type[First] = First, part: str | None = None, **options: Any,
) -> Callable[[], Example]:  # fmt: skip
    """A model of transformers, by the names of its class and of its configuration's class."""

    def make() -> Example:
        import transformers

        settings = getattr(transformers, config)(**options)
        made = getattr(transformers, model)(settings)
        if part:
            made = getattr(made, part)
        return wrapper(made, names), values(settings)

    return make


def text(length: int = 128) -> Callable[[Any], tuple[Tensor, ...]]:
    """Tokens and a mask that ends with padding."""

    def values(settings: Any) -> tuple[Tensor, ...]:
        mask = torch.ones(1, length, dtype=torch.int64)
        mask[:, length - 9 :] = 0
        return tokens(settings.vocab_size, length), mask

    return values


IDS, PIXELS = ("input_ids", "attention_mask"), ("pixel_values",)
NO_CACHE: dict[str, Any] = {"use_cache": False}
LLAMA: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 4096, **NO_CACHE,
}  # fmt: skip


def only_ids(length: int) -> Callable[[Any], tuple[Tensor, ...]]:
    """Tokens alone."""
    return lambda settings: (tokens(settings.vocab_size, length),)


def only(value: tuple[Tensor, ...]) -> Callable[[Any], tuple[Tensor, ...]]:
    """Always the same example."""
    return lambda _: value


MODELS: dict[str, Callable[[], Example]] = {
    # the ones wanted most, first
    "bert_base": hugging("BertModel", "BertConfig", IDS, text()),
    "deit_small_ts": from_timm("deit_small_patch16_224"),
    "swin_tiny": from_timm("swin_tiny_patch4_window7_224"),
    "segformer_b0_ts": hugging(
        "SegformerForSemanticSegmentation", "SegformerConfig", PIXELS, only(picture(512))
    ),
    "convnext_tiny": vision("convnext_tiny"),
    "efficientnet_b0_ts": vision("efficientnet_b0"),
    "yolov8n_ts": yolo("yolov8n"),
    "unet": small.unet,
    "mobilenet_v2": vision("mobilenet_v2"),
    # convolutional classifiers
    "mobilenet_v3_ts": vision("mobilenet_v3_large"),
    "resnet18_ts": vision("resnet18"),
    "resnet50": vision("resnet50"),
    "regnet_y_400mf_ts": vision("regnet_y_400mf"),
    "densenet121": vision("densenet121"),
    "shufflenet_ts": vision("shufflenet_v2_x1_0"),
    "squeezenet": vision("squeezenet1_1"),
    "mnasnet_ts": vision("mnasnet1_0"),
    "googlenet": vision("googlenet", init_weights=False, aux_logits=False),
    "inception_v3_ts": vision("inception_v3", 299, init_weights=False, aux_logits=False),
    "ghostnet": from_timm("ghostnet_100"),
    "rexnet_ts": from_timm("rexnet_100"),
    "repvgg_a0": from_timm("repvgg_a0"),
    "hrnet_w18_ts": from_timm("hrnet_w18_small"),
    "efficientnetv2_s": vision("efficientnet_v2_s"),
    # attention on images
    "vit_tiny": from_timm("vit_tiny_patch16_224"),
    "swin_t_ts": vision("swin_t"),
    "mobilevit_ts": from_timm("mobilevit_s", 256),
    "mixer_s16": from_timm("mixer_s16_224"),
    "efficientformer_ts": from_timm("efficientformer_l1"),
    "maxvit_tiny": from_timm("maxvit_rmlp_pico_rw_256", 256),
    "clip_vision_ts": hugging(
        "CLIPVisionModel", "CLIPVisionConfig", PIXELS, only(picture()), num_hidden_layers=4
    ),
    # detection and segmentation
    "yolo11n": yolo("yolo11n"),
    "yolov5n_ts": yolo("yolov5nu"),
    "yolov8n_seg_ts": yolo("yolov8n-seg"),
    "detr_resnet": hugging(
        "DetrForObjectDetection", "DetrConfig", PIXELS, only(picture(320)), Detections,
        use_timm_backbone=False, use_pretrained_backbone=False, encoder_layers=2, decoder_layers=2,
        backbone_config={"model_type": "resnet", "out_features": ["stage4"]}, backbone=None,
    ),
    "yolos_tiny_ts": hugging(
        "YolosForObjectDetection", "YolosConfig", PIXELS, only(picture(224)), Detections,
        hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=[224, 224],
    ),
    "deeplabv3_ts": segmenter("deeplabv3_mobilenet_v3_large"),
    "lraspp": segmenter("lraspp_mobilenet_v3_large"),
    "segformer_b0": hugging(
        "SegformerForSemanticSegmentation", "SegformerConfig", PIXELS, only(picture(256))
    ),
    "super_resolution_ts": small.super_resolution,
    "diffusion_block": small.diffusion_block,
    # text
    "distilbert_ts": hugging("DistilBertModel", "DistilBertConfig", IDS, text(64)),
    "albert": hugging(
        "AlbertModel", "AlbertConfig", IDS, text(64), hidden_size=768, num_attention_heads=12,
        intermediate_size=3072,
    ),
    "minilm_ts": hugging(
        "BertModel", "BertConfig", IDS, text(128), hidden_size=384, num_hidden_layers=6,
        intermediate_size=1536,
    ),
    "gpt2": hugging("GPT2LMHeadModel", "GPT2Config", ("input_ids",), only_ids(64), **NO_CACHE),
    "gpt2_small": hugging(
        "GPT2LMHeadModel", "GPT2Config", ("input_ids",), only_ids(32), n_layer=3, **NO_CACHE
    ),
    "llama_small": hugging("LlamaForCausalLM", "LlamaConfig", ("input_ids",), only_ids(48), **LLAMA),
    "qwen2_small": hugging(
        "Qwen2ForCausalLM", "Qwen2Config", ("input_ids",), only_ids(48), **LLAMA
    ),
    "t5_encoder_ts": hugging("T5EncoderModel", "T5Config", IDS, text(64)),
    # sound
    "whisper_encoder_ts": hugging(
        "WhisperModel", "WhisperConfig", ("input_features",), only((torch.randn(1, 80, 3000),)),
        part="encoder", d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536,
    ),
    "wav2vec2_ts": hugging(
        "Wav2Vec2Model", "Wav2Vec2Config", ("input_values",), only((torch.randn(1, 16000),)),
        num_hidden_layers=3,
    ),
    "silero_like_ts": small.voice_detector,
    # recurrent
    "lstm_ts": small.lstm,
    "gru_ts": small.gru,
    "crnn_ts": small.crnn,
}  # fmt: skip


def quantised(source: Path, out: Path, kind: str) -> None:
    """Write the int8 variant: static "qdq" or "qoperator", or "dynamic"."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        if kind == "dynamic":
            q.quantize_dynamic(str(prepared), str(out))
            return
        form = q.QuantFormat.QDQ if kind == "qdq" else q.QuantFormat.QOperator
        q.quantize_static(
            str(prepared), str(out), Calibration(source), quant_format=form,
            per_channel=kind == "qdq",
        )  # fmt: skip


class Calibration:
    """Some seeded inputs to calibrate with."""

    def __init__(self, source: Path, count: int = 4):
        graph, generator = onnx.load(source).graph, np.random.default_rng(0)
        kept = {tensor.name for tensor in graph.initializer}
        shapes = {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in graph.input
            if value.name not in kept
        }
        self.left = [
            {
                name: generator.normal(size=shape).astype(np.float32)
                for name, shape in shapes.items()
            }
            for _ in range(count)
        ]

    def get_next(self) -> dict[str, Any] | None:
        """Return the next input, or None."""
        return self.left.pop() if self.left else None


def halved(source: Path, out: Path, keep_io: bool) -> None:
    """Write the float16 variant."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep_io), out)


def optimised(source: Path, out: Path) -> None:
    """Write what ONNX Runtime's optimiser makes of it, with operators of its own."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


VARIANTS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "mobilenet_v2_qdq": ("mobilenet_v2", lambda a, b: quantised(a, b, "qdq")),
    "resnet18_qdq": ("resnet18_ts", lambda a, b: quantised(a, b, "qdq")),
    "squeezenet_qoperator": ("squeezenet", lambda a, b: quantised(a, b, "qoperator")),
    "shufflenet_qoperator": ("shufflenet_ts", lambda a, b: quantised(a, b, "qoperator")),
    "mobilenet_v3_dynamic": ("mobilenet_v3_ts", lambda a, b: quantised(a, b, "dynamic")),
    "minilm_dynamic": ("minilm_ts", lambda a, b: quantised(a, b, "dynamic")),
    "deit_small_dynamic": ("deit_small_ts", lambda a, b: quantised(a, b, "dynamic")),
    "lstm_dynamic": ("lstm_ts", lambda a, b: quantised(a, b, "dynamic")),
    "minilm_optimised": ("minilm_ts", optimised),
    "resnet18_optimised": ("resnet18_ts", optimised),
    "gpt2_small_optimised": ("gpt2_small", optimised),
    "resnet18_fp16": ("resnet18_ts", lambda a, b: halved(a, b, True)),
    "mobilenet_v2_fp16": ("mobilenet_v2", lambda a, b: halved(a, b, False)),
    "minilm_fp16": ("minilm_ts", lambda a, b: halved(a, b, True)),
    "yolov8n_fp16": ("yolov8n_ts", lambda a, b: halved(a, b, True)),
    "efficientnet_b0_fp16": ("efficientnet_b0_ts", lambda a, b: halved(a, b, False)),
}


def export(name: str, out: Path) -> None:
    """Write one model."""
    if name in VARIANTS:
        source, write = VARIANTS[name]
        write(out.with_name(f"{source}.onnx"), out)
        return
    torch.manual_seed(0)
    module, example = MODELS[name]()
    if not name.startswith("yolo"):  # its norms are folded already
        calibrate(module, example)
    with torch.no_grad():
        if name.endswith("_ts"):
            torch.onnx.export(module, example, str(out), dynamo=False, opset_version=17)
        else:
            program = torch.onnx.export(
                module, example, dynamo=True, opset_version=18, verbose=False
            )
            assert program is not None
            onnx.save(program.model_proto, out)


def main() -> None:
    """Write what is missing, and say what could not be exported."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    for name in args.names or [*MODELS, *VARIANTS]:
        out = args.folder / f"{name}.onnx"
        if out.exists():
            continue
        part = out.with_suffix(".part")
        try:
            export(name, part)
        except Exception:
            traceback.print_exc(limit=-3)
            part.unlink(missing_ok=True)
            print(f"{name:24} NOT exported", flush=True)
            continue
        part.rename(out)
        print(f"{name:24} {out.stat().st_size / 2**20:8.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
