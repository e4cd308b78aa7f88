"""Reports: from the records of a study to a page, and from a fusion to its card.

``build`` makes a page of records; ``to_html`` writes it as one file that needs nothing else, ``to_markdown``,
``to_csv`` and ``to_dict`` as what their names say. ``fusion_records`` turns one fusion into records, ``card`` into the
README beside its weights. Only HTML and exported figures need the extra ``weldnet[report]``.

>>> from weldnet.records import Record, Records
>>> page = build(Records((Record(kind="result", cell={"method": "gamf"}, values={"accuracy": 0.5}),)))
>>> print(to_csv(page).splitlines()[1])
measured,gamf,accuracy,0.5,,1,
"""

from weldnet.report._build import build
from weldnet.report._card import CARD_MARK, card
from weldnet.report._export import FORMATS, export_figures, require_exporter
from weldnet.report._fusion import fusion_records
from weldnet.report._html import require_extra, to_html
from weldnet.report._page import Page
from weldnet.report._text import to_csv, to_dict, to_markdown

__all__ = [
    "CARD_MARK",
    "FORMATS",
    "Page",
    "build",
    "card",
    "export_figures",
    "fusion_records",
    "require_exporter",
    "require_extra",
    "to_csv",
    "to_dict",
    "to_html",
    "to_markdown",
]
