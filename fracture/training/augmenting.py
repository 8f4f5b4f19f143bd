"""Networks that augment their training batches on the device that trains them."""

from typing import Any

import tensorflow as tf
import tf_keras as keras

from fracture.dataset.augment import augment


class AugmentingModel(keras.Model):
    """A model whose `fit` takes what `training_batches` yields; `evaluate` and `predict` take images unchanged."""

    def train_step(self, data: Any) -> dict[str, Any]:
        inputs, labels, weights = data
        return super().train_step((self.augmented(*inputs), labels, weights))

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> dict[str, Any]:
        """Update the metrics without their results, which would sum every variable over the workers in each step."""
        self.compiled_metrics.update_state(y, y_pred, sample_weight)
        return {}

    def augmented(self, images: tf.Tensor, transforms: tf.Tensor, exposures: tf.Tensor) -> tf.Tensor:
        """Return the batch as the network is trained on it."""
        return augment(images, transforms, exposures)


class MirroringModel(AugmentingModel):
    """A model of frozen features: `fit` takes those of each image and its mirror image, and trains on one of them."""

    def augmented(self, features: tf.Tensor, transforms: tf.Tensor, exposures: tf.Tensor) -> tf.Tensor:
        """Choose the features [N, F] of the image or its mirror image from [N, 1 or 2, F]."""
        mirrored = tf.cast(transforms[:, 0] < 0, tf.int32)
        return tf.gather(features, mirrored, axis=1, batch_dims=1)
