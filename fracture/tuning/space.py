"""A search for better settings: the settings of its trials, their results, and the best of them as a file.

Trials are compared on validation alone; none is tried on test. `trials.py` runs them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import yaml

from fracture.config import Config, flatten, with_settings
from fracture.dataset.format import Dataset, Manifest
from fracture.errors import RunError, UsageError
from fracture.progress.history import Record, find_best
from fracture.progress.status import LOCK
from fracture.storage import StoragePath
from fracture.training.checks import check_data
from fracture.training.phases import count_epochs

RESULTS = "trials.json"
BEST = "best.yaml"
_SECTIONS = ("model", "training", "augment", "transfer", "quantum")
_FIXED = {
    "training.epochs": "all trials train as long; set training.epochs itself",
    "transfer.head_epochs": "all trials train as long; set transfer.head_epochs itself",
    "transfer.unfreeze": "all trials train as long; search once with it and once without",
    "transfer.weights": "all trials begin alike; search once with each",
    "quantum.backbone": "all trials begin alike; search once with each",
    "model.name": "it is not tuned, but compared: job/compare.py",
    "training.seed": "a lucky seed is no better setting",
    "training.sampling": "it says what counts in the validation loss, by which trials are compared",
}


@dataclass(frozen=True)
class Result:
    """The result of a trial, at its best epoch."""

    trial: int  # from 1
    settings: dict[str, Any]
    state: Literal["ended", "stopped early", "diverged"]
    epochs: int  # done
    best_epoch: int | None = None  # None, as the figures: it diverged in its first epoch
    val_loss: float | None = None
    val_auc: float | None = None  # per image

    @classmethod
    def from_history(cls, trial: int, settings: dict[str, Any], state: Any, history: list[Record]) -> "Result":
        """Make the result of a trial's metrics log."""
        if not history:
            return cls(trial, settings, state, 0)
        best = find_best(history)
        return cls(trial, settings, state, len(history), int(best["epoch"]), best["val_loss"], best["val_auc"])


def check_space(config: Config) -> None:
    """Try the ends of each range, and each choice, on the settings.

    Raises:
        UsageError: a setting that no search may sample, or a value that it cannot have.
    """
    tune = config.tune
    if tune.grace_epochs > count_epochs(config):
        raise UsageError(
            f"tune.grace_epochs = {tune.grace_epochs} is more than the {count_epochs(config)} epochs of a training. "
            "Use fewer, or train longer."
        )
    for key, distribution in tune.space.items():
        section, _, name = key.partition(".")
        if section not in _SECTIONS or not name:
            raise UsageError(f"tune.space: {key!r} cannot be searched; settings of {', '.join(_SECTIONS)} can.")
        if key in _FIXED:
            raise UsageError(f"tune.space: {key!r} cannot be searched: {_FIXED[key]}.")
        for value in next(iter(distribution.values())):
            try:
                with_settings(config, {key: value})
            except UsageError as error:
                raise UsageError(f"tune.space: {error}") from None
    if tune.space.keys() <= config.without_effect:
        raise UsageError(
            f"tune.space has nothing that has an effect on {config.model.name}: name settings and what to sample them "
            "from."
        )


def sample_trials(config: Config) -> list[dict[str, Any]]:
    """Return the settings of each trial: the first as they are, each other sampled from training.seed and its number.

    A setting without effect on this model stays as it is.
    """
    tree = dict(flatten(config.model_dump(mode="json")))
    keys = sorted(config.tune.space.keys() - config.without_effect)
    as_they_are = {key: tree[key] for key in keys}
    return [as_they_are, *(_sample_trial(config, keys, number) for number in range(2, config.tune.trials + 1))]


def _sample_trial(config: Config, keys: Sequence[str], number: int) -> dict[str, Any]:
    generator = np.random.default_rng([config.training.seed, number])
    return {key: _sample(config.tune.space[key], generator) for key in keys}


def _sample(distribution: Mapping[str, list[Any]], generator: np.random.Generator) -> Any:
    ((kind, values),) = distribution.items()
    if kind == "choice":
        return values[generator.integers(len(values))]
    least, most = values
    value = generator.uniform(least, most) if kind == "uniform" else np.exp(generator.uniform(*np.log(values)))
    return min(max(float(f"{value:.3g}"), least), most)  # as it is shown, so that it can be typed again


def check_trials(config: Config, dataset: Dataset) -> None:
    """Check the settings of each trial as a whole.

    Raises:
        UsageError: settings that are possible one by one are not possible together, or on this data.
    """
    for number, settings in enumerate(sample_trials(config), 1):
        try:
            check_data(with_settings(config, settings), dataset)
        except UsageError as error:
            raise UsageError(f"tune.space, trial {number} ({describe_settings(settings)}): {error}") from None


def trial_run(run: StoragePath, number: int) -> StoragePath:
    """Return the folder of a trial's run."""
    return run / f"trial-{number:05d}"


def read_results(run: StoragePath, config: Config, manifest: Manifest) -> dict[int, Result]:
    """Return the results of the trials that are done, by number.

    Raises:
        UsageError: the search was started with other settings or data, or the folder holds something else.
    """
    if not (run / RESULTS).is_file():
        if any(not info.base_name.endswith(".part") and f"/{LOCK}/" not in info.path for info in run.files()):
            raise UsageError(f"{run} holds other things than a search. Give another --run name.")
        return {}
    saved = (run / RESULTS).read_json()
    # A setting that the version before did not have is as it was then: the default.
    before = dict(flatten(Config().recipe())) | dict(flatten(saved["settings"]))
    now = dict(flatten(_settings(config)))
    changed = [f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in before | now if before.get(k) != now.get(k)]
    if changed:
        raise UsageError(
            f"search {run.name!r} was started with other settings: {'; '.join(changed)}. "
            "Give the same settings to go on with it, or another --run name."
        )
    if saved["dataset"] != manifest.fingerprint:
        raise UsageError(f"search {run.name!r} was started with other data. Give another --run name.")
    return {result["trial"]: Result(**result) for result in saved["trials"]}


def write_results(run: StoragePath, config: Config, manifest: Manifest, results: Mapping[int, Result]) -> None:
    trials = [asdict(results[number]) for number in sorted(results)]
    (run / RESULTS).write_json({"dataset": manifest.fingerprint, "settings": _settings(config), "trials": trials})


def _settings(config: Config) -> dict[str, Any]:
    """Return all that the trials follow from; not how many there are, nor how many at a time."""
    return config.recipe() | {"tune": config.tune.model_dump(mode="json", exclude={"trials", "concurrent"})}


def find_best_trial(results: Sequence[Result]) -> Result:
    """Return the result with the lowest validation loss.

    Raises:
        RunError: every trial diverged.
    """
    sound = [result for result in results if result.state != "diverged"]  # else the recipe would diverge again
    if not sound:
        raise RunError("the loss of every trial diverged. Lower the learning rates in tune.space")
    return min(sound, key=lambda result: result.val_loss)


def write_best(run: StoragePath, config: Config, results: Sequence[Result]) -> None:
    """Write the best trial's settings for `--config`: those of the space, and others that differ from the defaults.

    Raises:
        RunError: there is no best trial.
    """
    best = find_best_trial(results)
    recipe = dict(flatten(with_settings(config, best.settings).recipe()))
    defaults = dict(flatten(Config().recipe()))
    tree: dict[str, dict[str, Any]] = {}
    for key, value in recipe.items():
        if key in best.settings or value != defaults[key]:
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
    about = (
        f"# Trial {best.trial} of the search {run.name}: validation loss {best.val_loss:.4f} after epoch "
        f"{best.best_epoch}.\n# Chosen among {len(results)} trials by that very loss, which is therefore optimistic.\n"
    )
    (run / BEST).write_bytes((about + yaml.safe_dump(tree, sort_keys=False)).encode())


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Return a trial's settings as one line."""
    return ", ".join(f"{_name(key)} {_text(value)}" for key, value in settings.items())


def table_lines(results: Sequence[Result]) -> list[str]:
    """Return the trials as lines of a table, the lowest validation loss marked.

    They are not wrapped to 80 columns, as `rich` does in a pipe: a log is read and searched by lines.
    """
    best = find_best_trial(results)
    keys = sorted(results[0].settings)
    rows = [["trial", "epochs", "val loss", "", "val AUC", *map(_name, keys), ""]]
    for result in results:
        figures = [_figure(result.val_loss), "*" if result == best else "", _figure(result.val_auc)]
        settings = [_text(result.settings[key]) for key in keys]
        state = "" if result.state == "ended" else result.state
        rows.append([str(result.trial), str(result.epochs), *figures, *settings, state])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]


def _name(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
