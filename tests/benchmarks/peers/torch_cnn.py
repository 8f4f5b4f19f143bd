"""Peer (b): PyTorch, channels-last, bfloat16 autocast, the same network, a DataLoader over the same files.

  .venv-torch/bin/python tests/benchmarks/peers/torch_cnn.py DIR SIZE EPOCHS reference|ours eager|compiled

Runs in a virtual environment of its own, so it imports nothing of this project.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

FILTERS = (64, 128, 256, 512)


class Radiographs(Dataset):
    def __init__(self, folder: Path, size: int) -> None:
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        file = self.files[number]
        image = Image.open(file).convert("L").resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(
            image.transform(image.size, Image.Transform.AFFINE, self._drawn(), Image.Resampling.BILINEAR)
        )
        return torch.from_numpy(pixels[None].astype(np.float32) / 255), torch.tensor(
            [float(file.parent.name.startswith("fract"))]
        )

    def _drawn(self) -> tuple[float, ...]:
        """Flips, a rotation by up to 36° and a zoom by up to 10 %, as one affine transform about the centre."""
        angle = math.radians(random.uniform(-36, 36))
        a, b = (random.choice((-1, 1)) / random.uniform(0.9, 1.1) for _ in range(2))
        cos, sin, centre = math.cos(angle), math.sin(angle), self.size / 2
        matrix = (a * cos, -a * sin, b * sin, b * cos)
        shift_x = centre * (1 - matrix[0] - matrix[1])
        shift_y = centre * (1 - matrix[2] - matrix[3])
        return matrix[0], matrix[1], shift_x, matrix[2], matrix[3], shift_y


def network(size: int, order: str) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for filters in FILTERS:
        convolution = nn.Conv2d(channels, filters, 3, padding=1, bias=order == "reference")
        rest = {
            "reference": [nn.ReLU(), nn.BatchNorm2d(filters), nn.MaxPool2d(2)],
            "ours": [nn.MaxPool2d(2), nn.BatchNorm2d(filters), nn.ReLU()],
        }[order]
        layers += [convolution, *rest]
        channels = filters
    flat = FILTERS[-1] * (size // 2 ** len(FILTERS)) ** 2
    head = [nn.Flatten()] if order == "reference" else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    width = flat if order == "reference" else FILTERS[-1]
    return nn.Sequential(*layers, *head, nn.Linear(width, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 1))


def main(folder: str, size: int, epochs: int, order: str, mode: str) -> float:
    torch.manual_seed(0)
    data = Radiographs(Path(folder) / "train", size)
    loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=2, persistent_workers=True)
    model = network(size, order).to(memory_format=torch.channels_last)
    step_of = torch.compile(model) if mode == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    criterion = nn.BCEWithLogitsLoss()
    for _ in range(epochs):
        started = time.monotonic()
        for images, labels in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(step_of(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return len(data) / (time.monotonic() - started)


if __name__ == "__main__":
    speed = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
    print(json.dumps(speed))
