"""A network that augments what it is trained on, where it is trained: on the GPU, if there is one."""

from typing import Any

import tf_keras as keras

from fracture.input.augment import augment


class AugmentingModel(keras.Model):
    """`fit` takes what `training_batches` yields; `evaluate` and `predict` see images as they are."""

    def train_step(self, data: Any) -> dict[str, Any]:
        drawn, labels, weights = data
        return super().train_step((augment(*drawn), labels, weights))
