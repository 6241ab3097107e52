"""Certifies the classifier of a run by randomized smoothing; run again, it continues.

    python certify.py --workdir=runs/mnist

For every image: the class that the smoothed classifier predicts, and an l2 radius within which, with probability
1 - alpha, no perturbation changes it. Writes certificates.tsv (a line per image) and certificates.json.

    python certify.py --workdir=runs/mnist --mode=decide --radius=0.5     only whether it is certified at one radius
    python certify.py --workdir=runs/mnist --mode=predict                 only the class, or abstention
    python certify.py --workdir=runs/mnist --verify=20                    draws 20 lines of the file again
    python certify.py --workdir=runs/mnist --shard=2/5                    one fifth, on one of five machines
    python certify.py --merge certificates-?-of-5.tsv --output=all.tsv    the fifths together

    python certify.py --torch_checkpoint=checkpoint.pth.tar --config=configs/cifar10.py --sigma=0.5 --output=theirs.tsv

Installed, the program is rs-certify.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rs_consistency.certificates import audit
from rs_consistency.certificates.columns import CERTIFY, DECIDE, SCHEMAS, Row
from rs_consistency.certificates.merge import merge
from rs_consistency.certificates.question import FILES, Question, make_question, question_of_record
from rs_consistency.certificates.read import read_table
from rs_consistency.certificates.record import PROVENANCE
from rs_consistency.certificates.selection import Selection, parse_shard
from rs_consistency.certificates.source import Classifier, names_sigma
from rs_consistency.certificates.write import CertificateFile, check_answers
from rs_consistency.cli.common import Parser, fail, program_words, run_main, run_program, whole
from rs_consistency.cli.config_file import split
from rs_consistency.common.checks import one_of, whole_number
from rs_consistency.common.errors import EXIT_NOT_FINISHED, EXIT_NOT_REPRODUCED, UserError, note
from rs_consistency.devices import parallel
from rs_consistency.devices.host import keep_compiled, keep_memory, use_cores
from rs_consistency.models import DTYPES
from rs_consistency.models.torch_checkpoints import INPUT_LAYERS
from rs_consistency.statistics.bounds import ALPHA, BOUNDS, N0, N
from rs_consistency.training.runs import finished_step

_SECONDS_BETWEEN_LINES = 30  # of the progress, where stderr is a file


# Kept out of argparse, so that it is known what the user named.
_DEFAULTS = {"n": N, "alpha": ALPHA, "skip": 1, "split": "test", "seed": 0}
_KEPT_IN_THE_RECORD = ("sigma", "n0", "bound", "radius", "dtype", *_DEFAULTS)


def _parser() -> Parser:
    parser = Parser(prog=program_words("certify")[-1], description=__doc__)
    add = parser.add_argument
    add("--workdir", type=Path, help="folder of a run of train.py")
    add(
        "--torch_checkpoint",
        type=Path,
        metavar="FILE",
        help="instead of a run: a checkpoint of the published PyTorch code; needs --config=FILE, sigma and --output",
    )
    add("--torch_input", help=f"layer in front of its model: {', '.join(INPUT_LAYERS)} (default: normalize)")
    add("--mode", default=CERTIFY.name, help=f"{', '.join(SCHEMAS)} (default: %(default)s)")
    add("--radius", type=float, help="of --mode=decide")
    add("--bound", help=f"of --mode=certify: {', '.join(BOUNDS)} (default: {BOUNDS[0]})")
    add("--n0", type=whole, help=f"votes that choose the class (default: {N0})")
    add("--n", type=whole, help=f"further votes, in mode decide at most so many (default: {N})")
    add("--alpha", type=float, help=f"error probability of a certificate (default: {ALPHA})")
    add("--sigma", type=float, help="standard deviation of the noise (default: the one used in training)")
    add("--dtype", help=f"what the model computes in: {', '.join(DTYPES)} (default: as in training)")
    add("--skip", type=whole, help="certify every SKIP-th image (default: 1)")
    add("--max", type=whole, help="certify at most so many images (default: all)")
    add("--shard", help="I/K: only share I of K of these images")
    add("--split", help="train or test (default: test)")
    add("--seed", type=whole, help="of the noise (default: 0)")
    add(
        "--finished",
        action="store_true",
        help=f"only with the training's last checkpoint; status {EXIT_NOT_FINISHED} where that is missing or damaged",
    )
    add("--batch_size", type=whole, help="noisy images at a time; no effect on the votes (default: by device)")
    add(
        "--num_devices",
        type=whole,
        default=0,
        help="devices that share the work; no effect on the votes (default: all)",
    )
    add("--data_dir", default="", help="folder of the prepared dataset (default: as in training)")
    add("--cache_dir", default="", help="folder of decoded images (default: as in training)")
    add("--output", type=Path, help="the file to write, or to verify (default: by mode and shard, in the workdir)")
    add(
        "--dry_run",
        action="store_true",
        help="print plan, shapes, parameters, memory and a measured estimate of the time; write nothing but caches",
    )
    add("--verify", type=whole, metavar="K", help="draw K random lines of the file again, with the settings it names")
    add("--verify_seed", type=whole, help="which lines (default: nobody can know)")
    add("--merge", nargs="+", type=Path, metavar="FILE", help="put the files of all shards together, into --output")
    return parser


def _main(argv: Sequence[str] | None) -> None:
    named = sys.argv[1:] if argv is None else list(argv)
    config, others = split(named)  # a configuration is named as for train.py: --config=FILE:CELL --config.KEY=VALUE
    args = _parser().parse_args(others)
    args.config = config
    args.command = shlex.join([*program_words("certify"), *named])
    if args.merge:
        if args.dry_run:
            raise UserError("dry_run says what certifying would take, and merging takes seconds; leave out one")
        if args.output is None:
            raise UserError("merge needs the file to write: add --output=FILE.tsv")
        output = args.output.expanduser()
        done = merge([path.expanduser() for path in args.merge], output)
        print(f"{output}: {done.images} images of {len(args.merge)} shards\nnext: {_analyze(output)}")
        return
    _check_source(args)
    if args.verify_seed is not None and args.verify is None:
        raise UserError(f"verify_seed={args.verify_seed} chooses what is verified; add --verify=K")
    keep_compiled()
    use_cores()
    keep_memory()
    if args.finished and args.verify is not None:
        raise UserError("finished is for new lines, and verify draws some of a file again; leave out one")
    if args.verify is not None and args.dry_run:
        raise UserError("dry_run says what answering would take; leave out --verify, or --dry_run")
    if args.verify is not None:
        _verify(args)
    else:
        _answer_all(args)


def _check_source(args: Any) -> None:
    """Either a run, or a PyTorch checkpoint with all that it does not say."""
    if args.torch_checkpoint is None:
        if args.workdir is None:
            raise UserError(
                "workdir is missing: add --workdir=FOLDER of a run of train.py, --torch_checkpoint=FILE, or --merge"
            )
        if args.config:
            raise UserError(f"{args.config[0].lstrip('-')}: a run has its own configuration; leave it out")
        if args.torch_input is not None:
            raise UserError(f"torch_input={args.torch_input} is of --torch_checkpoint; leave it out")
        return
    if args.finished:
        raise UserError("finished is about the training of a --workdir; leave it out")
    if args.workdir is not None:
        raise UserError(f"torch_checkpoint={args.torch_checkpoint} and workdir={args.workdir}: give one of them")
    if not any(word.startswith("--config=") for word in args.config):
        raise UserError("torch_checkpoint needs --config=FILE, such as configs/cifar10.py: model and dataset")
    if args.sigma is None and args.verify is None and not names_sigma(args.config):
        raise UserError(
            "torch_checkpoint does not say which noise it was trained for; add --sigma=NUMBER, or the cell:"
            " --config=FILE:method=NAME,sigma=NUMBER"
        )
    if args.output is None:
        raise UserError("torch_checkpoint needs the file to write: add --output=FILE.tsv")


def _answer_all(args: Any) -> None:
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    classifier = Classifier(args, split=args.split)
    config = classifier.config
    question = make_question(
        args.mode,
        sigma=config.sigma if args.sigma is None else args.sigma,
        n0=args.n0,
        n=args.n,
        alpha=args.alpha,
        seed=args.seed,
        bound=args.bound,
        radius=args.radius,
        batch_size=args.batch_size,
        info=classifier.info,
        platform=classifier.platform,
    )
    skip = whole_number("skip", args.skip, at_least=1)
    most = None if args.max is None else whole_number("max", args.max, at_least=1)
    shard = None if args.shard is None else parse_shard(args.shard)
    classifier.read()
    last_step = finished_step(classifier.workdir, config) if classifier.workdir else None
    unfinished = last_step is not None and classifier.step < last_step
    if args.finished and (unfinished or last_step is None):
        fail(
            f"workdir={classifier.workdir}: the newest checkpoint that can be read is of step {classifier.step} of"
            f" {last_step or 'a number not known'}; train.py goes on from there, or leave out --finished",
            status=EXIT_NOT_FINISHED,
        )
    if unfinished:
        note(
            f"the training is not finished: step {classifier.step} of {last_step}; another checkpoint needs another"
            " --output"
        )
    selection = Selection(len(classifier.split), skip, most, shard)
    output = _output(args, question.schema.name)
    identity = {**question.identity(), **classifier.binding}
    if args.dry_run:
        answered = check_answers(output, schema=question.schema, identity=identity, selection=selection)
        print(classifier.plan(question, selection, output, answered=answered))
        return
    file = CertificateFile(
        output,
        schema=question.schema,
        identity=identity,
        about={**classifier.about(question.votes.sigma), "command": args.command},
        selection=selection,
    )
    print(f"devices: {parallel.describe(classifier.devices)}", flush=True)
    try:
        _fill(file, classifier.answers(question, file.remaining))
        file.finish()
    finally:
        file.close()
    print(_summary(file, question))


def _fill(file: CertificateFile, answers: Iterator[list[Row]]) -> None:
    """Adds the images that the file does not hold yet, as their answers come."""
    done_before, remaining = file.progress.images, len(file.remaining)
    if done_before:
        note(f"{file.path} holds {done_before} images already")
    bar = tqdm(
        total=done_before + remaining,
        initial=done_before,
        desc="certifying",
        unit="img",
        mininterval=0.5 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
    )
    with bar:
        for rows in answers:
            file.append(rows)
            if file.schema is CERTIFY:
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
    measures = f"accuracy {done.correct / done.images:.4f}, abstained {done.abstained}"
    if question.schema is CERTIFY:
        measures = f"ACR {done.acr:.4f}, {measures}\nnext: {_analyze(file.path)}"
    return f"{file.path}: {done.images} images, {measures}"


def _verify(args: Any) -> None:
    """Draws some lines of a file again, with the settings of its record."""
    table = read_table(_output(args, args.mode))
    recorded = table.record.identity
    for name in _KEPT_IN_THE_RECORD:
        named = getattr(args, name)
        if named is not None and named != recorded.get(name):
            raise UserError(
                f"{name}={named}: verify takes the settings that the file names ({name}:"
                f" {recorded.get(name)}); leave it out"
            )
    chosen = audit.choose_lines(table, args.verify, args.verify_seed)
    classifier = Classifier(args, split=recorded.get("split", "test"))
    if recorded.get("dtype") in DTYPES:
        classifier.config.dtype = recorded["dtype"]
    question = question_of_record(
        recorded, info=classifier.info, platform=classifier.platform, batch_size=args.batch_size
    )
    classifier.read()
    audit.check_binding(table, classifier.binding)
    here = {key: value for key, value in classifier.about(question.votes.sigma).items() if key in PROVENANCE}
    redrawn: list[Row] = []
    with tqdm(total=len(chosen), desc="drawing again", unit="img") as bar:
        for rows in classifier.answers(question, chosen):
            redrawn += rows
            bar.update(len(rows))
    report = audit.compare(table, redrawn, here)
    print(report.text())
    if not report.ok:
        raise SystemExit(EXIT_NOT_REPRODUCED)


def _output(args: Any, mode: str) -> Path:
    if args.output is not None:
        return args.output.expanduser()
    one_of("mode", mode, FILES)
    shard = "" if args.shard is None else parse_shard(args.shard).suffix
    return args.workdir.expanduser() / f"{FILES[mode]}{shard}.tsv"


def _analyze(path: Path) -> str:
    return " ".join([*program_words("analyze"), str(path)])


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_main(_main, argv)


def run() -> None:
    """The command, as all that its process does."""
    run_program(main)
