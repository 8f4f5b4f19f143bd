import pytest

from fracture.config import SampleConfig
from fracture.preparation.sample import draw_sample


@pytest.fixture(scope="session")
def sample_images() -> dict[str, bytes]:
    """Generated radiographs of 40 patients, three views each: path -> content of the file."""
    return dict(draw_sample(SampleConfig(images=120)))
