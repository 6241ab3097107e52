"""Certifies the classifier of a run by randomized smoothing; run again, it continues.

    python certify.py --workdir=runs/mnist

For every image: the class that the smoothed classifier predicts, and an l2 radius within which, with probability
1 - alpha, no perturbation changes it. Writes certificates.tsv (a line per image) and certificates.json.

    python certify.py --workdir=runs/mnist --tolerance=0.02               takes fewer votes, and loses little radius
    python certify.py --workdir=runs/mnist --mode=decide --radius=0.5     decides whether it is certified at one radius
    python certify.py --workdir=runs/mnist --mode=predict                 predicts the class, or abstains
    python certify.py --workdir=runs/mnist --attack                       finds a near image that gets another class
    python certify.py --workdir=runs/mnist --verify=20                    draws 20 lines of the file again
    python certify.py --workdir=runs/mnist --shard=2/5                    certifies one fifth, on one of five machines
    python certify.py --merge certificates-?-of-5.tsv --output=all.tsv    puts the fifths together

    python certify.py --torch_checkpoint=checkpoint.pth.tar --config=configs/cifar10.py --sigma=0.5 --output=theirs.tsv

Installed, the program is rs-certify.
"""

import secrets
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.certificates import audit
from rs_consistency.certificates.alarms import alarms, beside, differences
from rs_consistency.certificates.columns import ATTACK, CERTIFY, DECIDE, FILES, SCHEMAS, Row
from rs_consistency.certificates.merge import merge
from rs_consistency.certificates.question import Question, make_question
from rs_consistency.certificates.read import read_table
from rs_consistency.certificates.record import Record, record_path
from rs_consistency.certificates.selection import Selection, Shard, parse_shard
from rs_consistency.certificates.source import Source, plan
from rs_consistency.certificates.write import CertificateFile, check_answers
from rs_consistency.cli.common import (
    Parser,
    check_flags,
    entry_point,
    fail,
    note_repeated,
    program_words,
    user_path,
    user_place,
    whole,
)
from rs_consistency.cli.config_file import split
from rs_consistency.cli.train import parse
from rs_consistency.common.checks import PRECISIONS, one_of, whole_number
from rs_consistency.common.errors import EXIT_CONTRADICTED, EXIT_NOT_FINISHED, EXIT_NOT_REPRODUCED, UserError, note, say
from rs_consistency.common.progress import progress_bar
from rs_consistency.devices import parallel
from rs_consistency.devices.host import fix_number_types, keep_compiled, keep_memory, use_cores
from rs_consistency.models import DTYPES
from rs_consistency.models.torch_checkpoints import INPUT_LAYERS
from rs_consistency.smoothing.attack import N_ATTACK
from rs_consistency.smoothing.search import Effort
from rs_consistency.statistics import allocation
from rs_consistency.statistics.bounds import ABSTAIN, ALPHA, ALPHA_SHARE, BOUNDS, N0, N
from rs_consistency.statistics.samplers import GRID, SAMPLERS
from rs_consistency.training.config import validate
from rs_consistency.training.runs import finished_step, read_config

# Not argparse's defaults: --verify must know which settings the user named.
_DEFAULTS = {
    "mode": CERTIFY.name,
    "alpha": ALPHA,
    "skip": 1,
    "split": "test",
    "seed": 0,
    "sampler": GRID,
    "precision": PRECISIONS[0],
}
_OF_A_MODE = ("n", "n0", "bound", "alpha_share", "tolerance", "radius", "copies", "steps", "restarts")
_CHOICES = ("alpha", "seed", *_OF_A_MODE, "sampler", "precision", "batch_size")
_KEPT_IN_THE_RECORD = ("sigma", "dtype", "max", "shard", *_OF_A_MODE, *_DEFAULTS)

_FRESH = "fresh"
_GIVEN, _DRAWN = "command", "operating system"  # sources of a seed, for the record

# Beyond the parser's groups: flags that exclude each other, and flags that need another one, with how to write it.
_EXCLUSIVE = (
    *(("finished", other) for other in ("verify", "torch_checkpoint")),
    *(("workdir", other) for other in ("config", "torch_input")),
    ("attack", "mode"),
)
_NEEDED = (
    ("merge", ["output"], "--output=FILE.tsv"),
    ("verify_seed", ["verify"], "--verify=K"),
    ("torch_checkpoint", ["config_file"], "--config=FILE, such as configs/cifar10.py: model and dataset"),
    ("torch_checkpoint", ["sigma"], "--sigma=NUMBER, or the cell: --config=FILE:method=NAME,sigma=NUMBER"),
    ("torch_checkpoint", ["output"], "--output=FILE.tsv"),
)


def _seed(text: str) -> int | str:
    """Return a seed as a whole number, or the word for a fresh one."""
    return text if text == _FRESH else whole(text)


_seed.__name__ = "whole number"


def _parser() -> Parser:
    parser = Parser(
        prog=program_words("certify")[-1],
        usage="%(prog)s (--workdir=FOLDER | --torch_checkpoint=FILE --config=FILE | --merge FILE ...) [FLAG ...]",
        description=__doc__,
    )
    file, folder = {"type": user_path, "metavar": "FILE"}, {"type": user_place, "metavar": "FOLDER"}
    about = "one of: a run; a checkpoint, with --config=FILE and --config.KEY=VALUE as for train.py; files of shards"
    group = parser.add_argument_group("source", about)
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--workdir", type=user_path, metavar="FOLDER", help="a run of train.py")
    add("--torch_checkpoint", **file, help="a checkpoint of the published PyTorch code; needs sigma and --output")
    add("--merge", nargs="+", **file, help="put the files of all shards together, into --output")
    add = group.add_argument
    layers = f"{', '.join(INPUT_LAYERS)} (default: normalize)"
    add("--torch_input", metavar="LAYER", help=f"layer in front of a checkpoint's model: {layers}")
    add("--dtype", help=f"type that the model computes in: {', '.join(DTYPES)} (default: as in training)")

    add = parser.add_argument_group("question").add_argument
    add("--mode", help=f"{', '.join(SCHEMAS)} (default: {CERTIFY.name})")
    add("--attack", action="store_true", help="the same as --mode=attack")
    add("--sigma", type=float, help="standard deviation of the noise (default: as in training)")
    add("--n0", type=whole, help=f"votes that select the class (default: {N0}; with a tolerance {allocation.N0})")
    add("--n", type=whole, help=f"further votes; in mode decide at most so many (default: {N}; attack: {N_ATTACK})")
    add("--alpha", type=float, help=f"error probability of a certificate (default: {ALPHA})")
    add("--bound", help=f"of --mode=certify: {', '.join(BOUNDS)} (default: {BOUNDS[0]})")
    add("--alpha_share", type=float, help=f"of --bound=two_class: share of alpha for p_A (default: {ALPHA_SHARE})")
    add(
        "--tolerance",
        type=float,
        help="of --mode=certify: fewer votes, at a loss of l2 radius of at most this on average",
    )
    add("--radius", type=float, help="of --mode=decide")
    effort = Effort()
    add("--copies", type=whole, help=f"of --mode=attack: noisy copies in a step (default: {effort.copies})")
    add("--steps", type=whole, help=f"of --mode=attack: steps from a point (default: {effort.steps})")
    add("--restarts", type=whole, help=f"of --mode=attack: points to start from (default: {effort.restarts})")
    add("--seed", type=_seed, help=f"seed of the noise, or {_FRESH}: drawn by the operating system (default: 0)")
    noise = "noise on the grid of 8-bit images, or float32 noise for comparisons with older files"
    add("--sampler", help=f"{', '.join(SAMPLERS)}: {noise} (default: {GRID})")
    products = "of the network's float32 products: full float32, or as fast as the device can"
    add("--precision", help=f"{', '.join(PRECISIONS)}: {products} (default: {PRECISIONS[0]})")

    add = parser.add_argument_group("images").add_argument
    add("--split", help="train or test (default: test)")
    add("--skip", type=whole, help="every SKIP-th image (default: 1)")
    add("--max", type=whole, help="at most so many images (default: all)")
    add("--shard", metavar="I/K", help="only share I of K of these images")
    add("--data_dir", **folder, help="folder of the prepared dataset (default: as in training)")
    add("--cache_dir", **folder, help="folder of decoded images (default: as in training)")

    group = parser.add_argument_group("operation")
    add, add_exclusive = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--output", **file, help="file to write, or to verify (default: by mode and shard, in the workdir)")
    status = f"status {EXIT_NOT_FINISHED} where it is missing or damaged"
    add("--finished", action="store_true", help=f"only with the training's last checkpoint; {status}")
    plan_lines = "plan, shapes, parameters, memory and a measured estimate of the time"
    add_exclusive("--dry_run", action="store_true", help=f"print {plan_lines}; write nothing but caches")
    again = "draw K random lines of the file again, with the settings it names"
    add_exclusive("--verify", type=whole, metavar="K", help=again)
    add("--verify_seed", type=whole, metavar="SEED", help="seed of the choice of lines (default: nobody can know)")

    add = parser.add_argument_group("machine, without effect on the votes but at near-ties").add_argument
    add("--batch_size", type=whole, help="noisy images at a time (default: as the file began, else by device)")
    add("--num_devices", type=whole, default=0, help="devices that share the work (default: all)")
    return parser


def _main(argv: Sequence[str]) -> None:
    config, others = split(argv)
    note_repeated(config)
    parser = _parser()
    args = parser.parse_args(others)
    args.config = config
    args.command = shlex.join([*program_words("certify"), *argv])
    _check_flags(parser.given, args)
    args.mode = ATTACK.name if args.attack else args.mode
    if args.merge:
        done = merge(args.merge, args.output)
        say(f"{args.output}: {done.images} images of {len(args.merge)} shards\nnext: {_analyze(args.output)}")
        return
    fix_number_types()
    keep_compiled()
    use_cores()
    keep_memory()
    if args.verify is not None:
        _verify(args)
    else:
        _answer_all(args)


def _check_flags(flags: Collection[str], args: Any) -> None:
    """Raise a `UserError` for flags that exclude each other, or that need another one."""
    given = {*flags, *(["config"] if args.config else [])}
    if any(word.startswith("--config=") for word in args.config):
        given.add("config_file")
    if args.verify is not None or _names_sigma(args.config):
        given.add("sigma")
    merging = [("merge", other) for other in sorted(flags) if other not in ("merge", "output")]  # it only reads files
    check_flags(given, exclusive=[*merging, ("merge", "config"), *_EXCLUSIVE], needed=_NEEDED)


def _names_sigma(config: Sequence[str]) -> bool:
    """Return whether the words of a configuration name sigma: by a cell, or by its key."""
    words = [word.partition("=") for word in config]
    cells = [value.partition(":")[2] for name, _, value in words if name == "--config"]
    return any(name == "--config.sigma" for name, _, _ in words) or any("sigma=" in cell for cell in cells)


def _read_config(args: Any, dtype: str | None) -> ConfigDict:
    """Return the configuration of the run, or the one named beside a PyTorch checkpoint, with a dtype if not None."""
    if args.workdir is not None:
        config = read_config(args.workdir)
    else:
        config = parse(args.config).config
        config.method = "gaussian"  # the training does not matter here, nor does a key that another method would need
        validate(config, num_devices=1)
        if args.torch_input is not None:
            one_of("torch_input", args.torch_input, INPUT_LAYERS)
    if dtype is not None:
        one_of("dtype", dtype, DTYPES)
        config.dtype = dtype
    return config


def _read_source(args: Any, config: ConfigDict, images: str, devices: Sequence[jax.Device]) -> Source:
    """Read checkpoint and images, after all settings were checked."""
    places = {"split": images, "devices": devices, "data_dir": args.data_dir or "", "cache_dir": args.cache_dir or ""}
    if args.workdir is not None:
        return Source.from_run(args.workdir, config, **places)
    return Source.from_torch(args.torch_checkpoint, config, input_layer=args.torch_input or "normalize", **places)


def _answer_all(args: Any) -> None:
    """Ask the question about every image that the file does not hold yet; with --dry_run, print the plan."""
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    config, devices = _read_config(args, args.dtype), parallel.choose_devices(args.num_devices)
    skip = whole_number("skip", args.skip, at_least=1)
    most = None if args.max is None else whole_number("max", args.max, at_least=1)
    shard = None if args.shard is None else parse_shard(args.shard)
    output = _output(args)
    there = _record_there(output)
    settings = {name: getattr(args, name) for name in _CHOICES}
    settings["sigma"] = config.sigma if args.sigma is None else args.sigma
    if args.seed == _FRESH:
        settings["seed"] = _fresh_seed(output, there, shard)
    if args.batch_size is None:
        settings["batch_size"] = _recorded_batch_size(there, devices)
    info = data.dataset_info(config.dataset.name)
    question = make_question(args.mode, **settings, info=info, devices=devices)
    source = _read_source(args, config, args.split, devices)
    if args.workdir is not None:
        _check_finished(args, source)
    selection = Selection(len(source.split), skip, most, shard)
    identity = {**question.identity(), **source.binding}
    held = {"schema": question.schema, "identity": identity, "selection": selection}
    if args.dry_run:
        print(plan(source, question, selection, output, answered=check_answers(output, **held)))
        return
    about = {
        **source.about(question),
        "seed_source": _DRAWN if args.seed == _FRESH else _GIVEN,
        "command": args.command,
    }
    with closing(CertificateFile(output, **held, about=about)) as file:
        say(f"devices: {parallel.describe(devices)}")
        _fill(file, source.answers(question, file.remaining))
        file.finish()
    say(_summary(file, question))
    if question.schema is ATTACK:
        _compare_with_certificates(output)


def _record_there(output: Path) -> Record | None:
    """Return the record of a file that holds images already, or None."""
    beside = record_path(output)
    begun = output.is_file() and beside.is_file() and output.read_bytes().count(b"\n") > 1
    return Record.read(beside) if begun else None


def _fresh_seed(output: Path, there: Record | None, shard: Shard | None) -> int:
    """Return a seed that nobody could know, or the fresh seed with which the file was begun."""
    if shard is not None:
        raise UserError(
            f"seed={_FRESH}: shards share a seed; draw one, such as --seed={secrets.randbits(32)}, and give it to all"
        )
    if there is None:
        return secrets.randbits(32)
    if there.content.get("seed_source") != _DRAWN:
        raise UserError(
            f"seed={_FRESH}: {output} was begun with the given seed {there.settings.seed}; choose another --output"
        )
    return there.settings.seed


def _recorded_batch_size(there: Record | None, devices: Sequence[jax.Device]) -> int | None:
    """Return the batch size that makes a file's network the recorded function; None if nothing is recorded."""
    rows = there and there.rows_per_device(devices[0].platform)
    return rows and rows * len(devices)


def _check_finished(args: Any, source: Source) -> None:
    """End the program with --finished, or print a note, where the checkpoint is not the last of the training."""
    last_step = finished_step(args.workdir, source.config)
    unfinished = last_step is not None and source.step < last_step
    if args.finished and (unfinished or last_step is None):
        fail(
            f"workdir={args.workdir}: the newest checkpoint that can be read is of step {source.step} of"
            f" {last_step or 'a number not known'}; train.py goes on from there, or leave out --finished",
            status=EXIT_NOT_FINISHED,
        )
    if unfinished:
        note(
            f"the training is not finished: step {source.step} of {last_step}; another checkpoint needs another"
            " --output"
        )


def _fill(file: CertificateFile, answers: Iterator[list[Row]]) -> None:
    """Append the rows to the file as they come."""
    done = file.progress.images
    if done:
        note(f"{file.path} holds {done} images already")
    with progress_bar(
        "attacking" if file.schema is ATTACK else "certifying", done + len(file.remaining), initial=done
    ) as bar:
        for rows in answers:
            file.append(rows)
            if file.schema.name == CERTIFY.name:  # also of an earlier version
                bar.set_postfix(ACR=f"{file.progress.acr:.4f}", refresh=False)
            bar.update(len(rows))


def _summary(file: CertificateFile, question: Question) -> str:
    done = file.progress
    if question.schema is DECIDE:
        rows = read_table(file.path).rows.values()
        number = {word: sum(row["decision"] == word for row in rows) for word in ("not_certified", "undecided")}
        votes = sum(row["votes"] for row in rows) / done.images
        return (
            f"{file.path}: {done.images} images, at radius {question.radius:g} certified"
            f" {done.images - done.abstained} (of the right class {done.correct}), not certified"
            f" {number['not_certified']}, undecided {number['undecided']}; {votes:.0f} votes a decision, n0 ="
            f" {question.votes.n0} more"
        )
    if question.schema is ATTACK:
        distances = [
            float(row["distance"]) for row in read_table(file.path).rows.values() if row["adversarial"] != ABSTAIN
        ]
        middle = f", median distance {np.median(distances):.4f}" if distances else ""
        return f"{file.path}: {done.images} images, {len(distances)} adversarial images proven{middle}"
    measures = f"accuracy {done.correct / done.images:.4f}, abstained {done.abstained}"
    if question.tolerance is not None:
        votes = sum(row["votes"] for row in read_table(file.path).rows.values()) / done.images
        measures += f", {votes:,.0f} of {question.votes.n:,} votes an image"
    if question.schema is CERTIFY:
        measures = f"ACR {done.acr:.4f}, {measures}\nnext: {_analyze(file.path)}"
    return f"{file.path}: {done.images} images, {measures}"


def _compare_with_certificates(output: Path) -> None:
    """Print an alarm for each attack inside a certified radius of the file beside it, and exit with its status."""
    attacks, certificates = read_table(output), beside(output, CERTIFY)
    if certificates is None:
        note(f"no {FILES[CERTIFY.name]}.tsv lies beside {output}: no certificate to compare with")
        return
    if differing := differences(certificates.record, attacks.record):
        note(f"{certificates.path} is about another classifier ({'; '.join(differing)}): nothing to compare with")
        return
    both = attacks.rows.keys() & certificates.rows.keys()
    found = alarms(certificates.rows, attacks.rows)
    for index, text in found.items():
        say(f"ALARM: image {index}: {text}")
    say(f"{len(both)} certificates of {certificates.path.name} compared, {len(found)} contradicted")
    if found:
        raise SystemExit(EXIT_CONTRADICTED)


def _verify(args: Any) -> None:
    """Draw lines of a file again, with the settings of its record, and print the report."""
    table = read_table(_output(args))
    if table.record.schema is ATTACK:
        raise UserError(
            f"verify={args.verify}: {table.path} holds attacks, whose search depends on rounding; attack again"
        )
    recorded = {**table.record.identity, "max": table.record.selection.most}
    for name in _KEPT_IN_THE_RECORD:
        named = getattr(args, name)
        if named is not None and named != recorded.get(name):
            raise UserError(
                f"{name}={named}: verify takes the settings that the file names ({name}:"
                f" {recorded.get(name)}); leave it out"
            )
    chosen = audit.choose_lines(table, args.verify, args.verify_seed)
    dtype = recorded.get("dtype")
    config, devices = _read_config(args, dtype if dtype in DTYPES else None), parallel.choose_devices(args.num_devices)
    info = data.dataset_info(config.dataset.name)
    settings = {name: getattr(table.record.settings, name, None) for name in ("sigma", *_CHOICES)}
    settings["batch_size"] = args.batch_size or _recorded_batch_size(table.record, devices)
    question = make_question(table.record.schema.name, **settings, info=info, devices=devices)
    source = _read_source(args, config, recorded.get("split", "test"), devices)
    audit.check_binding(table, {**question.identity(), **source.binding, "split_size": len(source.split)})
    source.check_config(table.record)
    truth = {"labels": source.labels(np.array([*table.rows])), "num_classes": info.num_classes}
    redrawn: list[Row] = []
    with progress_bar("drawing again", len(chosen)) as bar:
        for rows in source.answers(question, chosen):
            redrawn += rows
            bar.update(len(rows))
    report = audit.compare(table, redrawn, source.about(question), **truth)
    print(report.text())
    if not report.ok:
        raise SystemExit(EXIT_NOT_REPRODUCED)


def _output(args: Any) -> Path:
    """Return the file to write or to verify."""
    if args.output is not None:
        return args.output
    mode = args.mode or CERTIFY.name
    one_of("mode", mode, FILES)
    shard = "" if args.shard is None else parse_shard(args.shard).suffix
    return args.workdir / f"{FILES[mode]}{shard}.tsv"


def _analyze(path: Path) -> str:
    return " ".join([*program_words("analyze"), str(path)])


main = entry_point(_main)
