"""Tables as the drivers print them."""


def table(columns, rows):
    """A Markdown table; a cell that is None is empty."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)
