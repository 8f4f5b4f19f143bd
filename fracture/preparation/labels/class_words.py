"""Which words name a class: folders, values of a labels file, and names of boxes."""

import json
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

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
_VALUES = {FRACTURE: ("1", "1.0", "true", "y", "j"), NORMAL: ("0", "0.0", "false", "n")}
_PREFIX = re.compile(r"(study|class|label)? ?(\d+)[.)]? (?=\D)")  # `study1_positive`, `0 normal`
_SIGNS = tuple("-–—−_+")  # `Fraktur -` and `-1` say something else than `Fraktur` and `1`
_MOST_CHARACTERS = 200  # of a known word with a number before it
# What may stand beside the word that names a class of boxes. Any other word may turn it round: `fracture ruled out`,
# `false positive`, `old fracture`.
_BESIDE = {
    *("elbow", "finger", "forearm", "arm", "humerus", "shoulder", "wrist", "hand", "hip", "knee", "ankle", "foot"),
    *("feet", "leg", "femur", "tibia", "fibula", "radius", "ulna", "clavicle", "rib", "spine", "skull", "pelvis"),
    *("bone", "distal", "proximal", "left", "right", "transverse", "oblique", "spiral", "comminuted", "greenstick"),
    *("avulsion", "hairline", "impacted", "longitudinal"),
    *("Ellenbogen", "Ellbogen", "Unterarm", "Unterarme", "Arm", "Arme", "Oberarm", "Schulter", "Schultern"),
    *("Handgelenk", "Handgelenke", "Hände", "Hüfte", "Hüften", "Knie", "Sprunggelenk", "Fuß", "Füße", "Bein", "Beine"),
    *("Oberschenkel", "Unterschenkel", "Speiche", "Elle", "Schlüsselbein", "Rippe", "Rippen", "Wirbelsäule"),
    *("Schädel", "Becken", "Knochen", "distale", "proximale", "links", "linke", "linker", "linkes", "rechts"),
    *("rechte", "rechter", "rechtes", "quer", "quere", "schräg", "schräge", "spiralförmig", "spiralförmige"),
    *("Grünholz", "Trümmer", "Abriss", "Haarriss", "impaktiert", "impaktierte", "längs"),
}
# A word of a folder's name that casts doubt on its class. No surname: `Zweifel` is one.
_DOUBT_WORDS = (
    *("uncertain", "unsure", "unclear", "doubtful", "doubt", "questionable", "equivocal", "indeterminate"),
    *("inconclusive", "borderline", "suspected", "suspicious", "possible", "maybe", "variant", "variants"),
    *("unsicher", "unklar", "fraglich", "zweifelhaft", "verdacht", "verdächtig", "möglich", "Normvariante"),
    *("Normvarianten", "Normalvariante", "Normalvarianten", "Variante", "Varianten"),
    *("incertain", "incertaine", "douteux", "douteuse", "suspect", "suspecte", "variante", "variantes", "dudoso"),
    *("dudosa", "incierto", "incierta", "sospecha", "incerto", "incerta", "dubbio", "dubbia", "sospetto", "duvidoso"),
    *("twijfel", "onzeker", "verdenking", "osäker", "usikker", "niepewny", "сомнительный", "неясно", "疑い", "可疑"),
)
_PLAIN = re.compile(r"\w([\w .\-]*\w)?")  # names that YAML reads as they are


def normalise_word(text: str) -> str:
    """Return a word as words are compared: in one Unicode form and case, its separators as single spaces."""
    return re.sub(r"[\s_\-]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _fold(text: str) -> str:
    """Return a word as class words are compared: a sign at its start or end is a part of it."""
    plain = unicodedata.normalize("NFKC", text).casefold().strip()
    return plain if plain.startswith(_SIGNS) or plain.endswith(_SIGNS) else normalise_word(plain)


class ClassWords:
    """The words that name a class: the known ones, in several languages, and those of the settings."""

    def __init__(self, config: DataConfig) -> None:
        """Raise UsageError where the settings give a word two meanings, or turn a known one round."""
        self._named: dict[str, int] = {}
        self._settings = {
            FRACTURE: ("data.fracture_labels", config.fracture_labels),
            NORMAL: ("data.normal_labels", config.normal_labels),
            EXCLUDED: ("data.excluded_labels", config.excluded_labels),
        }
        self._known = known = _known({FRACTURE: _FRACTURE_WORDS, NORMAL: _NORMAL_WORDS})
        for label, (setting, words) in self._settings.items():
            for word in map(_fold, words):
                earlier = self._named.get(word, label if label == EXCLUDED else known.get(word, label))
                if earlier != label:
                    raise UsageError(
                        f"{setting} names {word!r}, which is {_name(earlier)!r} already; it cannot also be "
                        f"{_name(label)!r}. Change data.fracture_labels, data.normal_labels or data.excluded_labels."
                    )
                self._named[word] = label
        self._beside = {f"{normalise_word(word)}{end}" for word in _BESIDE for end in ("", "s")}
        self._doubt = {*map(normalise_word, _DOUBT_WORDS)}
        self._of_folder = known | _known({FRACTURE: _YES, NORMAL: _NO}) | self._named
        self._of_value = self._of_folder | {**_known(_VALUES), **self._named}

    def of_folder(self, name: str) -> int | None:
        """Return the label that a folder's name means, `EXCLUDED`, or None for a name that means none.

        A number before a word is passed over: `study1_positive`, `02 normal`. A class's 0 is normal and its 1 is
        fracture: `0_fracture` means nothing that is certain.
        """
        return _find(self._of_folder, name, bare_number=True)

    def is_doubtful(self, name: str) -> bool:
        """Return whether a folder's name casts doubt on the class of what is in it, as `uncertain` does.

        A name that has a meaning, by the settings too, casts none.
        """
        return not self._doubt.isdisjoint(normalise_word(name).split(" ")) and self.of_folder(name) is None

    def is_set(self, name: str) -> bool:
        """Return whether the settings give a folder's name its meaning, so that it is nobody's surname."""
        return _find(self._named, name, bare_number=True) is not None

    def of_value(self, text: str) -> int | None:
        """Return the label that a value of a labels file means, `EXCLUDED`, or None.

        A bare number before a word may be a count, and `0 fractures` means nothing that is certain.
        """
        return _find(self._of_value, text)

    def nearest_value(self, text: str) -> str | None:
        """Return the known word that a value of a labels file looks most like; None if none is near."""
        return next(iter(get_close_matches(normalise_word(text), self._of_value, n=1)), None)

    def of_box(self, name: str) -> int | None:
        """Return the label that a class of boxes means: by its whole name, else by a known word beside anatomy.

        `elbow positive` and `distal forearm fracture` mean fracture, `wrist not fractured` is normal. `healed fracture`
        and `normal or fracture` mean nothing that is certain.
        """
        if (label := _find(self._of_folder, name)) is not None or len(name) > _MOST_CHARACTERS:
            return label
        parts = _fold(name).split(" ")
        others = [i for i, part in enumerate(parts) if part not in self._beside]
        return self._known.get(" ".join(parts[others[0] : others[-1] + 1])) if others else None

    def find_nearest(self, name: str) -> str | None:
        """Return the known word that a name is nearly: `fracture` for `fracure`."""
        return next(iter(get_close_matches(normalise_word(name), self._of_folder, n=1, cutoff=0.8)), None)

    def format_setting(self, label: int, *names: str) -> str:
        """Return what to type so that the names mean the label too, beside those that the settings have already.

        `--set 'data.fracture_labels=[crack, "a, b"]'`, quoted for YAML and for a shell.
        """
        setting, words = self._settings[label]
        listed = ", ".join(map(_quote, (*words, *names)))
        return f"--set {shlex.quote(f'{setting}=[{listed}]')}"

    def advise(self, names: Iterable[str], are_classes: bool = False) -> str:
        """Return the sentences that say how to name the classes of unknown words.

        Args:
            are_classes: two names are likely to be those of the two classes, as no other is known.
        """
        names = sorted({name for name in names if _can_be_typed(name)})
        if not names:
            return "Rename it."
        nearest = {name: near for name in names if (near := self.find_nearest(name))}
        hint = "".join(f"Did you mean {near!r} by {name!r}? " for name, near in [*nearest.items()][:1])
        if names == ["0", "1"] or (are_classes and len(names) == 2):
            normal, fracture = names
            if (
                self._known.get(nearest.get(normal, "")) == FRACTURE
                or self._known.get(nearest.get(fracture, "")) == NORMAL
            ):
                normal, fracture = fracture, normal
            return (
                f"{hint}If {_quote(fracture)} means fracture: {self.format_setting(FRACTURE, fracture)} "
                f"{self.format_setting(NORMAL, normal)}"
            )
        name = next(iter(nearest), names[0])
        several = " Several names go into one list: [A, B]." if len(names) > 1 else ""
        return (
            f"{hint}Rename it, or say what it is: {self.format_setting(FRACTURE, name)} or "
            f"{self.format_setting(NORMAL, name)}; {self.format_setting(EXCLUDED, name)} leaves it out.{several}"
        )


def _find(labels: Mapping[str, int], text: str, bare_number: bool = False) -> int | None:
    """Return the label of a word, or of what follows the number before it.

    Args:
        bare_number: the number may stand alone, without `study`, `class` or `label`.
    """
    word = _fold(text)
    if word in labels or len(word) > _MOST_CHARACTERS:
        return labels.get(word)
    prefix = _PREFIX.match(word)
    if prefix is None or not (prefix[1] or bare_number):
        return None
    label, number = labels.get(word[prefix.end() :]), int(prefix[2])
    contradicts = label in (FRACTURE, NORMAL) and number in (FRACTURE, NORMAL) and number != label
    return None if contradicts and prefix[1] != "study" else label


def _known(words: dict[int, Iterable[str]]) -> dict[str, int]:
    return {normalise_word(word): label for label, listed in words.items() for word in listed}


def _quote(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=not name.isprintable())


def _can_be_typed(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)  # bytes of a file's name that are no UTF-8


def without_number(name: str) -> str:
    """Return a folder's name without the number before it: `positive` for `study1_positive`."""
    return re.sub(r"^(study|class|label)?[\s_-]*\d+[.)]?[\s_-]+(?=\D)", "", name, flags=re.IGNORECASE)


def _name(label: int) -> str:
    return "excluded" if label == EXCLUDED else CLASS_NAMES[label]


KNOWN_WORDS = "'fracture', 'fractured', 'normal', 'not fractured', 'no fracture' and such in several languages"
