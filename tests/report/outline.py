"""Parser for pages of results."""

from __future__ import annotations

import html.parser

from tests.plain import write_report

VOID = {"meta", "link", "br", "img"}


class Outline(html.parser.HTMLParser):
    """Collects the open tags, all tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data.replace("\N{WORD JOINER}", ""))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(paths, target, **options):
    summary = write_report(paths, target, **options)
    return summary, Outline(target.read_text(encoding="utf-8"))
