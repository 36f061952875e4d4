"""Render every emoji of every art set once, with its transparency: WORK/art.npz (pictures) and WORK/art.json."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
from common import RecipeError, arguments, need, save_arrays, save_json, words
from fetch import folder_of
from PIL import Image

MARGIN = 1 / 32  # of the picture's side, left free around the art
MAX_ZOOM = 1.4  # small signs grow to fill the picture, but not more than this
QUALITY, ALPHA_QUALITY = 88, 95  # of the WebP that the art is kept in


def slug(label: str) -> str:
    """'woman’s hat' -> 'womans-hat', the file names of most sets."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


@cache
def icons(folder: Path) -> dict[str, str]:
    """An Iconify set as {name: complete svg}."""
    data = json.loads((folder / "icons.json").read_text())
    width, height = data.get("width", 16), data.get("height", 16)
    whole = {}
    for name, icon in data["icons"].items():
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon.get('width', width)} {icon.get('height', height)}"
        whole[name] = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
    for name, alias in data.get("aliases", {}).items():
        if alias["parent"] in whole and set(alias) == {"parent"}:
            whole[name] = whole[alias["parent"]]
    return whole


def codepoints(hexcode: str) -> list[str]:
    """The spellings of an emoji's code points that file names use, the likeliest first."""
    code = hexcode.lower()
    bare = code.replace("-fe0f", "")
    return list(dict.fromkeys([code, bare, f"{code}-fe0f", code.lstrip("0"), bare.lstrip("0")]))


def find_file(folder: Path, names: list[str], suffix: str) -> bytes | None:
    for name in names:
        if (folder / f"{name}{suffix}").exists():
            return (folder / f"{name}{suffix}").read_bytes()
    return None


def find_icon(folder: Path, names: list[str]) -> bytes | None:
    table = icons(folder)
    return next((table[name].encode() for name in names if name in table), None)


def source(style: str, emoji: dict, downloads: Path) -> bytes | None:
    """The art of one emoji in one style: SVG or WebP bytes, or None where the set has no such picture."""
    names = [slug(name) for name in (emoji["label"], *emoji["other_names"])]
    fluent = downloads / "fluentui-emoji" / "icons"
    toned = [f"{names[0]}-default", *names]
    find: dict[str, Callable[[], bytes | None]] = {
        "3d": lambda: find_file(folder_of(downloads, "@lobehub/fluent-emoji-3d") / "assets", codes, ".webp"),
        "gradient": lambda: find_file(fluent / "modern", toned, ".svg"),
        "flat": lambda: find_file(fluent / "flat", toned, ".svg"),
        "line art": lambda: find_file(fluent / "high-contrast", toned, ".svg"),
        "twemoji": lambda: find_file(folder_of(downloads, "@twemoji/svg"), codes, ".svg"),
        "noto": lambda: find_icon(folder_of(downloads, "@iconify-json/noto"), names),
    }
    codes = codepoints(emoji["hexcode"])
    return find[style]()


def raster(art: bytes, side: int) -> Image.Image:
    """RGBA at about `side` pixels."""
    if art[:4] == b"RIFF":
        return Image.open(io.BytesIO(art)).convert("RGBA")
    try:
        import resvg_py
    except ImportError as error:
        raise RecipeError("resvg-py draws the SVG sets: pip install -r requirements.txt") from error
    png = bytes(resvg_py.svg_to_bytes(svg_string=art.decode(), width=side, height=side))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def fitted(image: Image.Image, size: int) -> np.ndarray | None:
    """Fit the art into a transparent square (H, W, 4), margins evened out between sets; None for an empty picture."""
    alpha = np.asarray(image)[..., 3] > 8
    if not alpha.any():
        return None
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    pixels = np.asarray(image, np.float32)[top:bottom, left:right] / 255
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], -1)  # premultiplied
    room = round(size * (1 - 2 * MARGIN))
    scale = min(room / max(pixels.shape[:2]), MAX_ZOOM * size / max(image.size))
    height, width = (max(1, round(n * scale)) for n in pixels.shape[:2])
    planes = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(4)]
    small = np.stack([np.asarray(p.resize((width, height), Image.Resampling.BOX)) for p in planes], -1)
    small[..., :3] /= small[..., 3:].clip(1e-3)
    canvas = np.zeros((size, size, 4), np.float32)
    y, x = (size - height) // 2, (size - width) // 2
    canvas[y : y + height, x : x + width] = small
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def packed(picture: np.ndarray) -> bytes:
    """WebP of straight RGBA."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=QUALITY, alpha_quality=ALPHA_QUALITY, method=4)
    return buffer.getvalue()


def unpacked(data: bytes) -> np.ndarray:
    """(H, W, 4) uint8 of what `packed` made."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def vocabulary(downloads: Path) -> list[dict]:
    """Every emoji that is drawn, with its name, keywords and other names: see `words.toml` for what is left out."""
    folder = downloads / "emojibase-data"
    data = json.loads((need(folder / "en" / "data.json", "fetch.py")).read_text())
    subgroups = json.loads((folder / "meta" / "groups.json").read_text())["subgroups"]
    unicode_names = json.loads((folder / "meta" / "unicode-names.json").read_text())
    codes = json.loads((folder / "en" / "shortcodes" / "iamcal.json").read_text())
    left_out = words()["left_out"]
    kept = []
    for entry in sorted((e for e in data if e.get("group") not in (None, 2)), key=lambda e: e["order"]):
        if subgroups[str(entry["subgroup"])] in left_out["subgroups"] or re.search(left_out["labels"], entry["label"]):
            continue
        short = codes.get(entry["hexcode"], [])
        others = [unicode_names.get(entry["hexcode"], ""), *([short] if isinstance(short, str) else short)]
        emoji = {key: entry.get(key, []) for key in ("hexcode", "emoji", "label", "tags")}
        kept.append({**emoji, "other_names": [name for name in others if name]})
    return kept


def render_one(emoji: dict, downloads: Path, styles: list[str], size: int) -> list[tuple[str, bytes]]:
    made = []
    for style in styles:
        art = source(style, emoji, downloads)
        picture = fitted(raster(art, 3 * size), size) if art else None
        if picture is not None:
            made.append((style, packed(picture)))
    return made


def main() -> None:
    args, row, work = arguments(__doc__, {"--processes": {"type": int, "default": 2}})
    if (work / "art.npz").exists():
        print(f"render: {work / 'art.npz'} stands already")
        return
    emoji = vocabulary(args.downloads)[:: row.art_every]
    job = partial(render_one, downloads=args.downloads, styles=row.styles, size=row.size)
    art, style_of, emoji_of = [], [], []
    with ProcessPoolExecutor(args.processes) as pool:
        for index, made in enumerate(pool.map(job, emoji, chunksize=8)):
            for style, picture in made:
                art.append(picture)
                style_of.append(row.styles.index(style))
                emoji_of.append(index)
            if index % 200 == 199:
                print(f"render: {index + 1}/{len(emoji)} emoji, {len(art)} pictures", flush=True)
    save_json(work / "art.json", {"styles": row.styles, "emoji": emoji})
    ends = np.cumsum([len(data) for data in art])
    arrays = {"art": np.frombuffer(b"".join(art), np.uint8), "ends": ends}
    save_arrays(work / "art.npz", **arrays, style=np.array(style_of), emoji=np.array(emoji_of))
    counts = {style: style_of.count(index) for index, style in enumerate(row.styles)}
    print(f"render: {len(art)} pictures of {len(emoji)} emoji at {row.size} px, {ends[-1] / 1e6:.1f} MB: {counts}")


if __name__ == "__main__":
    main()
