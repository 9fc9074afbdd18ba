"""Draw the images of examples/quickstart: simple shapes with captions, of several sizes.

python scripts/draw_quickstart.py [FOLDER]
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

PICTURES = (
    ("red_circle", (160, 160), "red", "circle", "sky"),
    ("blue_square", (160, 160), "blue", "square", "sand"),
    ("green_triangle", (192, 128), "green", "triangle", "sky"),
    ("yellow_circle", (192, 128), "gold", "circle", "night"),
    ("white_square", (128, 192), "white", "square", "night"),
    ("red_triangle", (128, 192), "red", "triangle", "sand"),
    ("blue_circle", (256, 256), "blue", "circle", "sand"),
    ("green_square", (224, 144), "green", "square", "night"),
)
BACKGROUNDS = {"sky": ("lightblue", "white"), "sand": ("khaki", "tan"), "night": ("midnightblue", "black")}


def draw(size: tuple[int, int], color: str, shape: str, background: str) -> Image.Image:
    """One shape in the middle of a two-coloured background."""
    width, height = size
    top, bottom = BACKGROUNDS[background]
    image = Image.new("RGB", size, top)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, height * 2 // 3, width, height), fill=bottom)
    radius = min(size) * 0.3
    box = (width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=color, outline="black", width=3)
    elif shape == "square":
        canvas.rectangle(box, fill=color, outline="black", width=3)
    else:
        canvas.polygon([(width / 2, box[1]), (box[2], box[3]), (box[0], box[3])], fill=color, outline="black", width=3)
    return image


def main(folder: Path) -> None:
    """Write every picture with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size, color, shape, background in PICTURES:
        draw(size, color, shape, background).save(folder / f"{name}.png")
        caption = f"masterpiece, flat color, {color} {shape}, simple background, {background}, no humans\n"
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "examples" / "quickstart")
