"""Render the audit as an HTML page."""

from typing import Any

import numpy as np
import pyarrow as pa

from fracture.labels import CLASS_NAMES
from fracture.page import picture, render
from fracture.preparation.audit import Audit, Pair, describe_support, describe_untried_traits, list_alarms
from fracture.preparation.duplicates.grouping import KINDS
from fracture.preparation.duplicates.signature import SIDE
from fracture.preparation.source import Source

_CONFLICTS = 12


def render_audit_page(source: Source, facts: pa.Table, audit: Audit) -> bytes:
    """Return `audit.html`, with the images of the audit's examples and conflicts.

    Args:
        facts: the rows of `FACTS` that the audit was made from.
    """
    conflicts = [paths[:4] for paths in audit.conflicts[:_CONFLICTS]]
    shown = {path for pair in audit.examples for path in (pair.path, pair.training_path)}
    images = _embed_images(facts, shown | {path for paths in conflicts for path in paths})
    return render(
        "audit.html",
        name=", ".join(root.name for root in source.roots.values()),
        data=source.name,
        synthetic=source.synthetic,
        audit=audit,
        alarms=list_alarms(audit),
        support=describe_support(audit),
        untried_traits=describe_untried_traits(audit),
        kinds=KINDS,
        classes=list(reversed(CLASS_NAMES)),
        pairs=[_describe_pair(pair, images) for pair in audit.examples],
        conflicts=[{"paths": paths, "images": [images[path] for path in paths]} for paths in conflicts],
    )


def _embed_images(facts: pa.Table, paths: set[str]) -> dict[str, str]:
    """Return path -> the address of an `img` with the file's first view."""
    rows = pa.array([row for row, path in enumerate(facts["path"].to_pylist()) if path in paths], pa.int64())
    chosen = facts.select(["path", "views"]).take(rows).to_pydict()
    return {
        path: picture(np.frombuffer(views[0], np.uint8).reshape(SIDE, SIDE))
        for path, views in zip(chosen["path"], chosen["views"], strict=True)
    }


def _describe_pair(pair: Pair, images: dict[str, str]) -> dict[str, Any]:
    edits = []
    if pair.degrees is not None:
        degrees = round(pair.degrees if pair.degrees <= 180 else pair.degrees - 360)
        edits = [f"rotated by {degrees}°"] if degrees else []
        edits += ["mirrored"] if pair.flipped else []
        edits += ["inverted"] if pair.inverted else []
        edits.append(f"texture {pair.texture:.2f}")
    return {
        "kind": pair.kind,
        "path": pair.path,
        "training_path": pair.training_path,
        "image": images[pair.path],
        "training_image": images[pair.training_path],
        "edits": f": {', '.join(edits)}" if edits else "",
    }
