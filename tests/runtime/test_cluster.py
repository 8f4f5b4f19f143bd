"""What the workers of a Ray are given, so that they find the package."""

import pytest

from fracture.runtime.cluster import runtime_environment
from tests.conftest import ROOT

VARIABLES = {"TF_CPP_MIN_LOG_LEVEL": "3"}


@pytest.mark.parametrize(
    ("submitted", "joining", "others"),
    [
        pytest.param(False, False, {}, id="a Ray on this machine"),
        pytest.param(
            False, True, {"py_modules": [str(ROOT / "fracture")], "excludes": ["__pycache__"]}, id="RAY_ADDRESS"
        ),
        pytest.param(True, False, {}, id="ray job submit"),
        pytest.param(True, True, {}, id="ray job submit, which sets RAY_ADDRESS"),
    ],
)
def test_workers_find_the_package_and_no_more_than_it_is_sent(submitted: bool, joining: bool, others: dict):
    environment = runtime_environment(VARIABLES, submitted, joining)
    local = {} if submitted or joining else {"PYTHONPATH": str(ROOT)}
    assert environment == {"env_vars": VARIABLES | local, **others}


def test_the_package_that_is_sent_holds_its_templates_and_recipes():
    package = ROOT / "fracture"
    assert (package / "templates/report.html").is_file()
    assert (package / "configs/default.yaml").is_file()
