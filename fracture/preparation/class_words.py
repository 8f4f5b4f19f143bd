"""Which words name a class: folders, values of a labels file, and names of boxes."""

import re
import unicodedata
from collections.abc import Iterable

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL

EXCLUDED = -1  # in place of a label: the user has named the word in data.excluded_labels

_FRACTURE_WORDS = (
    *("fracture", "fractured", "fractures", "with fracture", "broken", "positive", "fracture positive"),
    *("Fraktur", "Frakturen", "frakturiert", "mit Fraktur", "Bruch", "gebrochen", "positiv"),  # German, Nordic
    *("fracturé", "fracturée", "avec fracture", "positif", "fractura", "con fractura", "fracturado", "positivo"),
    *("frattura", "fratturato", "con frattura", "fratura", "com fratura", "fraturado", "fractuur", "gebroken"),
    *("brudd", "brud", "złamanie", "kırık", "перелом", "骨折", "골절"),
)
_NORMAL_WORDS = (
    *("normal", "not fractured", "not fracture", "non fractured", "non fracture", "no fracture", "without fracture"),
    *("unfractured", "healthy", "intact", "not broken", "negative", "fracture negative"),
    *("keine Fraktur", "ohne Fraktur", "nicht frakturiert", "kein Bruch", "unauffällig", "gesund", "negativ"),
    *("pas de fracture", "sans fracture", "non fracturé", "normale", "sain", "négatif", "sin fractura", "sano"),
    *("negativo", "senza frattura", "nessuna frattura", "sem fratura", "geen fractuur", "normaal", "ingen fraktur"),
    *("frisk", "bez złamania", "normalny", "kırık yok", "норма", "без перелома", "正常", "无骨折", "骨折なし", "정상"),
)
# Words that say something of a column "fracture", or of a folder beside its opposite.
_YES = ("yes", "ja", "oui", "sí", "si", "sì", "sim", "tak", "evet", "да")
_NO = ("no", "nein", "non", "não", "nee", "nej", "nei", "nie", "hayır", "нет")
# Of a labels file alone: what a folder called 0 or 1 holds is not guessed.
_VALUES = {FRACTURE: ("1", "1.0", "true", "t", "y", "j"), NORMAL: ("0", "0.0", "false", "f", "n")}
_PREFIX = re.compile(r"(?:study|class|label)?\s*\d+[.)]?\s+(?=\D)")  # `study1_positive`, `0 normal`


def normalise_word(text: str) -> str:
    """Return a word as words are compared: in one Unicode form and case, its separators as single spaces."""
    return re.sub(r"[\s_\-]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


class ClassWords:
    """The words that name a class: the known ones, in several languages, and those of the settings."""

    def __init__(self, config: DataConfig) -> None:
        """Raise UsageError where the settings give a word two meanings, or turn a known one round."""
        self._named: dict[str, int] = {}
        settings = (
            ("data.fracture_labels", FRACTURE, config.fracture_labels),
            ("data.normal_labels", NORMAL, config.normal_labels),
            ("data.excluded_labels", EXCLUDED, config.excluded_labels),
        )
        known = _known({FRACTURE: _FRACTURE_WORDS, NORMAL: _NORMAL_WORDS})
        for setting, label, words in settings:
            for word in map(normalise_word, words):
                earlier = self._named.get(word, label if label == EXCLUDED else known.get(word, label))
                if earlier != label:
                    raise UsageError(
                        f"{setting} names {word!r}, which is {_name(earlier)!r} already; it cannot also be "
                        f"{_name(label)!r}. Change data.fracture_labels, data.normal_labels or data.excluded_labels."
                    )
                self._named[word] = label
        self._of_folder = known | _known({FRACTURE: _YES, NORMAL: _NO}) | self._named
        self._of_value = self._of_folder | {**_known(_VALUES), **self._named}

    def of_folder(self, name: str) -> int | None:
        """Return the label that a folder's name means, `EXCLUDED`, or None for a name that means none.

        A prefix with a number is passed over: `study1_positive`, `0_normal`.
        """
        return self._find(self._of_folder, name)

    def of_value(self, text: str) -> int | None:
        """Return the label that a value of a labels file means, `EXCLUDED`, or None."""
        return self._find(self._of_value, text)

    def named(self, text: str) -> int | None:
        """Return the label that the settings alone give a word, as for boxes of objects; None where they do not."""
        return self._named.get(normalise_word(text))

    @staticmethod
    def _find(labels: dict[str, int], text: str) -> int | None:
        word = normalise_word(text)
        return labels[word] if word in labels else labels.get(_PREFIX.sub("", word, count=1))


def _known(words: dict[int, Iterable[str]]) -> dict[str, int]:
    return {normalise_word(word): label for label, listed in words.items() for word in listed}


def _name(label: int) -> str:
    return "excluded" if label == EXCLUDED else CLASS_NAMES[label]


KNOWN_WORDS = "'fracture', 'fractured', 'normal', 'not fractured', 'no fracture' and such in several languages"
