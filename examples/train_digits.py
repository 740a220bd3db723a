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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.eval.networks import NULL_CLASS, TRAIN_STEPS, DigitsFeatures, DigitsUNet

Net = TypeVar("Net", bound=nn.Module)
DATA = Path(__file__).resolve().parent.parent / "eval" / "data"

UNET: dict[str, Any] = {
    "optimizer": "AdamW, gradient norm <= 1",
    "betas": (0.9, 0.99),
    "weight_decay": 0.01,
    "learning_rate": 2e-3,
    "schedule": "linear warm-up over 100 steps, cosine to 0",
    "steps": 4000,
    "batch": 128,
    "ema": 0.998,
    "label_dropout": 0.1,
    "loss": "|F - (alpha eps - sigma x0)|^2 = |eps_hat - eps|^2 / alpha^2",
    "t": "uniform on [0, 999], stratified within the batch",
}
FEATURES: dict[str, Any] = {
    "optimizer": "AdamW, gradient norm <= 1",
    "betas": (0.9, 0.99),
    "weight_decay": 0.05,
    "learning_rate": 2e-3,
    "schedule": "linear warm-up over 100 steps, cosine to 0",
    "steps": 2000,
    "batch": 128,
    "ema": 0.998,
    "shift": 1,
    "noise": 0.3,
    "loss": "cross entropy, images shifted by -1 .. 1 pixels, with noise of standard deviation uniform on [0, 0.3]",
}
WARM_UP = 100


def make_data(path: Path) -> None:
    """Write the digits (1797, 8, 8) uint8 0..16, their labels and the split (1,400 / 397) to ``path``."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels)).astype(np.uint16)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=np.asarray(pixels, np.uint8).reshape(-1, 8, 8),
        labels=np.asarray(labels, np.uint8),
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


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine to 0 at the last step."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(network: Net, loss_of: Callable[[], Tensor], recipe: dict[str, Any], name: str) -> Net:
    """Minimise the expected ``loss_of()``; returns the exponential moving average of the network, rounded to fp16."""
    steps = recipe["steps"]
    optimizer = torch.optim.AdamW(
        network.parameters(), recipe["learning_rate"], recipe["betas"], weight_decay=recipe["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    average = copy.deepcopy(network).requires_grad_(False)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # the average forgets its random start quickly: weight n / (9 + n) until that exceeds the constant
        keep = min(recipe["ema"], step / (9 + step))
        for a, p in zip(average.parameters(), network.parameters(), strict=True):
            a.lerp_(p.detach(), 1 - keep)
        losses.append(loss.item())
        if step % 250 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(
                f"{name}: step {step} of {steps}, loss {np.mean(losses[-250:]):.4f}, {seconds:.0f} s",
                flush=True,
            )
    return average.half().float().eval()  # measured as it is stored


def noisy(net: DigitsUNet, x0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x = alpha x0 + sigma eps`` at indices t, then log(sigma / alpha), alpha and sigma."""
    level = net.level(t)
    sigma = torch.sigmoid(2 * level).sqrt()[:, None, None, None]
    alpha = torch.sigmoid(-2 * level).sqrt()[:, None, None, None]
    return alpha * x0 + sigma * eps, level, alpha, sigma


@torch.inference_mode()
def epsilon_loss(net: DigitsUNet, images: Tensor, labels: Tensor, draws: int = 6400) -> float:
    """Mean of (eps_hat - eps)^2 over images, noise and t uniform on [0, 999]: a fixed draw, stratified in t."""
    generator = torch.Generator().manual_seed(1234)
    i = torch.arange(draws) % len(images)
    t = torch.randperm(draws, generator=generator).add(0.5) / draws * (TRAIN_STEPS - 1)
    eps = torch.randn((draws, 1, 8, 8), generator=generator)
    x = noisy(net, images[i], t, eps)[0]
    return round((net(x, t, labels[i]) - eps).square().mean().item(), 4)


def train_unet(images: Tensor, labels: Tensor, recipe: dict[str, Any], seed: int) -> DigitsUNet:
    torch.manual_seed(seed)  # the initial weights
    net, batch = DigitsUNet(), recipe["batch"]
    generator = torch.Generator().manual_seed(seed)  # everything drawn later

    def loss() -> Tensor:
        i = torch.randint(len(images), (batch,), generator=generator)
        x0, eps = images[i], torch.randn((batch, 1, 8, 8), generator=generator)
        t = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * (TRAIN_STEPS - 1)
        dropped = torch.rand(batch, generator=generator) < recipe["label_dropout"]
        x, level, alpha, sigma = noisy(net, x0, t, eps)
        v = net.velocity(x, level, labels[i].masked_fill(dropped, NULL_CLASS))
        return F.mse_loss(v, alpha * eps - sigma * x0)

    return train(net, loss, recipe, "digits-unet")


def train_features(images: Tensor, labels: Tensor, recipe: dict[str, Any], seed: int) -> DigitsFeatures:
    torch.manual_seed(seed)
    net, batch, shift = DigitsFeatures(), recipe["batch"], recipe["shift"]
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(images, (shift,) * 4, value=-1.0)[:, 0]
    sample, pixel = torch.arange(batch)[:, None, None], torch.arange(8)

    def loss() -> Tensor:
        i = torch.randint(len(images), (batch,), generator=generator)
        row, column = torch.randint(2 * shift + 1, (2, batch), generator=generator)
        rows, columns = row[:, None, None] + pixel[:, None], column[:, None, None] + pixel
        x = padded[i][sample, rows, columns][:, None]
        spread = recipe["noise"] * torch.rand((batch, 1, 1, 1), generator=generator)
        return F.cross_entropy(net(x + spread * torch.randn(x.shape, generator=generator)), labels[i])

    return train(net, loss, recipe, "digits-features")


@torch.inference_mode()
def accuracy(net: DigitsFeatures, images: Tensor, labels: Tensor) -> float:
    return round((net(images).argmax(1) == labels).double().mean().item(), 4)


def save(net: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """fp16 weights and one metadata entry, ``fewstep``: JSON with sorted keys, so that equal runs give equal files."""
    tensors = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    path.write_bytes(to_bytes(tensors, metadata={"fewstep": json.dumps(metadata, sort_keys=True)}))
    print(f"{path}: {path.stat().st_size:,} bytes, sha256 {sha256(path)}")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the weights (default: eval/data)")
    parser.add_argument("--steps", type=int, help="steps of each training (default: 4000 and 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="other numbers than 1 round differently (default: 1)"
    )
    parser.add_argument("--only", choices=("unet", "features"), help="train one of the two")
    parser.add_argument("--make-data", action="store_true", help="build digits.npz in the folder --out first")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = (arguments.out if arguments.make_data else DATA) / "digits.npz"
    if arguments.make_data:
        make_data(source)
    images, labels, held_images, held_labels = load_data(source)
    common = {
        "data": source.name,
        "data_sha256": sha256(source),
        "seed": arguments.seed,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "script": "examples/train_digits.py",
        "licence": "Apache-2.0; trained on data under CC BY 4.0, see NOTICE",
    }
    start, cpu = time.perf_counter(), time.process_time()
    if arguments.only != "unet":
        recipe = FEATURES | {"steps": arguments.steps or FEATURES["steps"]}
        net = train_features(images, labels, recipe, arguments.seed)
        measured = {
            "accuracy_train": accuracy(net, images, labels),
            "accuracy_held_out": accuracy(net, held_images, held_labels),
        }
        print(measured)
        save(net, arguments.out / "digits-features.safetensors", common | {"recipe": recipe} | measured)
    if arguments.only != "features":
        recipe = UNET | {"steps": arguments.steps or UNET["steps"]}
        net = train_unet(images, labels, recipe, arguments.seed)
        measured = {
            "epsilon_loss_train": epsilon_loss(net, images, labels),
            "epsilon_loss_held_out": epsilon_loss(net, held_images, held_labels),
            "epsilon_loss_held_out_no_label": epsilon_loss(
                net, held_images, torch.full_like(held_labels, NULL_CLASS)
            ),
        }
        print(measured)
        save(net, arguments.out / "digits-unet.safetensors", common | {"recipe": recipe} | measured)
    print(
        f"{time.perf_counter() - start:.0f} s of wall time, {time.process_time() - cpu:.0f} s of processor time"
    )


if __name__ == "__main__":
    main()
