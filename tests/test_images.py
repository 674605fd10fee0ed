"""Grids are labelled pictures."""

import torch
from PIL import Image

from lcm.images import grid, save_png, to_pil, wrap


def test_grid_pastes_each_image_in_its_cell():
    red, blue = torch.zeros(2, 3, 8, 8).byte().unbind()
    red[0], blue[2] = 255, 255
    picture = grid([torch.stack([red, blue])], ["a row"], ["1", "2"], cell=16)
    bottom = picture.height - 8
    assert picture.getpixel((picture.width - 10, bottom)) == (0, 0, 255)
    assert picture.getpixel((picture.width - 30, bottom)) == (255, 0, 0)


def test_a_grid_keeps_the_shape_of_its_images():
    tall = torch.zeros(3, 16, 8).byte()
    picture = grid([torch.stack([tall, tall])], ["a row"], cell=16)
    assert picture.getpixel((picture.width - 10, picture.height - 30)) == (0, 0, 0)
    assert picture.height < 16 * 2 + 20


def test_png_carries_prompt_and_settings(tmp_path):
    save_png(to_pil(torch.zeros(3, 8, 8).byte()), tmp_path / "a.png", prompt="a café", seed=3, w=1.5)
    assert Image.open(tmp_path / "a.png").text == {
        "prompt": "a café",
        "seed": "3",
        "w": "1.5",
        "parameters": "a café\nseed: 3, w: 1.5",
    }


def test_wrap_keeps_every_word():
    class Monospace:
        def getlength(self, text):
            return len(text)

    lines = wrap("woman artist medium skin tone on a green background", Monospace(), 20)
    assert " ".join(lines) == "woman artist medium skin tone on a green background"
    assert all(len(line) <= 20 for line in lines)
