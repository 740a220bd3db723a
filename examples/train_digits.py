"""Train the two embedded networks of ``fewstep eval``: the digits U-Net and the digits classifier.

    python examples/train_digits.py                      # writes the shipped weights again
    python examples/train_digits.py --steps 200 --out /tmp/digits     # a quick run

Both are trained on the 1,400 training images in ``eval/data/digits.npz`` (``--make-data`` builds that file from
scikit-learn first). Everything random comes from one seed; the losses and the accuracy stored with the weights are
measured on the rounded (fp16) weights as shipped. The model card, docs/model-card-digits.md, has the numbers.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.eval.networks import CLASSES, NULL_CLASS, TRAIN_STEPS, DigitsFeatures, DigitsUNet

DATA = Path(__file__).resolve().parent.parent / "eval" / "data"

UNET = {
    "optimizer": "AdamW(betas=(0.9, 0.99), weight_decay=0.01), gradient norm <= 1",
    "steps": 4000,
    "learning_rate": 2e-3,
    "warm_up": 100,
    "decay": "cosine to 0",
    "batch": 128,
    "ema": 0.998,
    "label_dropout": 0.1,
    "loss": "|F - (alpha eps - sigma x0)|^2 = |eps_hat - eps|^2 / alpha^2",
    "t": "uniform on [0, 999], stratified within the batch",
}
FEATURES = {
    "optimizer": "AdamW(betas=(0.9, 0.99), weight_decay=0.05)",
    "steps": 2000,
    "learning_rate": 2e-3,
    "warm_up": 100,
    "decay": "cosine to 0",
    "batch": 128,
    "ema": 0.998,
    "loss": "cross entropy",
    "augmentation": "shift by -1, 0 or 1 pixel in x and y; noise of standard deviation uniform on [0, 0.3]",
}


def make_data(path: Path) -> None:
    """Write the digits (1797, 8, 8) uint8 0..16, their labels and the split (1,400 / 397) to ``path``."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target)).astype(np.uint16)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=digits.images.astype(np.uint8),
        labels=digits.target.astype(np.uint8),
        train=np.sort(order[:1400]),
        held_out=np.sort(order[1400:]),
    )
    path.write_bytes(buffer.getvalue())


def load_data(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, held-out images, held-out labels); images (N, 1, 8, 8) in [-1, 1]."""
    with np.load(path) as data:
        images = torch.from_numpy(data["images"]).float()[:, None] / 8 - 1
        labels = torch.from_numpy(data["labels"]).long()
        train, held_out = (torch.from_numpy(data[k]).long() for k in ("train", "held_out"))
    return images[train], labels[train], images[held_out], labels[held_out]


def learning_rate(step: int, recipe: dict, steps: int) -> float:
    """Factor at ``step``: linear warm-up, then a cosine to 0 at the last step."""
    return min(1.0, (step + 1) / recipe["warm_up"]) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(network: nn.Module, loss_of, recipe: dict, steps: int, name: str) -> nn.Module:
    """Minimise ``loss_of(step)`` over the parameters of ``network``; returns their exponential moving average."""
    decay = 0.05 if isinstance(network, DigitsFeatures) else 0.01
    optimizer = torch.optim.AdamW(network.parameters(), recipe["learning_rate"], (0.9, 0.99), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: learning_rate(i, recipe, steps))
    average = copy.deepcopy(network).requires_grad_(False)
    mean, start = 0.0, time.perf_counter()
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # the average forgets its random start quickly: weight (1 + n) / (10 + n) until that exceeds the constant
        keep = min(recipe["ema"], (1 + step) / (10 + step))
        for a, p in zip(average.parameters(), network.parameters(), strict=True):
            a.lerp_(p.detach(), 1 - keep)
        mean += loss.item()
        if (step + 1) % max(1, min(250, steps)) == 0:
            print(f"{name} step {step + 1:5d}  loss {mean / min(250, steps):.4f}  {time.perf_counter() - start:6.1f} s")
            mean = 0.0
    return average.half().float().eval()  # measured as it is stored


def draw(generator: torch.Generator, n: int, batch: int) -> Tensor:
    return torch.randint(n, (batch,), generator=generator)


def noisy(net: DigitsUNet, x0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, log level, alpha, sigma)"""
    level = net.level(t)
    sigma = torch.sigmoid(2 * level).sqrt()[:, None, None, None]
    alpha = torch.sigmoid(-2 * level).sqrt()[:, None, None, None]
    return alpha * x0 + sigma * eps, level, alpha, sigma


@torch.inference_mode()
def epsilon_loss(net: DigitsUNet, images: Tensor, labels: Tensor, repeats: int = 8) -> float:
    """Mean of (eps_hat - eps)^2 over images, noise and t uniform on [0, 999] (a fixed draw)."""
    generator = torch.Generator().manual_seed(1234)
    x0, y = images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    t = torch.randperm(len(x0), generator=generator).add(0.5) / len(x0) * (TRAIN_STEPS - 1)
    eps = torch.randn(x0.shape, generator=generator)
    x = noisy(net, x0, t, eps)[0]
    return (net(x, t, y) - eps).square().mean().item()


def train_unet(images: Tensor, labels: Tensor, steps: int, seed: int) -> DigitsUNet:
    torch.manual_seed(seed)
    net, batch = DigitsUNet(), UNET["batch"]
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        i = draw(generator, len(images), batch)
        x0, eps = images[i], torch.randn((batch, 1, 8, 8), generator=generator)
        t = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * (TRAIN_STEPS - 1)
        dropped = torch.rand(batch, generator=generator) < UNET["label_dropout"]
        x, level, alpha, sigma = noisy(net, x0, t, eps)
        v = net.velocity(x, level, labels[i].masked_fill(dropped, NULL_CLASS))
        return F.mse_loss(v, alpha * eps - sigma * x0)

    return train(net, loss, UNET, steps, "unet")  # pyright: ignore[reportReturnType]


def train_features(images: Tensor, labels: Tensor, steps: int, seed: int) -> DigitsFeatures:
    torch.manual_seed(seed)
    net, batch = DigitsFeatures(), FEATURES["batch"]
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)

    def loss() -> Tensor:
        i = draw(generator, len(images), batch)
        row, column = (torch.randint(3, (batch,), generator=generator) for _ in range(2))
        rows, columns = row[:, None] + torch.arange(8), column[:, None] + torch.arange(8)
        x = padded[i, 0][torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]
        spread = 0.3 * torch.rand((batch, 1, 1, 1), generator=generator)
        return F.cross_entropy(net(x + spread * torch.randn(x.shape, generator=generator)), labels[i])

    return train(net, loss, FEATURES, steps, "features")  # pyright: ignore[reportReturnType]


@torch.inference_mode()
def accuracy(net: DigitsFeatures, images: Tensor, labels: Tensor) -> float:
    return (net(images).argmax(1) == labels).float().mean().item()


def save(net: nn.Module, path: Path, metadata: dict) -> None:
    """fp16 weights and one metadata entry, ``fewstep``: JSON with sorted keys (so equal runs give equal files)."""
    tensors = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    path.write_bytes(to_bytes(tensors, metadata={"fewstep": json.dumps(metadata, sort_keys=True)}))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path}  {path.stat().st_size:,} bytes  sha256 {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the weights (default: eval/data)")
    parser.add_argument("--steps", type=int, help=f"steps of each training (default: {UNET['steps']}, {FEATURES['steps']})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="the shipped weights were made with 2")
    parser.add_argument("--only", choices=("unet", "features"), help="train one of the two")
    parser.add_argument("--make-data", action="store_true", help="write digits.npz from scikit-learn first")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = DATA / "digits.npz"
    if arguments.make_data:
        source = arguments.out / "digits.npz"
        make_data(source)
    images, labels, held_images, held_labels = load_data(source)
    start = time.perf_counter()
    common = {
        "data": "digits.npz",
        "data_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "seed": arguments.seed,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "script": "examples/train_digits.py",
        "licence": "Apache-2.0 (weights); data CC BY 4.0, see NOTICE",
    }
    if arguments.only != "unet":
        steps = arguments.steps or FEATURES["steps"]
        net = train_features(images, labels, steps, arguments.seed)
        measured = {
            "accuracy_train": round(accuracy(net, images, labels), 4),
            "accuracy_held_out": round(accuracy(net, held_images, held_labels), 4),
        }
        print(measured)
        recipe = FEATURES | {"steps": steps}
        save(net, arguments.out / "digits-features.safetensors", common | {"recipe": recipe} | measured)
    if arguments.only != "features":
        steps = arguments.steps or UNET["steps"]
        net = train_unet(images, labels, steps, arguments.seed)
        null = torch.full_like(held_labels, NULL_CLASS)
        measured = {
            "epsilon_loss_train": round(epsilon_loss(net, images, labels, 4), 4),
            "epsilon_loss_held_out": round(epsilon_loss(net, held_images, held_labels, 16), 4),
            "epsilon_loss_held_out_no_label": round(epsilon_loss(net, held_images, null, 16), 4),
        }
        print(measured)
        recipe = UNET | {"steps": steps}
        save(net, arguments.out / "digits-unet.safetensors", common | {"recipe": recipe} | measured)
    print(f"{time.perf_counter() - start:.0f} s, {CLASSES} classes, {len(images)} training images")


if __name__ == "__main__":
    main()
