"""Layers of large networks, from the shapes in their papers: nothing is built or run."""

import tekfac_jax as tekfac
from tekfac_jax import LayerSpec


def dense(path: str, inputs: int, outputs: int, positions: int = 1) -> LayerSpec:
    """A dense layer with a bias."""
    return LayerSpec(
        path=path, kind="dense", kernel_shape=(inputs, outputs), contracted=1, use_bias=True,
        dtype="float32", axes=(-1,), positions=positions,
    )  # fmt: skip


def conv(path: str, inputs: int, outputs: int, window: int, width: int) -> LayerSpec:
    """A square convolution without bias, whose output is `width` positions wide."""
    return LayerSpec(
        path=path, kind="conv", kernel_shape=(window, window, inputs, outputs), contracted=3,
        use_bias=False, dtype="float32", strides=(1, 1), dilation=(1, 1), padding="SAME",
        positions=width**2,
    )  # fmt: skip


def resnet50() -> tekfac.Layers:
    """The 53 convolutions and the dense layer of ResNet-50 (He et al. 2016, Table 1), at 224×224.

    The second convolution of a block has the stride, as is usual.
    """
    specs, inputs = [conv("stem", 3, 64, 7, 112)], 64
    for stage, (blocks, features) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        size = 56 // 2**stage
        for block in range(blocks):
            path, before = f"stage_{stage}/block_{block}", size
            if block == 0:
                specs.append(conv(f"{path}/shortcut", inputs, 4 * features, 1, size))
                before = 56 // 2 ** max(0, stage - 1)
            specs.append(conv(f"{path}/reduce", inputs, features, 1, before))
            specs.append(conv(f"{path}/middle", features, features, 3, size))
            specs.append(conv(f"{path}/expand", features, 4 * features, 1, size))
            inputs = 4 * features
    return tekfac.Layers((*specs, dense("head", 2048, 1000)))


def vit(width: int, depth: int) -> tekfac.Layers:
    """The dense layers of a vision transformer (Dosovitskiy et al. 2021, Table 1), at 224×224.

    Patches of 16×16, and one class token.
    """
    specs = [dense("patches", 16 * 16 * 3, width, 196)]
    for block in range(depth):
        path = f"block_{block}"
        for name in ("query", "key", "value", "out"):
            specs.append(dense(f"{path}/{name}", width, width, 197))
        specs.append(dense(f"{path}/up", width, 4 * width, 197))
        specs.append(dense(f"{path}/down", 4 * width, width, 197))
    return tekfac.Layers((*specs, dense("head", width, 1000)))


NETWORKS = {"ResNet-50": resnet50(), "ViT-B": vit(768, 12), "ViT-L": vit(1024, 24)}
