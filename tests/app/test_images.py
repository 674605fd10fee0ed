"""Grids are labelled pictures."""

import re

import pytest
import torch
from PIL import Image

from lcm.app.images import drawable, grid, label_font, parameters, save_png, to_pil, wrap
from lcm.callbacks.samples import ImageGrid
from lcm.core.errors import UserError


def test_grid_pastes_each_image_in_its_cell():
    red, blue = torch.zeros(2, 3, 8, 8).byte().unbind()
    red[0], blue[2] = 255, 255
    picture = grid([torch.stack([red, blue])], ["a row"], ["1", "2"], cell=16)
    bottom = picture.height - 8
    assert picture.getpixel((picture.width - 10, bottom)) == (0, 0, 255)
    assert picture.getpixel((picture.width - 30, bottom)) == (255, 0, 0)


def test_grid_keeps_shape_of_images():
    tall = torch.zeros(3, 16, 8).byte()
    picture = grid([torch.stack([tall, tall])], ["a row"], cell=16)
    assert picture.getpixel((picture.width - 10, picture.height - 30)) == (0, 0, 0)
    assert picture.height < 16 * 2 + 20


SETTINGS = {
    **{"seed": 3, "steps": 4, "w": 1.5, "negative": "grey", "size": [8, 16], "pipeline": "runs/a, b/model", "model": "abc"},
    "sampler": {"_target_": "lcm.core.sampling.ode", "solver": {"_target_": "lcm.core.solvers.heun"}},
}


def test_png_carries_prompt_and_settings(tmp_path):
    save_png(to_pil(torch.zeros(3, 8, 8).byte()), tmp_path / "a.png", prompt="a café", seed=3, w=1.5)
    assert Image.open(tmp_path / "a.png").text == {
        "caption": "a café",  # ComfyUI would parse a chunk "prompt"
        "seed": "3",
        "w": "1.5",
        "parameters": "a café\nNegative prompt: \nCFG scale: 2.5, Seed: 3",
    }


def test_other_programs_read_how_an_image_was_drawn():
    """A1111 reads `name: value` pairs from the last line. A value with a comma is a JSON string."""
    prompt, negative, last = parameters({"prompt": "a cat,\nsitting", **SETTINGS}).rsplit("\n", 2)
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert (prompt, negative) == ("a cat,\nsitting", "Negative prompt: grey")
    assert pairs == {
        **{"Steps": "4", "Sampler": "Heun", "CFG scale": "2.5", "Seed": "3", "Size": "16x8"},
        **{"Model hash": "abc", "Model": "model"},
    }
    named = {"consistency": "LCM", "tcd": "TCD", "mine": "mine"}
    assert {name: parameters({"prompt": "", "sampler": name}).split(": ")[-1] for name in named} == named
    assert parameters({"prompt": "", "pipeline": "a, b"}).endswith('Model: "a, b"')


def test_wrap_keeps_every_word():
    class Monospace:
        def getlength(self, text):
            return len(text)

    lines = wrap("woman artist medium skin tone on a green background", Monospace(), 20)
    assert " ".join(lines) == "woman artist medium skin tone on a green background"
    assert all(len(line) <= 20 for line in lines)


WORDS = " ".join(["a very detailed scene with several objects on a wooden table"] * 16)
TAGS = ",".join(f"tag_{i}" for i in range(400))


@pytest.mark.parametrize(
    ("label", "side"),
    [(TAGS, 256), ("一只橙色的猫 🐱" * 40, 16), (WORDS.replace(" ", "\n"), 256), ("x" * 10**6, 256)],
)
def test_labels_keep_to_their_rows(label, side):
    rows, white = [torch.full((2, 3, side, side), 255).byte()] * 3, (255, 255, 255)
    plain = grid(rows, ["a"] * 3, ["c", "d"])
    for labels in ([label, "", ""], [[label] * 4, "", ""]):
        picture = grid(rows, labels, ["c", "d"])
        assert picture.size == plain.size
        size = max(side, 128)
        top = picture.height - 3 * (size + 4)
        below, pictures = (0, top + size + 4, picture.width, picture.height), (2 * size + 12, top, *picture.size)
        for box in (below, pictures):
            assert picture.crop(box).getcolors() == [((box[2] - box[0]) * (box[3] - box[1]), white)]


@pytest.mark.parametrize("text", [WORDS, TAGS])
def test_labels_are_wrapped_and_cut(text):
    font = label_font(14)
    whole, cut = wrap(text, font, 200), wrap(text, font, 200, 3)
    assert "".join("".join(whole).split()) == "".join(text.split())
    assert all(font.getlength(line) <= 200 for line in whole + cut)
    assert len(cut) <= 3
    assert cut == whole if len(whole) <= 3 else cut[-1].endswith("...")


def test_missing_glyphs_are_escaped():
    assert drawable("café, кот, ﾈｺ, 猫, 🇯🇵") == "café, кот, \\uff88\\uff7a, \\u732b, \\U0001f1ef\\U0001f1f5"


def test_column_names_keep_to_their_columns():
    rows = [torch.full((3, 3, 16, 16), 255).byte()]
    for name in ("n" * 300, "a long name " * 30):
        picture = grid(rows, [""], ["", f"{name}\n4 steps", ""])
        for x in (0, 2 * 128 + 12, 2 * 128 + 12 + 2 * 132):
            assert picture.crop((x, 0, x + 125, picture.height)).getcolors() == [(125 * picture.height, (255, 255, 255))]


def test_text_is_not_a_list_of_prompts():
    with pytest.raises(UserError, match=r"^callbacks\.samples\.prompts=red apple: give a list"):
        ImageGrid("samples", "red apple", steps=[1], w=1.0)
