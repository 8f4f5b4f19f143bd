"""The audit as a page to look at."""

from typing import Any

import numpy as np
import pyarrow as pa

from fracture.labels import CLASS_NAMES
from fracture.page import picture, render
from fracture.preparation.audit import Audit, Pair, alarms, support
from fracture.preparation.duplicates.grouping import KINDS
from fracture.preparation.duplicates.signature import SIDE
from fracture.preparation.source import Source

_CONFLICTS = 12


def audit_page(source: Source, facts: pa.Table, audit: Audit) -> bytes:
    """`audit.html`, with the pictures of the pairs and conflicts that the audit names.

    Args:
        facts: the rows of `FACTS` that the audit was made from.
    """
    conflicts = [paths[:4] for paths in audit.conflicts[:_CONFLICTS]]
    wanted = {path for pair in audit.plainest for path in (pair.path, pair.twin)}
    wanted |= {path for paths in conflicts for path in paths}
    rows = pa.array([row for row, path in enumerate(facts["path"].to_pylist()) if path in wanted], pa.int64())
    small = facts.select(["path", "small"]).take(rows).to_pydict()
    pictures = {
        path: picture(np.frombuffer(views[0], np.uint8).reshape(SIDE, SIDE))
        for path, views in zip(small["path"], small["small"], strict=True)
    }
    return render(
        "audit.html",
        name=", ".join(root.name for root in source.roots.values()),
        data=source.name,
        synthetic=source.synthetic,
        audit=audit,
        alarms=alarms(audit),
        support=support(audit),
        kinds=KINDS,
        classes=list(reversed(CLASS_NAMES)),
        pairs=[_shown(pair, pictures) for pair in audit.plainest],
        conflicts=[{"paths": paths, "pictures": [pictures[path] for path in paths]} for paths in conflicts],
    )


def _shown(pair: Pair, pictures: dict[str, str]) -> dict[str, Any]:
    how = []
    if pair.degrees is not None:
        turn = round(pair.degrees if pair.degrees <= 180 else pair.degrees - 360)
        how = [f"turned by {turn}°"] if turn else []
        how += ["mirrored"] if pair.flipped else []
        how += ["inverted"] if pair.inverted else []
        how.append(f"texture {pair.texture:.2f}")
    return {
        "kind": pair.kind,
        "path": pair.path,
        "twin": pair.twin,
        "left": pictures[pair.path],
        "right": pictures[pair.twin],
        "how": f": {', '.join(how)}" if how else "",
    }
