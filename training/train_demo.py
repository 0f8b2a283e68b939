"""Trains the weights of variant `demo` that ship in dat_deploy/data/demo.safetensors, on Fashion-MNIST, on a CPU.

    python training/train_demo.py --data FOLDER --log training/demo.log    # 20 minutes on one core

The last 5,000 training pictures are held out and tell how it goes; the test pictures are classified once, at the end,
through the same preprocessing and network as `dat-deploy validate` uses.
"""

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fashion_mnist import DEBIAN_FOLDER, load
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dat_deploy.images.preprocess import preprocess
from dat_deploy.networks.dat.checkpoint import load_model, save_checkpoint
from dat_deploy.networks.dat.model import DAT
from dat_deploy.networks.dat.variants import VARIANTS

VARIANT = VARIANTS["demo"]
HELD_OUT = 5000
SHIFT = 4  # pixels of the enlarged picture by which augmentation moves it, at most


def network_inputs(pictures: NDArray[np.uint8]) -> Tensor:
    """One channel of the network's input, [N, 64, 64]; the three differ by their mean and deviation alone."""
    preprocessing = VARIANT.preprocessing
    return torch.stack([torch.from_numpy(preprocess(Image.fromarray(p), preprocessing)[0]) for p in pictures])


def three_channels(grey: Tensor) -> Tensor:
    """[B, 64, 64] as `network_inputs` gives them -> [B, 3, 64, 64]."""
    about = VARIANT.preprocessing
    mean, std = torch.tensor(about.mean), torch.tensor(about.std)
    samples = grey * std[0] + mean[0]
    return (samples[:, None] - mean[:, None, None]) / std[:, None, None]


def augmented(grey: Tensor) -> Tensor:
    """Each picture mirrored or not, and moved by up to SHIFT pixels; black comes in from outside."""
    count, height, width = grey.shape
    grey = torch.where(torch.rand(count, 1, 1) < 0.5, grey.flip(2), grey)
    black = float(grey.min())
    padded = F.pad(grey, (SHIFT,) * 4, value=black)
    moves = torch.randint(0, 2 * SHIFT + 1, (count, 2)).tolist()
    return torch.stack([p[y : y + height, x : x + width] for p, (y, x) in zip(padded, moves, strict=True)])


def initialise(model: DAT) -> None:
    """Truncated normal weights of 0.02, offsets and tables near 0, depthwise additions at 0."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=1e-3 if name.endswith(".pointwise") else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.trunc_normal_(parameter, std=0.02)


def accuracy(model: DAT, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    with torch.inference_mode():
        parts = [model(three_channels(part)).argmax(dim=1) for part in images.split(500)]  # type: ignore[union-attr]
    model.train()
    return float((torch.cat(parts) == labels).float().mean()) * 100


def train(folder: Path, output: Path, log_path: Path, epochs: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)  # late in training they make an epoch many times as long
    lines = []

    def log(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        log_path.write_text("\n".join(lines) + "\n")

    pictures, classes = load(folder, "train")
    images, labels = network_inputs(pictures), torch.from_numpy(classes)
    held_out = images[-HELD_OUT:], labels[-HELD_OUT:]
    images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    model = DAT(VARIANT)
    initialise(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log(f"demo, {parameters} parameters; torch {torch.__version__}, Python {platform.python_version()}, seed {seed}")
    log(f"{len(images)} pictures to train on, {HELD_OUT} held out; batch {batch}, {epochs} epochs")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.15)
    start = time.monotonic()
    for epoch in range(epochs):
        losses = []
        for chosen in torch.randperm(len(images))[: steps // epochs * batch].split(batch):
            logits = model(three_channels(augmented(images[chosen])))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss))
        top1 = accuracy(model, *held_out)
        minutes = (time.monotonic() - start) / 60
        log(f"epoch {epoch + 1:2}: loss {np.mean(losses):.4f}, held out {top1:.2f}%, {minutes:.1f} min")
    save_checkpoint(model, output, force=True)
    pictures, classes = load(folder, "test")
    saved = load_model(VARIANT, output)
    top1 = accuracy(saved, network_inputs(pictures), torch.from_numpy(classes))
    log(f"test: {top1:.2f}% of {len(pictures)}; {output.name}, {output.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST's four .gz files")
    parser.add_argument("--output", type=Path, default=Path("dat_deploy/data/demo.safetensors"))
    parser.add_argument("--log", type=Path, default=Path("training/demo.log"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.data, arguments.output, arguments.log, arguments.epochs, arguments.batch, arguments.seed)
