from collections.abc import Callable
from math import cos, pi, sin
from pathlib import Path

import keras
import numpy as np
import pennylane as qml
import pytest
import tensorflow as tf
from pennylane import numpy as differentiable

from fracture.config import circuit_bytes, load_config
from fracture.errors import UsageError
from fracture.models import build_model
from fracture.models.quantum import Circuit, ClassicalRing, circuit

KINDS = pytest.mark.parametrize("kind", [Circuit, ClassicalRing])


def circuit_of(weights: np.ndarray) -> Circuit:
    """In float64, with these weights."""
    layer = Circuit(weights.shape[1], weights.shape[0], dtype="float64")
    layer(np.zeros((1, weights.shape[1])))
    layer.set_weights([weights])
    return layer


def drawn(qubits: int, layers: int, images: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([qubits, layers])
    return generator.uniform(-1, 1, (images, qubits)), generator.uniform(0, 2 * pi, (layers, qubits, 3))


def of_pennylane(qubits: int) -> Callable[..., np.ndarray]:
    """The circuit as PennyLane's own templates give it: inputs [N, qubits] and weights to <Z> [N, qubits]."""

    @qml.qnode(qml.device("default.qubit", wires=qubits), diff_method="backprop")
    def node(inputs: np.ndarray, weights: np.ndarray) -> list:
        qml.AngleEmbedding(inputs * pi / 2, range(qubits), rotation="Y")
        qml.StronglyEntanglingLayers(weights, range(qubits))
        return [qml.expval(qml.PauliZ(qubit)) for qubit in range(qubits)]

    return lambda inputs, weights: differentiable.stack(node(inputs, weights), axis=1)


@pytest.mark.parametrize(("qubits", "layers"), [(1, 2), (2, 2), (3, 3), (4, 4), (5, 2), (6, 1), (8, 3)])
def test_values_and_gradients_are_those_of_pennylane(qubits: int, layers: int):
    inputs, weights = drawn(qubits, layers)
    theirs, mix = of_pennylane(qubits), np.arange(1, qubits + 1) / qubits
    layer = circuit_of(weights)
    with tf.GradientTape() as tape:
        images = tf.constant(inputs)
        tape.watch(images)
        values = layer(images)
        mixed = tf.reduce_sum(values * mix)
    ours = tape.gradient(mixed, [images, layer.trainable_variables[0]])
    arrays = differentiable.array(inputs), differentiable.array(weights)
    assert values.numpy() == pytest.approx(np.array(theirs(*arrays)), abs=1e-10)
    for our, their in zip(ours, qml.grad(lambda x, w: (theirs(x, w) * mix).sum())(*arrays), strict=True):
        assert our.numpy() == pytest.approx(np.array(their), abs=1e-10)


def outputs(weights: np.ndarray, *inputs: list[float]) -> np.ndarray:
    return circuit_of(weights)(np.array(inputs)).numpy()


def test_one_qubit_is_a_cosine():
    inputs = [-1.0], [0.0], [1 / 3], [1.0]
    assert outputs(np.zeros((1, 1, 3)), *inputs)[:, 0] == pytest.approx([0, 1, cos(pi / 6), 0], abs=1e-12)
    turned = np.array([[[0.0, pi / 2, 0.0]]])
    assert outputs(turned, *inputs)[:, 0] == pytest.approx([1, 0, -sin(pi / 6), -1], abs=1e-12)


def test_a_cnot_each_way_on_two_qubits():
    # cos |00> + sin |10>: by the first CNOT the pair cos |00> + sin |11>, by the second cos |00> + sin |01>.
    assert outputs(np.zeros((1, 2, 3)), [1 / 3, 0.0])[0] == pytest.approx([1, cos(pi / 6)], abs=1e-12)
    # By the first, Z of the second qubit is the product of both; by the second, Z of the first is the second's before.
    assert outputs(np.zeros((1, 2, 3)), [1 / 3, 2 / 3])[0] == pytest.approx(
        [cos(pi / 3), cos(pi / 6) * cos(pi / 3)], abs=1e-12
    )


def test_three_qubits_are_joined_further_away_in_the_second_layer():
    # |100>: 0->1 and 1->2 make |111>, 2->0 makes |011>; then with a reach of 2, 0->2, 1->0 and 2->1: |101>.
    flipped = np.zeros((2, 3, 3))
    flipped[0, 0, 1] = pi
    assert outputs(flipped[:1], [0.0, 0.0, 0.0])[0] == pytest.approx([1, -1, -1], abs=1e-12)
    assert outputs(flipped, [0.0, 0.0, 0.0])[0] == pytest.approx([-1, 1, -1], abs=1e-12)


def test_the_control_by_hand():
    layer = ClassicalRing(3, 2, dtype="float64")
    x = np.array([[0.5, -0.25, 1.0]])
    layer(x)
    own, other, bias = np.array([1.0, 2.0, -1.0]), np.array([0.5, 0.0, 1.0]), np.array([0.0, 0.1, -0.2])
    layer.set_weights([np.stack([np.stack([own, other, bias], 1)] * 2)])
    first = np.tanh([0.5 - 0.125, -0.5 + 0.1, -1.0 + 0.5 - 0.2])
    second = np.tanh(own * first + other * first[[2, 0, 1]] + bias)
    assert layer(x).numpy()[0] == pytest.approx(second, abs=1e-12)


@KINDS
@pytest.mark.parametrize("qubits", [1, 2, 5])
def test_both_have_as_many_weights_and_stay_within_one(kind: type, qubits: int):
    layer = kind(qubits, 3)
    outputs = layer(np.random.default_rng(0).uniform(-1, 1, (50, qubits)))
    assert layer.count_params() == 3 * qubits * 3
    assert outputs.shape == (50, qubits)
    assert np.abs(outputs).max() <= 1 + 1e-6


@KINDS
def test_a_batch_of_any_size_is_its_rows(kind: type):
    layer = kind(3, 2)
    whole = tf.function(layer, input_signature=[tf.TensorSpec([None, 3])])
    inputs = drawn(3, 2, images=5)[0].astype(np.float32)
    rows = np.concatenate([layer(row[None]) for row in inputs])
    assert whole(inputs).numpy() == pytest.approx(rows, abs=1e-6)
    assert whole(inputs[:0]).shape == (0, 3)


@KINDS
def test_a_seed_repeats_the_weights(kind: type):
    def weights(seed: int) -> np.ndarray:
        keras.utils.set_random_seed(seed)
        layer = kind(4, 2)
        layer.build((None, 4))
        return layer.get_weights()[0]

    assert np.array_equal(weights(1), weights(1))
    assert not np.array_equal(weights(1), weights(2))


@KINDS
def test_another_width_than_the_qubits(kind: type):
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 4"):
        kind(4, 1)(np.zeros((2, 3)))


def head_of(*assignments: str) -> keras.Model:
    features = keras.layers.Input((6,), name="features")
    mapped = circuit(features, load_config(None, [*assignments]))
    return keras.Model(features, keras.layers.Dense(1, name="logit")(mapped))


@pytest.mark.parametrize(("circuit", "kind"), [("quantum", Circuit), ("classical", ClassicalRing)])
def test_float32_in_mixed_precision(circuit: str, kind: type):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = head_of(f"quantum.circuit={circuit}")
        assert model(np.zeros((2, 6))).dtype == tf.bfloat16
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.get_layer("circuit"), kind)
    assert model.get_layer("circuit").output.dtype == "float32"
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert model.count_params() == (6 + 1) * 4 + 3 * 4 * 3 + 4 + 1


@pytest.mark.parametrize("circuit", ["quantum", "classical"])
def test_saved_and_loaded(circuit: str, tmp_path: Path):
    model, features = head_of(f"quantum.circuit={circuit}"), np.random.default_rng(0).normal(size=(3, 6))
    features = features.astype(np.float32)
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "saved")
    expected = model(features).numpy()
    assert np.array_equal(keras.models.load_model(tmp_path / "model.keras")(features), expected)
    assert tf.saved_model.load(tmp_path / "saved").serve(features).numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("circuit", ["quantum", "classical"])
def test_it_is_trained_under_a_strategy(circuit: str):
    keras.utils.set_random_seed(0)
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = head_of(f"quantum.circuit={circuit}", "quantum.qubits=2", "quantum.layers=2")
        model.compile(keras.optimizers.Adam(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    features = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    labels = (features[:, 0] > features[:, 1]).astype(np.float32)
    losses = model.fit(features, labels, 32, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]


def test_xla_gives_the_same_gradient():
    layer, inputs = Circuit(2, 1), tf.constant([[0.3, -0.6]])
    layer(inputs)

    def slope() -> tf.Tensor:
        with tf.GradientTape() as tape:
            mixed = tf.reduce_sum(layer(inputs) * [1.0, 2.0])
        return tape.gradient(mixed, layer.trainable_variables[0])

    assert tf.function(slope, jit_compile=True)().numpy() == pytest.approx(slope().numpy(), abs=1e-6)


def test_more_qubits_than_memory_holds():
    of_two_workers = (
        r"30 qubits in 2 layers take 8,448.0 GB for a worker's 16 images of a step, over the limit of 2; use fewer$"
    )
    with pytest.raises(UsageError, match=f"quantum.qubits: {of_two_workers}"):
        load_config(None, ["model.name=qnn", "quantum.qubits=30", "quantum.layers=2"])
    load_config(None, ["model.name=qnn", "quantum.qubits=18"])
    with pytest.raises(
        UsageError, match=r"18 qubits in 3 layers take 3.9 GB for a worker's 32 images .* or a smaller training.b"
    ):
        load_config(None, ["model.name=qnn_transfer", "quantum.qubits=18", "compute.workers=1"])
    with pytest.raises(UsageError, match=r"'quantum.qubits' = 65 is not possible: .* less than or equal to 64"):
        load_config(None, ["quantum.qubits=65"])
    load_config(None, ["model.name=qnn", "quantum.qubits=30", "quantum.layers=2", "quantum.circuit=classical"])
    load_config(None, ["quantum.qubits=30"])


def test_bytes_of_a_circuit():
    assert circuit_bytes(qubits=1, layers=1) == 16 * (3 + 2)
    assert circuit_bytes(qubits=8, layers=3) == 2048 * (3 * 10 + 2) == 65536


@pytest.mark.parametrize("name", ["qnn", "qnn_transfer"])
def test_circuit_and_control_stand_in_networks_of_as_many_parameters(name: str):
    settings = [f"model.name={name}", "data.image_size=32", "model.filters=[4,8]"]
    of_kind = {
        kind: build_model(load_config(None, [*settings, f"quantum.circuit={kind}"]), 0.0, 1.0)
        for kind in ("quantum", "classical")
    }
    kinds = {kind: type(model.get_layer("circuit")).__name__ for kind, model in of_kind.items()}
    assert kinds == {"quantum": "Circuit", "classical": "ClassicalRing"}
    assert of_kind["quantum"].count_params() == of_kind["classical"].count_params()
    assert [layer.name for layer in of_kind["quantum"].layers][-4:] == ["bottleneck", "circuit", "logit", "probability"]
