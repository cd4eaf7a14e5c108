"""`StockSampler`: the scheduler that diffusers ships which computes what `few_step` computes.

`few_step` denoises at each of the student's times and noises the result anew to the next one.

    network, process     steps   scheduler                           its step
    epsilon, v, x0, VP   one     DDIMScheduler                       to alpha = 1, which leaves x0
      between timesteps  one     EulerDiscreteScheduler              to sigma = 0, which leaves x0
                         few     LCMScheduler                        x0, then fresh noise
    flow                 any     FlowMatchEulerDiscreteScheduler     x0, then fresh noise
                                 with stochastic_sampling
    EDM                  one     EDMEulerScheduler                   to sigma = 0, which leaves x0

DDIM's and LCM's schedules end at the student's noisiest time: a student of t = 399 gets the first
400 betas, so that ``num_inference_steps=1`` means t = 399 without a list of timesteps. Euler's
finds t from sigma / alpha, as `VP` does, to about 1e-3. No scheduler renoises between an EDM
student's steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from fastdistill.diffusion import (
    EDM,
    VP,
    X0,
    EDMPreconditioning,
    Epsilon,
    Flow,
    Parametrisation,
    Process,
    RectifiedFlow,
    V,
)

FLOW_TIMESTEPS = 1000
"""What a flow network is told is t times this."""

_PREDICTIONS: dict[type, str] = {Epsilon: "epsilon", V: "v_prediction", X0: "sample"}
_SCALED_START = 1e-6
"""Standard deviations of the start that differ by less are one."""


@dataclasses.dataclass(frozen=True)
class StockSampler:
    """A scheduler of diffusers, and how it is called."""

    scheduler: str
    """Name of its class."""
    config: dict[str, Any]
    """Its configuration."""
    steps: int
    """``num_inference_steps``."""
    schedule: dict[str, list[Any]]
    """The ``timesteps`` or ``sigmas`` that a call needs; empty where ``steps`` is enough."""
    start: float
    """Standard deviation of the pure noise that the first step reads, in the scheduler's scale."""
    own_start: float
    """The same as a pipeline makes it: the scheduler's ``init_noise_sigma``, or 1."""

    @property
    def starts_itself(self) -> bool:
        """Whether a pipeline starts from the right noise without being given any."""
        return abs(self.start - self.own_start) < _SCALED_START


def stock_sampler(
    process: Process, parametrisation: Parametrisation, times: Sequence[float]
) -> StockSampler:
    """The scheduler and the call that reproduce ``few_step(student, process, times, ...)``.

    Args:
        process: the student's process.
        parametrisation: what the student's network predicts.
        times: the student's times from the noisiest on, in the process' clock.

    Raises:
        ValueError: for what no scheduler of diffusers computes.
    """
    if not times or any(later >= earlier for earlier, later in itertools.pairwise(times)):
        raise ValueError(
            f"the student's times are {list(times)}; expected one or more, from the noisiest on"
        )
    start = float(process.start_scale(torch.tensor(times[0], dtype=torch.float64)))
    if isinstance(process, VP) and type(parametrisation) in _PREDICTIONS:
        _check_time_scale(parametrisation, 1)
        return _vp(process, _PREDICTIONS[type(parametrisation)], times, start)
    if isinstance(process, RectifiedFlow) and isinstance(parametrisation, Flow):
        _check_time_scale(parametrisation, FLOW_TIMESTEPS)
        return _flow(times, start)
    if isinstance(process, EDM) and isinstance(parametrisation, EDMPreconditioning):
        return _edm(process, parametrisation, times, start)
    raise ValueError(
        f"diffusers has no scheduler for a network that predicts {type(parametrisation).__name__} "
        f"on process {type(process).__name__}; exported are Epsilon, V and X0 on VP, Flow on "
        "RectifiedFlow and EDMPreconditioning on EDM"
    )


def _check_time_scale(parametrisation: Any, expected: float) -> None:
    if parametrisation.time_scale != expected:
        raise ValueError(
            f"the student's network is told t times {parametrisation.time_scale}; diffusers' "
            f"schedulers tell t times {expected}"
        )


def _vp(process: VP, prediction: str, times: Sequence[float], start: float) -> StockSampler:
    timesteps = [int(time) for time in times]
    if timesteps != list(times) and len(times) == 1 and 0 < times[0] < process.steps - 1:
        return _vp_between(process, prediction, times[0], start)
    if timesteps != list(times) or timesteps[-1] < 1 or timesteps[0] >= process.steps:
        raise ValueError(
            f"the student's times are {list(times)}; diffusers' schedulers know whole timesteps "
            f"from 1 to {process.steps - 1}, and others for a single step alone"
        )
    length, steps = timesteps[0] + 1, len(timesteps)
    config = {
        "num_train_timesteps": length,
        **_betas(process, length),
        "prediction_type": prediction,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    if steps == 1:
        config["timestep_spacing"] = "trailing"
        return StockSampler("DDIMScheduler", config, 1, {}, start, 1.0)
    # 1 - c_out and c_skip, a consistency model's, are below 1e-12 then.
    config["timestep_scaling"] = 1e6
    even = [length // steps * k - 1 for k in range(steps, 0, -1)] == timesteps
    config["original_inference_steps"] = steps if even else length
    schedule: dict[str, list[Any]] = {} if even else {"timesteps": timesteps}
    return StockSampler("LCMScheduler", config, steps, schedule, start, 1.0)


def _vp_between(process: VP, prediction: str, time: float, start: float) -> StockSampler:
    """One step from a time between two timesteps, which Karras' grid of one level gives."""
    alpha, sigma = process.alpha_sigma(torch.tensor(time, dtype=torch.float64))
    ratio = float(sigma / alpha)
    config = {
        "num_train_timesteps": process.steps,
        **_betas(process, process.steps),
        "prediction_type": prediction,
        "use_karras_sigmas": True,
        "sigma_min": ratio,
        "sigma_max": ratio,
        "timestep_spacing": "leading",
    }
    return StockSampler(
        "EulerDiscreteScheduler", config, 1, {}, start / float(alpha), (ratio**2 + 1) ** 0.5
    )


def _betas(process: VP, length: int) -> dict[str, Any]:
    """The first betas of the process, by their law where they are all of it."""
    if length == process.steps:
        return {
            "beta_start": process.beta_start,
            "beta_end": process.beta_end,
            "beta_schedule": process.spacing,
        }
    t = torch.arange(length, dtype=torch.float64)
    alpha_bar = process.alpha_sigma(t).alpha.square()
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    return {"trained_betas": (1 - alpha_bar / before).tolist()}


def _flow(times: Sequence[float], start: float) -> StockSampler:
    config = {
        "num_train_timesteps": FLOW_TIMESTEPS,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "stochastic_sampling": True,
    }
    schedule = {} if list(times) == [1.0] else {"sigmas": list(times)}
    return StockSampler("FlowMatchEulerDiscreteScheduler", config, len(times), schedule, start, 1.0)


def _edm(
    process: EDM, parametrisation: EDMPreconditioning, times: Sequence[float], start: float
) -> StockSampler:
    if len(times) > 1:
        raise ValueError(
            f"the student takes {len(times)} steps; diffusers has no scheduler that renoises an "
            "EDM student between steps, so only one-step students can be exported"
        )
    sigma = times[0]
    config = {
        "sigma_min": min(process.sigma_min, sigma),
        "sigma_max": sigma,
        "sigma_data": parametrisation.sigma_data,
        "rho": process.rho,
        "prediction_type": "epsilon",
    }
    own_start = (sigma**2 + 1) ** 0.5
    return StockSampler("EDMEulerScheduler", config, 1, {}, start, own_start)
