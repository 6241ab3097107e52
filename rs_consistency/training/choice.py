"""The choice of training examples between two epochs, for a method that weighs them."""

from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.common.progress import progress_bar
from rs_consistency.devices import parallel
from rs_consistency.methods.base import Accuracy, Choose
from rs_consistency.noise import Stream
from rs_consistency.smoothing.votes import VoteSettings, count_votes
from rs_consistency.statistics.samplers import FLOAT
from rs_consistency.training.runs import Run
from rs_consistency.training.step import TrainState


def choose_examples(
    choose: Choose, config: ConfigDict, state: TrainState, epoch: int, split: data.Split, devices: Sequence[jax.Device]
) -> TrainState:
    """Return the state with the weights of the epoch (from 0) that it is about to begin.

    They are a function of config, state, data and epoch. Raise a `ValueError` where the method returns no weights.
    """
    accuracy = _accuracy(Run(config, int(state.step), state.variables), epoch, split, devices)
    weights = np.asarray(choose(config, epoch, np.asarray(state.weights), accuracy), np.float32)
    if weights.shape != (len(split),) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(
            f"method {config.method} chose weights {weights} of shape {weights.shape}: give {len(split)} finite numbers"
            " of at least 0, and some above 0"
        )
    return state.replace(weights=parallel.replicate(weights, devices))


def _accuracy(run: Run, epoch: int, split: data.Split, devices: Sequence[jax.Device]) -> Accuracy:
    """Return the accuracy of a run's classifier on the training images; every call has its own noise."""
    config, calls = run.config, 0

    def accuracy(num_votes: int, asked: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        numbers, right = np.flatnonzero(asked), np.zeros(len(split), np.int64)
        groups = count_votes(
            *run.classifier(),
            split.images[numbers],
            numbers,
            settings=VoteSettings.for_dataset(
                data.dataset_info(config.dataset.name),
                sigma=config.sigma,
                n=num_votes,
                seed=config.seed,
                sampler=FLOAT,  # as the noise of training
                precision="default",
                devices=devices,
            ),
            devices=devices,
            stream=Stream.CHOOSE,
            occasion=(epoch, calls),
        )
        done = 0
        with progress_bar(f"{num_votes} votes on each training image", len(numbers), brief=True) as bar:
            for votes in groups:
                answered = numbers[done : done + len(votes.counts)]
                right[answered] = votes.counts[np.arange(len(answered)), split.labels[answered]]
                done += len(answered)
                bar.update(len(answered))
        return right / num_votes

    return accuracy
