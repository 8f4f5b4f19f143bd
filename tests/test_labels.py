from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL


def test_fracture_is_the_positive_class():
    assert (FRACTURE, NORMAL) == (1, 0)
    assert CLASS_NAMES[FRACTURE] == "fracture"
