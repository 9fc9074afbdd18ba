"""The report as one HTML file: no script, nothing from elsewhere, readable without a net and in the dark."""

from collections.abc import Sequence

from anima_train.core.format import duration_text, readable
from anima_train.model.text import MAX_TOKENS
from anima_train.reports.dataset import Bucket, DatasetReport, SetReport, Thumbnail
from anima_train.reports.html import bars, bulleted, document, note, table, text
from anima_train.training.costs import total_bytes
from anima_train.training.summary import lr_text

MAX_LETTERS = 200  # of a caption
MAX_TAGS = 50
BIN = 32  # tokens
CURVE_WIDTH, CURVE_HEIGHT = 640, 160

STYLE = """
figure svg { display: block; max-width: 160px; max-height: 160px }
.crop { fill: none; stroke: #ff3b6b } .cut { fill: #000; fill-opacity: .55 }
.curve polyline { fill: none; stroke: var(--bar); stroke-width: 2 } .curve text { fill: var(--faint); font-size: 12px }
.curve path { fill: none; stroke: var(--line) }
"""


def render(report: DatasetReport) -> str:
    """The whole page, the same for the same report."""
    parts = [bulleted("Notes", report.notes), run_part(report), *(set_part(found) for found in report.sets)]
    return document(report.title, parts, STYLE)


def curve(points: Sequence[tuple[int, float]]) -> str:
    """Factors from 0 to 1 over steps, as a line."""
    last = max(points[-1][0], 1)
    places = " ".join(f"{x / last * CURVE_WIDTH:.1f},{(1 - y) * CURVE_HEIGHT:.1f}" for x, y in points)
    return (
        f'<svg class="curve" viewBox="-45 -10 {CURVE_WIDTH + 60} {CURVE_HEIGHT + 35}" width="{CURVE_WIDTH}">'
        f'<path d="M0 0V{CURVE_HEIGHT}H{CURVE_WIDTH}"/><polyline points="{places}"/>'
        f'<text x="-8" y="8" text-anchor="end">100%</text><text x="-8" y="{CURVE_HEIGHT}" text-anchor="end">0%</text>'
        f'<text x="0" y="{CURVE_HEIGHT + 18}">step 1</text>'
        f'<text x="{CURVE_WIDTH}" y="{CURVE_HEIGHT + 18}" text-anchor="end">{last + 1:,}</text></svg>'
    )


def run_part(report: DatasetReport) -> str:
    """Steps, learning rates, what is trained, and the costs."""
    groups: list[tuple[object, ...]] = [
        (row.component, lr_text(row), row.num_modules, row.num_parameters) for row in report.groups
    ]
    groups.append(
        ("total", "", sum(row.num_modules for row in report.groups), sum(row.num_parameters for row in report.groups))
    )
    cache = [(cost.kind, cost.number, readable(cost.num_bytes)) for cost in report.cache]
    seen = [(f"{times:,} times", number) for times, number in report.exposures]
    return "\n".join(
        [
            "<h2>The run</h2>",
            f"<p>{report.steps_per_epoch:,} steps in the first epoch, {report.num_steps:,} in all.</p>",
            "<h3>Learning rate</h3>",
            curve(report.curve),
            note("In percent of each component's learning rate in the table below."),
            "<h3>What is trained</h3>",
            table(("component", "learning rate", "modules", "parameters"), groups),
            "<h3>How often an image is seen in the run</h3>",
            note("An image at two resolutions counts twice."),
            bars(seen),
            "<h3>Disk for the cache</h3>",
            table(("", "entries", "size"), [*cache, ("total", "", readable(total_bytes(report.cache)))]),
            note("Tensors only; each entry is a file with a short header. Equal images and captions are stored once."),
            measured_part(report.sets[0].buckets, report.run_seconds),
            memory_part(report.sets[0].buckets),
        ]
    )


def measured_part(buckets: Sequence[Bucket], run_seconds: float | None) -> str:
    """What was measured; nothing if nothing was."""
    found = [(bucket, cost) for bucket in buckets if (cost := bucket.measured) is not None]
    if not found:
        return ""
    rows = [(bucket.size, bucket.batch_size, readable(cost.peak_bytes), cost.described) for bucket, cost in found]
    parts = [
        "<h3>Memory and time of a step, measured</h3>",
        table(("bucket", "batch", "memory at most", "a step"), rows),
        note(
            "Training steps of one process with random latents and captions of full length. On the CPU the memory is "
            "that of the whole process."
        ),
        *(
            bulleted(f"{bucket.size} needs too much memory; what to change, in order of cost", bucket.savings)
            for bucket, _ in found
        ),
    ]
    if run_seconds is not None:
        parts.append(f"<p>The whole run: {text(duration_text(run_seconds))}.</p>")
    return "\n".join(parts)


def memory_part(buckets: Sequence[Bucket]) -> str:
    """The estimate for each bucket that was not measured."""
    rows = [
        (bucket.size, bucket.batch_size, *map(readable, (cost.weights, cost.trained, cost.kept, cost.total)))
        for bucket in buckets
        if bucket.measured is None and (cost := bucket.memory) is not None
    ]
    if not rows:
        return ""
    return "\n".join(
        [
            "<h3>Memory of the device, an estimate</h3>",
            table(("bucket", "batch", "weights", "gradients and optimizer", "activations", "total"), rows),
            note(
                "None of these was measured. Weights: parameters x bytes. Gradients and optimizer: trained parameters "
                "x (gradient + moments; for a LoRA its weights too). Activations: batch x image tokens x width x "
                "bytes x 36 for each block; with activation_checkpointing, 1 for each block and 36 for one. Temporary "
                "memory comes on top."
            ),
        ]
    )


def set_part(found: SetReport) -> str:
    """One dataset."""
    sizes = [(f"{bucket.size} ({bucket.resolution} px)", bucket.num_images) for bucket in found.buckets]
    short = [
        f"{bucket.size}: {bucket.short_by:,} of {bucket.batch_size:,}" for bucket in found.buckets if bucket.short_by
    ]
    groups = [" = ".join(group) for group in found.duplicates]
    shown = sum(len(bucket.thumbnails) for bucket in found.buckets)
    left_out = sum(bucket.num_images for bucket in found.buckets) - shown
    return "\n".join(
        [
            f"<h2>Dataset {text(found.name)}</h2>",
            f"<p>{found.num_used:,} of {found.num_images:,} images are used.</p>",
            bulleted("Images that cannot be used", found.bad),
            bulleted("Images found damaged while the pictures below were drawn; they will not be used", found.damaged),
            bulleted("Images set aside by a setting", found.skipped),
            bulleted("Warnings", found.warnings),
            bulleted("Files that hold the same image", groups),
            caption_part(found),
            "<h3>Buckets</h3>",
            bars(sizes),
            bulleted("Buckets whose last batch in the first epoch lacks images", short),
            "<h3>How images are cropped</h3>",
            note(
                f"What is dark is cut off. {shown:,} shown, evenly chosen in every bucket; {left_out:,} left out. The "
                "percentage is the scale from the image to the bucket: above 100 % it is enlarged."
            ),
            *(bucket_part(bucket) for bucket in found.buckets if bucket.thumbnails),
        ]
    )


def bucket_part(bucket: Bucket) -> str:
    """The pictures of one bucket."""
    pictures = "\n".join(picture(thumbnail) for thumbnail in bucket.thumbnails)
    title = f"{bucket.size}: {len(bucket.thumbnails):,} of {bucket.num_images:,}"
    return f'<h4>{text(title)}</h4>\n<div class="pictures">\n{pictures}\n</div>'


def picture(thumbnail: Thumbnail) -> str:
    """A picture with its crop, drawn in the image's own pixels."""
    left, top, right, bottom = thumbnail.box
    width, height = thumbnail.width, thumbnail.height
    longer = max(width, height)
    box = f'x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"'
    outside = f"M0 0H{width}V{height}H0ZM{left} {top}H{right}V{bottom}H{left}Z"
    return (
        f'<figure title="{text(thumbnail.caption)}"><svg viewBox="0 0 {width} {height}" '
        f'width="{160 * width / longer:.0f}" height="{160 * height / longer:.0f}">'
        f'<image width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/jpeg;base64,{thumbnail.jpeg}"/>'
        f'<path class="cut" fill-rule="evenodd" d="{outside}"/>'
        f'<rect class="crop" {box} stroke-width="{longer / 80:.2f}"/></svg>'
        f"<figcaption>{text(thumbnail.name)}, {width} x {height}, {thumbnail.scale:.0%}<br>"
        f"{text(thumbnail.caption[:MAX_LETTERS])}"
        "</figcaption></figure>"
    )


def caption_part(found: SetReport) -> str:
    """Lengths, losses and tags."""
    facts = found.captions
    truncated = [f"loses {lost:,} tokens: {caption[:MAX_LETTERS]}" for caption, lost in facts.truncated]
    special = [f"{token} in: {caption[:MAX_LETTERS]}" for token, caption in facts.special]
    unknown = [
        f"{letter} (U+{ord(letter):04X}) in {number:,} captions" if number > 1 else f"{letter} (U+{ord(letter):04X})"
        for letter, number in facts.unknown
    ]
    typos = [f"{typo.tag} ({typo.number:,}): {typo.meant} ({typo.meant_number:,})?" for typo in facts.typos]
    return "\n".join(
        [
            f"<h3>Captions: {len(facts.lengths):,} different</h3>",
            "<h4>Tokens of Qwen3</h4>",
            bars(histogram([length.qwen for length in facts.lengths])),
            "<h4>Tokens of T5</h4>",
            bars(histogram([length.t5 for length in facts.lengths])),
            note(f"Of either, {MAX_TOKENS} are read; what is behind them is cut off."),
            bulleted("Captions cut off", truncated),
            bulleted("Characters that T5 cannot read (<unk>)", unknown),
            bulleted("Captions with the text of a special token", special),
            f"<h4>Tags: {len(facts.tags):,} different, the {min(MAX_TAGS, len(facts.tags)):,} most frequent</h4>",
            bars(facts.tags[:MAX_TAGS]),
            bulleted("Tags that look like another, mistyped", typos),
            *(
                bulleted(f"directory[{item.directory}]: images without {item.described}", item.images)
                for item in found.missing
            ),
        ]
    )


def histogram(lengths: Sequence[int]) -> list[tuple[str, int]]:
    """(range, how many) for ranges of `BIN` tokens up to the last that is needed, and for what is cut off."""
    needed = [length for length in lengths if length <= MAX_TOKENS]
    tops = range(BIN, max(needed, default=0) + BIN, BIN)
    rows = [
        (
            f"{'0' if top == BIN else top - BIN + 1} to {top}",
            sum(top - BIN < max(length, 1) <= top for length in needed),
        )
        for top in tops
    ]
    over = len(lengths) - len(needed)
    return [*rows, (f"over {MAX_TOKENS}", over)] if over else rows
