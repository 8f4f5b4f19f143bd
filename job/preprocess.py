"""Audit a folder of radiographs, and turn it into Parquet shards for training.

  python job/preprocess.py --data DIR --out SHARDS
  python job/preprocess.py --data DIR --audit-only          what the data can support; writes audits/NAME
  python job/preprocess.py --data DIR --labels labels.csv --out SHARDS
  python job/preprocess.py --data HOSPITAL_A --data HOSPITAL_B --out SHARDS

DIR holds train/, val/ and test/, or class folders alone. Class folders are named fracture, fractured, normal, not
fractured and the like, in any case; or a CSV with the columns path,label[,patient][,source] says what is what. Files
may be JPEG, PNG, GIF, BMP, WebP or TIFF under any name; what cannot be read is left out and listed. DIR is never
changed.

Copies of one radiograph, also edited, turned or mirrored, are found and belong to one group. A split that is found is
kept if no group is in two of its parts (--split auto); otherwise, or with --split group, one is made of whole groups.
Run again on the same input, it is done in a second; on a folder that has grown, what is known of its files is
taken over, and no group changes its split.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import _cli

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fracture.config import Config
    from fracture.preparation.source import Source
    from fracture.storage import StoragePath


def main(args: argparse.Namespace) -> None:
    from fracture.errors import UsageError
    from fracture.runtime.cluster import start_ray
    from fracture.storage import storage_path

    config = _cli.settings(args, _cli.data_settings(args))
    source = find(args, [storage_path(data) for data in args.data], config)
    if args.audit_only:
        audit_only(
            source, storage_path(args.out or f"audits/{next(iter(source.roots.values())).name}"), config, args.verbose
        )
    elif args.out:
        prepare(source, storage_path(args.out), config, lambda: start_ray(args.verbose))
    else:
        raise UsageError("--out is missing: name the folder to write the shards to, or ask for --audit-only")


def find(args: argparse.Namespace, roots: Sequence[StoragePath], config: Config) -> Source:
    """Lists the radiographs, and prints where."""
    from fracture.preparation.source import find_source
    from fracture.storage import storage_path

    source = find_source(roots, config.data, storage_path(args.labels) if args.labels else None)
    print(f"data       {source.name}{' (SYNTHETIC)' if source.synthetic else ''}", flush=True)
    if args.labels:
        patients, origins = ({getattr(f, column) for f in source.files} - {""} for column in ("patient", "origin"))
        print(
            f"labels     {len(source.files):,} files of {len(patients) or 'unknown'} patients from "
            f"{len(origins) or 'unknown'} sources; {source.unnamed:,} more files in the folder are not named",
            flush=True,
        )
    return source


def audit_only(source: Source, out: StoragePath, config: Config, verbose: bool) -> None:
    from fracture.preparation.audit import audit_lines
    from fracture.preparation.preprocess import check_apart, examine_source, write_audit
    from fracture.progress.bars import ProgressBars
    from fracture.runtime.cluster import start_ray

    check_apart(source, out)
    start_ray(verbose)
    with ProgressBars() as bars:
        examined = examine_source(source, out, config.data, bars.show)
    write_audit(out, examined)
    print("\n".join(audit_lines(examined.audit)))
    print(f"audit      {out} (audit.html to look at, links.csv with every copy, audit.json)", flush=True)


def prepare(
    source: Source, out: StoragePath, config: Config, start: Callable[[], None], before: StoragePath | None = None
) -> None:
    """Makes the shards of `source` in `out`, unless they are there, and prints what was found.

    Args:
        start: called when Ray is needed.
        before: manifest and files of a data set whose split has to stand.
    """
    from fracture.preparation.audit import audit_lines
    from fracture.preparation.preprocess import (
        changed_settings,
        check_out,
        examine_source,
        find_done,
        preprocess,
        read_audit,
        summary,
    )
    from fracture.progress.bars import ProgressBars

    manifest = find_done(source, out, config.data, before)
    state = "unchanged since they were written"
    if manifest is None:
        changed = changed_settings(out, config.data)
        check_out(source, out)
        start()
        with ProgressBars() as bars:
            examined = examine_source(source, out, config.data, bars.show, to_write=True)
            manifest = preprocess(examined, out, config.data, bars.show, before)
        state = f"written in place of those with other settings: {'; '.join(changed)}" if changed else "written"
    print("\n".join([*audit_lines(read_audit(out)), *summary(manifest)]))
    print(f"shards     {out} ({state}; audit.html shows the audit)", flush=True)


if __name__ == "__main__":
    parser = _cli.parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="DIR", action="append", required=True, help="folder or URI of radiographs; repeated: several"
    )
    _cli.add_data_flags(data)
    parser.add_argument("--out", metavar="DIR", help="folder or URI to write to")
    parser.add_argument("--audit-only", action="store_true", help="look at the data, write no shards")
    _cli.run(main, parser.parse_args())
