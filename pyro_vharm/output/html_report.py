"""An audit as one HTML file that needs nothing else: verdict, ledger, figures, settings, code."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.figure import Figure

from pyro_vharm.errors import InputError
from pyro_vharm.output.captions import drawings_of
from pyro_vharm.output.datatree import to_datatree
from pyro_vharm.output.glossary import KINDS, MEANINGS
from pyro_vharm.output.ledger_figure import plot_ledger
from pyro_vharm.tables import nats

__all__ = ["report"]

_DPI = 160
_LEDGER_CAPTION = "From log evidence at the reference down to the ELBO, with two standard errors"
_TABLES = {"local_harm": "near θ̂, training data", "reachability": "your training, training data"}
_HANDED_IN = "handed in"
_CLASS = re.compile(r"\b([A-Z]\w*)\(")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 58rem; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { border-left: 6px solid #5a5a5a; background: #f5f5f5; padding: 0.6rem 1.1rem; }
.verdict.harm { border-color: #d55e00; } .verdict.none { border-color: #0072b2; }
.verdict strong { text-transform: uppercase; letter-spacing: 0.03em; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.88rem; width: 100%; }
th, td { text-align: right; padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd;
         font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .words td { text-align: left; }
.ledger tr.level td { font-weight: 600; }
.words td { vertical-align: top; } .words td:first-child { white-space: nowrap; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.88rem; }
pre { background: #f5f5f5; padding: 0.8rem; white-space: pre-wrap; font-size: 0.85rem; }
"""


def report(
    audit: object,
    path: str | PathLike[str],
    *,
    images: str | None = None,
    image_shape: tuple[int, int] | None = None,
) -> Path:
    """Write one self-contained HTML file: verdict, ledger, figures, settings, meanings and code.

    It is made from ``to_datatree(audit)`` alone and shows whatever groups the tree has. Figures are
    inside the file, so it can be mailed and opened without a network.

    Args:
        audit: an `Audit`, another result that `to_datatree` takes, or a DataTree that was read
            back.
        path: of the file to write; its folder must exist.
        images: the argument of the model with an image for each unit, to show who was harmed.
        image_shape: height and width, where that has images as rows of pixels.

    Returns:
        the path.

    Raises:
        InputError: if the folder does not exist, or the path is a folder.
        KeyError, ValueError: if there are no such images, or not of that shape.
        TypeError: if `to_datatree` has no form for the result.

    >>> import pyro, torch, pyro.distributions as dist, tempfile
    >>> from pyro_vharm import Refit, inference_gap
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("h", dist.Normal(x / 2, 0.6))
    >>> found = inference_gap(model, guide, (torch.ones(5),), refit=Refit(10), progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     "<h2>Ledger</h2>" in report(found, f"{folder}/gap.html").read_text(encoding="utf-8")
    True
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"path must name a file in a folder that exists, got {str(path)!r}")
    tree = audit if isinstance(audit, xr.DataTree) else to_datatree(audit)
    sections = [
        _verdict(tree),
        *_ledgers(tree),
        *_drawings(tree, {"images": images, "image_shape": image_shape} if images else {}),
        _meanings(tree),
        _settings(tree),
        _code(tree),
    ]
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>What learning lost</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )
    target.write_text(page, encoding="utf-8")
    return target


def _verdict(tree: xr.DataTree) -> str:
    title = "<h1>What learning lost, in nats</h1>"
    if "outcome" not in tree.attrs:
        return title
    outcome = str(tree.attrs["outcome"])
    marks = {"harm": "harm", "no harm found": "none"}
    points = _points(str(tree.attrs["verdict"]))
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    return (
        f'{title}<div class="verdict {marks.get(outcome, "")}"><strong>{escape(outcome)}</strong>'
        f"<ul>{items}</ul></div>"
    )


def _points(text: str) -> list[str]:
    """The sentences of a printed verdict, which has one after each bullet."""
    heading, *points = text.split("•")
    return [" ".join(part.split()) for part in points or [heading]]


def _ledgers(tree: xr.DataTree) -> list[str]:
    names = {"ledger": "training data", "heldout_ledger": "held-out data"}
    parts = []
    for group, title in names.items():
        if group in tree.children:
            alone = xr.DataTree.from_dict({group: tree[group].to_dataset()})
            parts += [
                _image(plot_ledger(alone), f"{_LEDGER_CAPTION}, {title}."),
                _ledger_table(tree[group].to_dataset(), title),
            ]
    parts += [
        _ledger_table(tree[group].to_dataset(), title)
        for group, title in _TABLES.items()
        if group in tree.children
    ]
    return ["<h2>Ledger</h2>", *parts] if parts else []


def _ledger_table(ledger: xr.Dataset, title: str) -> str:
    num_units = int(ledger.attrs["num_units"])
    sampled = bool(ledger["sampling_error"].notnull().any())
    header = [
        f"{title}, {num_units} units" if num_units > 1 else title,
        "total",
        "± mc",
        "per unit",
    ]
    header += ["sampling error per unit"] if sampled else []
    rows = []
    for name in ledger["quantity"].values:
        line = ledger.sel(quantity=name)
        total, error, sampling = (float(line[v]) for v in ("total", "mc_error", "sampling_error"))
        cells = [str(name), nats(total), nats(error), nats(total / num_units, 4)]
        if sampled:
            cells += ["" if math.isnan(sampling) else nats(sampling / num_units, 4)]
        rows.append([*cells, str(line["kind"].item())])
    return _table([*header, "kind"], rows, "ledger")


def _drawings(tree: xr.DataTree, images: Mapping[str, Any]) -> list[str]:
    shown = [
        _image(drawing.draw(tree, **(images if drawing.of_units else {})), drawing.caption)
        for drawing in drawings_of(tree)
    ]
    return ["<h2>Figures</h2>", *shown] if shown else []


def _image(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    width = round(96 * figure.get_figwidth() * 1.15)
    plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img width="{width}" alt="{escape(caption)}" '
        f'src="data:image/png;base64,{encoded}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _meanings(tree: xr.DataTree) -> str:
    groups = [g for g in ("ledger", "heldout_ledger", *_TABLES) if g in tree.children]
    ledgers = [tree[group].to_dataset() for group in groups]
    lines = dict.fromkeys(str(name) for ledger in ledgers for name in ledger["quantity"].values)
    kinds = dict.fromkeys(str(kind) for ledger in ledgers for kind in ledger["kind"].values)
    rows = [[name, MEANINGS[name]] for name in lines if name in MEANINGS]
    if any("log evidence" in name for name in lines) and "= log evidence as learned" in lines:
        rows = [row for row in rows if row[0] != "log evidence as learned"]
    rows += [[f"kind: {kind}", KINDS[kind]] for kind in kinds if kind in KINDS]
    return "<h2>What each number means</h2>" + _table(["", ""], rows, "words") if rows else ""


def _settings(tree: xr.DataTree) -> str:
    rows = [[_plain(str(name)), str(value)] for name, value in tree.attrs.items() if value]
    hidden = {"verdict", "outcome"}
    rows = [row for row in rows if row[0] not in hidden]
    return "<h2>Settings</h2>" + _table(["", ""], rows, "words") if rows else ""


def _plain(name: str) -> str:
    return name.removeprefix("setting_").replace("_", " ")


def _code(tree: xr.DataTree) -> str:
    if "outcome" not in tree.attrs:
        return ""
    names = ("method", "learner", "seed")
    found = {name: tree.attrs.get(f"setting_{name}") for name in names}
    options = ["heldout=heldout"] if "heldout_ledger" in tree.children else []
    options += ["reference=reference"] if _HANDED_IN in str(tree.attrs.get("tried")) else []
    options += [f"{name}={_CLASS.sub(r'vh.\1(', str(v))}" for name, v in found.items() if v]
    arguments = "".join(f"    {entry},\n" for entry in ("model", "guide", "data", *options))
    code = (
        f"import pyro_vharm as vh\n\naudit = vh.audit(\n{arguments})\n"
        'print(audit)\nvh.report(audit, "audit.html")\n'
    )
    return (
        "<h2>Code that reproduces it</h2>"
        '<p class="note">With model and guide as trained, and the same data.</p>'
        f"<pre>{escape(code)}</pre>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=level' if row[0].startswith(('=', 'log evidence at')) else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    head = f"<thead><tr>{top}</tr></thead>" if any(header) else ""
    return f'<table class="{kind}">{head}<tbody>{body}</tbody></table>'
