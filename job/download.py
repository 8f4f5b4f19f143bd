"""Download the Kaggle set "Fracture Multi-Region X-Ray Data" (10,581 files, about 0.5 GB).

  python job/download.py --out data

Uses kagglehub: sign in with ~/.kaggle/kaggle.json or KAGGLE_USERNAME and KAGGLE_KEY. The set's licence is the
publisher's (Open Data Commons Attribution 1.0); many of its images come from elsewhere: read it before you share.
"""

import argparse
from pathlib import Path

import _cli

HANDLE = "bmadushanirodrigo/fracture-multi-region-x-ray-data"


def main(args: argparse.Namespace) -> None:
    import kagglehub
    from kagglehub.exceptions import BackendError, CredentialError, DataCorruptionError, UnauthenticatedError

    from fracture.errors import RunError

    failures = (OSError, ValueError, BackendError, CredentialError, DataCorruptionError, UnauthenticatedError)
    out = Path(args.out) / HANDLE.rsplit("/", 1)[1]
    try:
        kagglehub.dataset_download(HANDLE, output_dir=str(out))
    except failures as error:
        raise RunError(f"Kaggle did not deliver {HANDLE}: {error}") from None
    print(f"data       {out}\nnext       make local-train DATA={out}")


if __name__ == "__main__":
    parser = _cli.parser(__doc__)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to put the set into")
    _cli.run(main, parser.parse_args())
