"""Plans of a few cells whose programs only write files, for tests."""

from rs_consistency.reproduction.machine import Machine
from rs_consistency.reproduction.plan import Options, make_plan
from rs_consistency.reproduction.runner import Runner
from tests.helpers import ROOT

MACHINE = Machine("cpu", "cpu", 1, "a processor", "here")
FAKES = dict.fromkeys(("train", "certify", "measure"), "tests.fakes")


def cells_of(folder, table="mnist", **options):
    chosen = {"methods": ["gaussian"], "sigmas": [0.5], "images": 4, "n": 1000, "epochs": 2, **options}
    return make_plan(table, Options(**chosen), workdir=folder)


def runner_of(folder, finished=lambda cell: None, jobs=1, **settings):
    settings = {"machine": MACHINE, "finished": finished, "modules": FAKES, **settings}
    return Runner(folder, root=ROOT, jobs=jobs, **settings)


def estimate(runner, cells):
    return runner.speeds.estimate([(cell, runner.glance(cell)) for cell in cells], jobs=1)
