import keras
import pytest

from fracture.errors import RunError
from fracture.training.device_memory import bytes_per_image, explain_exhausted, suggest_batch_size


@pytest.fixture
def network() -> keras.Model:
    """Two layers of 1,000 float32 numbers: 16,000 bytes an image, each of them twice."""
    images = keras.Input((1000,))
    return keras.Model(images, keras.layers.ReLU()(images))


def test_a_step_needs_two_copies_of_each_output(network):
    assert bytes_per_image(network) == 16_000


@pytest.mark.parametrize(
    ("batch_size", "workers", "memory", "fits"),
    [
        (64, 1, 20 * 16_000, 16),  # 20 images fit
        (64, 2, 20 * 16_000, 32),  # on each of two
        (64, 1, 10**12, 32),  # the estimate says that it all fits, and it did not
        (64, 1, 0, 32),  # nobody knows the memory
        (64, 1, 100, 0),
        (2, 2, 0, 0),  # less than one image a worker
    ],
)
def test_the_largest_half_quarter_or_eighth_that_fits(network, batch_size: int, workers: int, memory: int, fits: int):
    assert suggest_batch_size(network, batch_size, workers, memory) == fits


def test_the_error_names_the_batch_and_one_that_fits(network, tiny_config):
    config = tiny_config("training.batch_size=64", "compute.workers=2", "compute.gpu=true")
    with pytest.raises(
        RunError,
        match=r"^the memory of a worker's GPU does not hold its part of a batch, 32 images of training.batch_size = "
        r"64\. Train anew with --set training.batch_size=32, under another --run name; or use more workers$",
    ):
        raise explain_exhausted(config, network, 20 * 16_000)
    assert "Train anew with smaller images, under another --run name" in str(explain_exhausted(config, network, 100))
