"""A network that augments what it is trained on, where it is trained: on the GPU, if there is one."""

from typing import Any

import tensorflow as tf
import tf_keras as keras

from fracture.dataset.augment import augment


class AugmentingModel(keras.Model):
    """`fit` takes what `training_batches` yields; `evaluate` and `predict` see images as they are."""

    def train_step(self, data: Any) -> dict[str, Any]:
        drawn, labels, weights = data
        return super().train_step((self.augmented(*drawn), labels, weights))

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> dict[str, Any]:
        """Counts alone: results in each step would add up every variable of every metric over the workers."""
        self.compiled_metrics.update_state(y, y_pred, sample_weight)
        return {}

    def augmented(self, images: tf.Tensor, transforms: tf.Tensor, exposures: tf.Tensor) -> tf.Tensor:
        return augment(images, transforms, exposures)


class MirroringModel(AugmentingModel):
    """`fit` takes features of images and of their mirror images, and goes by what was drawn: the one or the other."""

    def augmented(self, features: tf.Tensor, transforms: tf.Tensor, exposures: tf.Tensor) -> tf.Tensor:
        """[N, F] of [N, 1 or 2, F]."""
        mirrored = tf.cast(transforms[:, 0] < 0, tf.int32)
        return tf.gather(features, mirrored, axis=1, batch_dims=1)
