"""A bar chart of rows."""

from PIL import Image, ImageDraw


def draw_bars(rows, path, width=1000, bar=18):
    """A picture of the rows' images a second, a group for each model and batch."""
    groups = {}
    for row in rows:
        groups.setdefault(f"{row['model']}, batch {row['batch']}", []).append(row)
    height = 30 + sum(40 + (bar + 6) * len(group) for group in groups.values())
    most = max([row["images/s"] or 0 for row in rows]) or 1
    picture = Image.new("RGB", (width, height), "white")
    draw, left, right, y = ImageDraw.Draw(picture), 310, width - 190, 10
    draw.text((left, y), "training, images/s (peak memory)", fill="black")
    for title, group in groups.items():
        y += 30
        draw.text((10, y - 6), title, fill=(31, 90, 180))
        y += 10
        for row in group:
            end = left + (right - left) * (row["images/s"] or 0) / most
            draw.text((24, y + 3), row[""], fill="black")
            colour = (31, 90, 180) if row["data"] == "features" else (150, 180, 220)
            draw.rectangle((left, y, end, y + bar), fill=colour)
            draw.text(
                (end + 6, y + 3),
                "out of memory" if row["images/s"] is None else f"{row['images/s']:.3g}  ({row['memory GiB']:.1f} GiB)",
                fill="black",
            )
            y += bar + 6
    draw.text((left, y + 6), "light: from images; dark: from features", fill="black")
    picture.save(path)
