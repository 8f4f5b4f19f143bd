from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from fracture.runtime.trainer import ClusterSpec, Trainer


def test_what_a_controller_leaves_behind_is_cleaned_up_on_a_ray_that_others_use_too():
    def cleaners(alone: bool) -> int:
        callbacks = Trainer(print, alone=alone)._create_default_callbacks()
        return sum(isinstance(callback, PlacementGroupCleanerCallback) for callback in callbacks)

    assert cleaners(alone=False) == 1
    assert cleaners(alone=True) == 0


def test_the_workers_are_told_of_each_other_by_our_own_backend():
    assert isinstance(Trainer(print, alone=True).backend_config, ClusterSpec)
