"""The figure: bits above the Gaussian bound at equal error, one panel per model."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LEAST, MOST = -0.1, 1.4


def draw(results, path):
    """Writes the figure of all `results`, in the format that `path` ends in."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4.4 * columns, 3.4 * rows), squeeze=False, layout="tight")
    for panel in panels.flat[len(results) :]:
        panel.set_visible(False)
    for panel, result in zip(panels.flat, results, strict=False):
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
    # Without dates and random identifiers the same measurements give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "mcwcfs"
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
