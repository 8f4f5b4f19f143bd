"""The TensorBoard events of a run."""

import tempfile
from pathlib import Path

from fracture.storage import StoragePath


class TensorBoardLog:
    """Writes TensorBoard's events locally and copies them to the run, which may be in a bucket."""

    def __init__(self, folder: StoragePath, history: list[dict[str, float]]) -> None:
        from tensorboardX import SummaryWriter

        folder.delete()
        self._target = folder
        self._folder = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name)
        for record in history:
            self._write(record)

    def add(self, record: dict[str, float]) -> None:
        self._write(record)
        self._writer.flush()
        self._target.upload(Path(self._folder.name))

    def _write(self, record: dict[str, float]) -> None:
        for name, value in record.items():
            metric, split = (name[4:], "validation") if name.startswith("val_") else (name, "training")
            if name != "epoch":
                self._writer.add_scalar(f"{metric}/{split}", value, int(record["epoch"]))
