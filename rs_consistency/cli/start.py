"""The start of each program, before its slow imports: `train()` is train.py, and the installed rs-train."""

from functools import partial

from rs_consistency.common.process import run

train, certify, analyze, reproduce, export_torch, prepare = (
    partial(run, f"rs_consistency.cli.{name}")
    for name in ("train", "certify", "analyze", "reproduce", "export_torch", "prepare")
)
