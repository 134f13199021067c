"""The figures: bits above the Gaussian bound at equal error, and distance on the task, one panel per model."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LEAST, MOST = -0.1, 1.4
LEAST_DISTANCE = 1e-7
MARKERS = "os^vD<>Pphd*X"


def draw(results, path):
    """Writes the figure of all `results`, in the format that `path` ends in."""
    figure, panels = panels_for(len(results))
    for panel, result in zip(panels, results, strict=True):
        for name, style in (("ours", "o-"), ("NNCodec", "s-"), ("ideal scalar", "--")):
            curve = result.curves.get(name)
            if curve:
                panel.plot(
                    [p.bits for p in curve.points],
                    [result.over_bound(p) for p in curve.points],
                    style,
                    ms=4,
                    label=name,
                )
        for point in result.formats:
            above = result.over_bound(point)
            if LEAST <= above <= MOST and point.bits < 7:
                panel.plot(point.bits, above, "k.", ms=4)
                panel.annotate(point.label, (point.bits, above), textcoords="offset points", xytext=(4, 3), fontsize=7)
        panel.axhline(0, color="k", lw=0.8)
        panel.set(title=result.model.name, ylim=(LEAST, MOST), xlim=(1.5, 7.2))
        panel.title.set_fontsize(9)
        panel.set_xlabel("bits per matrix weight", fontsize=8)
        panel.set_ylabel("bits above the Gaussian bound", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7, loc="upper left", ncols=3)
    save(figure, path)


def draw_on_task(models, path):
    """Writes the figure of the distance to the original's outputs against the bits per parameter, for `models`: by name, the
    task points of each codec by its name. A codec has the same mark in every panel, and a line from three points on.
    """
    figure, panels = panels_for(len(models))
    figure.set_layout_engine("constrained")
    codecs = list(dict.fromkeys(codec for of_model in models.values() for codec in of_model))
    drawn = {}
    for panel, (name, of_model) in zip(panels, models.items(), strict=True):
        for codec, points in of_model.items():
            index = codecs.index(codec)
            # Where an archive loses nothing that the evaluation sees there is nothing to draw on this scale.
            seen = [point for point in points if point.outcome.distance > LEAST_DISTANCE]
            seen.sort(key=lambda point: point.bits)
            line = "-" if len(points) > 2 else ""
            bits, distances = [p.bits for p in seen], [p.outcome.distance for p in seen]
            [drawn[codec]] = panel.plot(
                bits, distances, MARKERS[index % len(MARKERS)], ls=line, lw=1, color=f"C{index % 10}", ms=4, label=codec
            )
            panel.set_ylabel(f"{points[0].outcome.distance_kind} to the original's outputs", fontsize=8)
        panel.set(title=name, yscale="log", xlim=(1.5, 9))
        panel.title.set_fontsize(9)
        panel.set_xlabel("bits per parameter of the whole checkpoint", fontsize=8)
        panel.tick_params(labelsize=7)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, fontsize=7)
    save(figure, path)


def panels_for(count):
    """A figure with so many panels."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4.4 * columns, 3.4 * rows), squeeze=False, layout="tight")
    for panel in panels.flat[count:]:
        panel.set_visible(False)
    return figure, panels.flat[:count]


def save(figure, path):
    """Writes a figure: without dates and random identifiers the same measurements give the same file."""
    matplotlib.rcParams["svg.hashsalt"] = "mcwcfs"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
