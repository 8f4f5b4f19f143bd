"""PyTorch on one GPU: the same network and augmentation, channels-last, bfloat16, data on the card.

  python tests/benchmarks/peers/torch_gpu.py SIZE BATCH SECONDS eager|compiled

Imports nothing of this project, so that it runs where PyTorch is.
"""

import json
import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional

FILTERS = (64, 128, 256, 512)
IMAGES = 2048
WARM_UP = 5  # steps
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, filters in zip((1, *FILTERS), FILTERS, strict=False):
        layers += [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(filters), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FILTERS[-1], 256), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, *head, nn.Linear(256, 1))


def augment(images: torch.Tensor) -> torch.Tensor:
    """Mirror, turn, zoom and shift [N, 1, H, W] uint8 by one affine transform, then change the exposure."""
    count = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(count, device=images.device).uniform_(low, high)

    angle = uniform(-math.pi / 9, math.pi / 9)
    x, y = torch.sign(uniform(-1, 1)) / uniform(0.75, 1.25), 1 / uniform(0.75, 1.25)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([x * cos, -x * sin, uniform(-0.2, 0.2)], 1),
        torch.stack([y * sin, y * cos, uniform(-0.2, 0.2)], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images.float(), grid, align_corners=False)
    contrast, brightness = uniform(0.7, 1.3), uniform(-38, 38)
    return ((moved - 127.5) * contrast[:, None, None, None] + 127.5 + brightness[:, None, None, None]).clamp(0, 255)


def main(size: int, batch: int, seconds: float, mode: str) -> float:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    images = torch.randint(0, 256, (IMAGES, 1, size, size), dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(0, 2, (IMAGES, 1), device=DEVICE).float()
    model = network().to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def forward(rows: torch.Tensor) -> torch.Tensor:
        pixels = ((augment(images[rows]) - 60) / 50).to(memory_format=torch.channels_last)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(pixels)
        return functional.binary_cross_entropy_with_logits(logits.float(), labels[rows])

    loss_of = torch.compile(forward) if mode == "compiled" else forward

    def step() -> None:
        loss = loss_of(torch.randint(0, IMAGES, (batch,), device=DEVICE))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def synchronise() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        step()
    synchronise()
    started, steps = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        for _ in range(4):
            step()
        synchronise()
        steps += 4
    return steps * batch / (time.monotonic() - started)


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])))
