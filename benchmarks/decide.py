"""Votes per decision of `certify.py --mode=decide`, against the fixed number of votes of the published protocol.

    python certify.py --workdir=runs/mnist --skip=50
    python benchmarks/decide.py --workdir=runs/mnist --skip=50

It decides the same images at several radii and compares with the radii of the workdir's certificates.tsv. Every image
with another answer is listed. Files go to WORKDIR/decisions-RADIUS.tsv; a second run continues them.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from rs_consistency.certificates.read import Table, read_table
from rs_consistency.cli import certify
from rs_consistency.common.files import write_json

_SETTINGS = ("sigma", "n0", "n", "alpha", "seed", "split", "dtype", "sampler", "precision")  # as in the certificates


def _compare(fixed: Table, decided: Table, radius: float) -> dict[str, Any]:
    """Return the numbers of votes, and the images with another answer."""
    rows = decided.rows
    n = fixed.record.settings.n
    differing = []
    for index, row in rows.items():
        published = fixed.rows.get(index)
        if published is None:
            sys.exit(f"image {index} is not in {fixed.path}: certify it first, with the same --skip and --max")
        certified = float(published["radius"]) >= radius and published["predict"] >= 0
        if certified != (row["decision"] == "certified"):
            differing.append(
                f"image {index}: {row['decision']} after {row['votes']} votes ({row['count']} of them),"
                f" radius {published['radius']} from {published['count']} of {n}"
            )
    votes = [row["votes"] for row in rows.values()]
    number = {word: sum(row["decision"] == word for row in rows.values()) for word in ("certified", "not_certified")}
    return {
        "radius": radius,
        "images": len(rows),
        **number,
        "undecided": len(rows) - sum(number.values()),
        "mean_votes": round(statistics.mean(votes), 1),
        "median_votes": statistics.median(votes),
        "mean_votes_of_decided": round(
            statistics.mean([row["votes"] for row in rows.values() if row["decision"] != "undecided"] or [n]), 1
        ),
        "fixed_votes": n,
        "differing": differing,
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="with the certificates.tsv of the same images")
    parser.add_argument("--skip", type=int, default=1, help="as for certify.py (default: %(default)s)")
    parser.add_argument("--max", type=int, help="as for certify.py")
    parser.add_argument("--radii", nargs="+", type=float, default=[0.25, 0.5, 1.0, 1.5])
    parser.add_argument("--json", type=Path, help="file for the results, a JSON list")
    args = parser.parse_args()
    fixed = read_table(args.workdir / "certificates.tsv")
    results = []
    for radius in args.radii:
        output = args.workdir / f"decisions-{radius:g}.tsv"
        command = [f"--workdir={args.workdir}", "--mode=decide", f"--radius={radius}", f"--skip={args.skip}"]
        command += [f"--{name}={fixed.record.identity[name]}" for name in _SETTINGS]
        command += [f"--output={output}"] + ([f"--max={args.max}"] if args.max else [])
        certify.main(command)
        results.append(_compare(fixed, read_table(output), radius))
    print("radius  images  certified  not  undecided  mean votes  median  differing")
    for one in results:
        print(
            f"{one['radius']:6g}  {one['images']:6d}  {one['certified']:9d}  {one['not_certified']:3d}"
            f"  {one['undecided']:9d}  {one['mean_votes']:10.1f}  {one['median_votes']:6g}  {len(one['differing']):9d}"
        )
    for one in results:
        for line in one["differing"]:
            print(f"radius {one['radius']:g}: {line}")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
