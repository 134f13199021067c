#!/usr/bin/env python3
"""Puts what a driver prints into the pages: between the two lines that name its section, touching nothing else.

    DRIVER | python3 benches/publish.py SECTION [--fenced]

README.md and benches/RESULTS.md have such sections, `<!-- SECTION -->` to `<!-- /SECTION -->`. What is read from standard
input is shown as well. Nothing is written where the driver printed nothing. --fenced is for what is no Markdown.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "benches" / "RESULTS.md"]


def published(page, section, text):
    """The page with `text` in `section`; None where it has no such section."""
    begin, end = f"<!-- {section} -->\n", f"<!-- /{section} -->\n"
    if page.count(begin) != 1 or page.count(end) != 1:
        return None
    before, rest = page.split(begin)
    return f"{before}{begin}{text.strip()}\n{end}{rest.split(end)[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", metavar="SECTION")
    parser.add_argument("--fenced", action="store_true", help="show it as it is, in a fixed-width font")
    arguments = parser.parse_args()
    section, text = arguments.section, sys.stdin.read()
    print(text, end="")
    if not text.strip():
        raise SystemExit(f"{section}: nothing on standard input, pages left as they are")
    if arguments.fenced:
        text = f"```text\n{text.strip()}\n```"
    found = False
    for path in PAGES:
        page = published(path.read_text(), section, text)
        if page is not None:
            path.write_text(page)
            found = True
    if not found:
        names = " nor ".join(str(path.relative_to(REPOSITORY)) for path in PAGES)
        raise SystemExit(f"neither {names} has the lines <!-- {section} --> and <!-- /{section} --> once each")


if __name__ == "__main__":
    main()
