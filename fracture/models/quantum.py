"""A variational quantum circuit, and the classical map of as many parameters that it is compared with."""

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from fracture.config import Config
from fracture.models.cnn import FEATURES, blocks, dropout, probability


def build(config: Config, pixel_mean: float, pixel_std: float, step: Callable[[], tf.Tensor] | None) -> keras.Model:
    """Build the CNN's blocks, pooled, with a circuit in place of dense layers; see `build_model`."""
    images, x = blocks(config, pixel_mean, pixel_std, step)
    x = dropout(keras.layers.GlobalAveragePooling2D(name=FEATURES)(x), config, step)
    return keras.Model(images, probability(circuit(x, config)), name="qnn")


def circuit(features: tf.Tensor, config: Config) -> tf.Tensor:
    """Map features [N, F] through a bottleneck and the circuit, or its control, to [N, qubits] float32 in [-1, 1]."""
    quantum = config.quantum
    kind = Circuit if quantum.circuit == "quantum" else ClassicalRing
    # In float32: bfloat16 has steps of 0.004 at 1.
    x = keras.layers.Dense(quantum.qubits, activation="tanh", dtype="float32", name="bottleneck")(features)
    return kind(quantum.qubits, quantum.layers, name="circuit")(x)


class _RingMap(keras.layers.Layer):
    """A map of [N, qubits] in [-1, 1] to the same: layers with three weights a qubit, joined along a ring.

    It computes in float32 whatever the precision of the rest, unless it is given another dtype.
    """

    def __init__(self, qubits: int, depth: int, dtype: str = "float32", **others: object) -> None:
        super().__init__(dtype=dtype, **others)
        self.qubits, self.depth = qubits, depth
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: qubits})

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, object]:
        return super().get_config() | {"qubits": self.qubits, "depth": self.depth}

    def _add_weights(self, limit: float) -> keras.Variable:
        uniform = keras.initializers.RandomUniform(-limit, limit)
        return self.add_weight((self.depth, self.qubits, 3), uniform, name="weights")

    def _reach(self, layer: int) -> int:
        """Return how far along the ring this layer joins qubits: 1, 2, ... by turns, never a qubit with itself."""
        return layer % max(self.qubits - 1, 1) + 1


@keras.saving.register_keras_serializable(package="fracture")
class Circuit(_RingMap):
    """Angles embedded by RY, strongly entangling layers (https://arxiv.org/abs/1804.00633), then <Z> of each qubit.

    Simulated exactly: the state is [2**qubits, 2N], a row for each basis state, qubit 0 its highest bit, with the real
    parts for all images and then the imaginary ones, since few of the exported forms take complex numbers.
    """

    def build(self, input_shape: tf.TensorShape) -> None:
        # With smaller angles the outputs are almost even in the inputs: 0.2 of their variance depends on the sign, and
        # 0.8 with these. With angles over the whole circle they are flat: with 8 qubits in 3 layers their slope is
        # 0.02, and 0.11 with these.
        self._angles = self._add_weights(math.pi / 4)
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        signs = tf.constant(1 - 2 * _bits(self.qubits), self.compute_dtype)  # eigenvalues of each qubit's Z
        real = _embed(tf.transpose(inputs) * (math.pi / 2))
        state = tf.concat([real, tf.zeros_like(real)], axis=1)
        for layer in range(self.depth):
            phi, theta, omega = tf.unstack(self._angles[layer], axis=1)
            state = _rotate_z(state, signs, phi)
            state = _rotate_y(state, theta)
            state = _rotate_z(state, signs, omega)
            # A gather from something reshaped, or the sum of its gradient warns of the unknown batch size.
            state = tf.gather(tf.reshape(state, [2**self.qubits, -1]), _cnot_ring(self.qubits, self._reach(layer)))
        probabilities = tf.reduce_sum(tf.square(tf.reshape(state, [2**self.qubits, 2, -1])), axis=1)
        return tf.matmul(probabilities, signs, transpose_a=True)


@keras.saving.register_keras_serializable(package="fracture")
class ClassicalRing(_RingMap):
    """The control for the circuit: y[i] = tanh(a[i] x[i] + c[i] x[i + reach] + b[i]) in each layer."""

    def build(self, input_shape: tf.TensorShape) -> None:
        limit = math.sqrt(6 / (2 + 2))  # Glorot's, with two inputs and two outputs: proceedings.mlr.press/v9/glorot10a
        self._coefficients = self._add_weights(limit)
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        x = inputs
        for layer in range(self.depth):
            own, other, bias = tf.unstack(self._coefficients[layer], axis=1)
            reach = self._reach(layer) % self.qubits
            x = tf.tanh(own * x + other * tf.concat([x[:, reach:], x[:, :reach]], axis=1) + bias)
        return x


def _bits(qubits: int) -> np.ndarray:
    """Return the qubits' bits in each basis state: [2**qubits, qubits]."""
    return np.arange(2**qubits)[:, None] >> np.arange(qubits)[::-1] & 1


def _cnot_ring(qubits: int, reach: int) -> np.ndarray:
    """Return the state that each state's amplitude comes from in CNOTs from each qubit to the one `reach` further."""
    states, bits = np.arange(2**qubits, dtype=np.int32), _bits(qubits)
    source = states
    for control in range(qubits if qubits > 1 else 0):
        target = (control + reach) % qubits
        source = source[states ^ bits[:, control] << (qubits - 1 - target)]
    return source


def _embed(angles: tf.Tensor) -> tf.Tensor:
    """Rotate the qubits of |0...0> by RY of the angles [qubits, N]; return real amplitudes [2**qubits, N]."""
    qubits = angles.shape[0]
    pairs = tf.stack([tf.cos(angles / 2), tf.sin(angles / 2)], axis=1)
    state = pairs[0]
    for qubit in range(1, qubits):
        state = tf.reshape(state[:, None] * pairs[qubit], [2 ** (qubit + 1), -1])
    return state


def _rotate_z(state: tf.Tensor, signs: tf.Tensor, angles: tf.Tensor) -> tf.Tensor:
    """Apply RZ to all qubits at once, as a phase of each basis state; return [2**qubits, 2, N]."""
    half = tf.linalg.matvec(signs, angles / 2)[:, None]
    cos, sin = tf.cos(half), tf.sin(half)
    real, imaginary = tf.unstack(tf.reshape(state, [signs.shape[0], 2, -1]), axis=1)
    return tf.stack([cos * real + sin * imaginary, cos * imaginary - sin * real], axis=1)


def _rotate_y(state: tf.Tensor, angles: tf.Tensor) -> tf.Tensor:
    """Apply RY to each qubit. It is real, so the same for real and imaginary parts."""
    cos, sin = tf.cos(angles / 2), tf.sin(angles / 2)
    matrices = tf.reshape(tf.stack([cos, -sin, sin, cos], axis=1), [-1, 2, 2])
    for qubit in range(angles.shape[0]):
        state = tf.matmul(matrices[qubit], tf.reshape(state, [2**qubit, 2, -1]))
    return state
