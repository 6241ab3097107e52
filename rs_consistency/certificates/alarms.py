"""Attacks that contradict certificates: the strongest test of both from end to end.

A certificate of class c with radius R says that the smoothed classifier gives c at every point nearer than R. An attack
names a point at a distance of at most d, and another class there, proven by votes of their own. Both are right with
probability at least 1 - alpha each. So a distance below R is an alarm: by chance, it has a probability of at most the
sum of both alphas for an image. Else the certificate, the attack or the machine is broken.
"""

from collections.abc import Mapping
from pathlib import Path

from rs_consistency.certificates.columns import FILES, Row, Schema
from rs_consistency.certificates.proof import contradictions
from rs_consistency.certificates.read import Table, read_table
from rs_consistency.certificates.record import Record, record_path
from rs_consistency.common.errors import UserError
from rs_consistency.statistics.bounds import ABSTAIN

# Keys of a record that say which smoothed classifier and which images a file is about.
_OF_NETWORK = ("model", "dtype", "parameter_digest", "torch_input", "precision")
_ABOUT = ("dataset", "split", "data_digest", *_OF_NETWORK, "sigma", "sampler", "grid_steps", "image_shape")


def beside(path: Path, schema: Schema) -> Table | None:
    """Return the file of a mode, by its usual name, in the folder of another file; None if there is none.

    Raises:
      UserError: for a file that is damaged, was changed after it was finished, or does not follow from its counts.
    """
    other = path.with_name(f"{FILES[schema.name]}.tsv")
    if not (other.is_file() and record_path(other).is_file()):
        return None
    found = read_table(other)
    if found.changed:
        raise UserError(
            f"{other} was changed after it was finished: {found.changed}; restore it from a copy, or make it again"
        )
    for index, fault in contradictions(found).items():
        raise UserError(f"{other}, image {index}: {fault}; make it again")
    return found


def differences(one: Record, other: Record) -> list[str]:
    """Return "key: its value in one -> in the other" for each key by which two files are about other classifiers."""
    return one.differences({key: other.content.get(key) for key in _ABOUT})


def alarms(certificates: Mapping[int, Row], attacks: Mapping[int, Row]) -> dict[int, str]:
    """Return image number -> how its attack contradicts its certificate, for each image where it does.

    Both map image numbers to rows, of modes certify and attack, about the same smoothed classifier and images.

    Example:
      >>> from decimal import Decimal
      >>> from rs_consistency.certificates.alarms import alarms
      >>> certified = {7: {"predict": 3, "radius": Decimal("0.8")}}
      >>> attacked = {7: {"predict": 3, "adversarial": 5, "distance": Decimal("0.7")}}
      >>> alarms(certified, attacked)
      {7: 'class 5 at distance 0.7, inside the certified radius 0.8 of class 3'}
    """
    found = {}
    for index in sorted(certificates.keys() & attacks.keys()):
        sure, attacked = certificates[index], attacks[index]
        if ABSTAIN in (sure["predict"], attacked["predict"]):
            continue
        if attacked["predict"] != sure["predict"]:
            found[index] = f"class {attacked['predict']} at the image, where class {sure['predict']} is certified"
        elif attacked["adversarial"] not in (ABSTAIN, sure["predict"]) and attacked["distance"] < sure["radius"]:
            found[index] = (
                f"class {attacked['adversarial']} at distance {attacked['distance']}, inside the certified radius"
                f" {sure['radius']} of class {sure['predict']}"
            )
    return found
