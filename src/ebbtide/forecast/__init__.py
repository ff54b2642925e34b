"""What a learning rate, a weight decay and their schedules will do over a run.

`forecast` looks at one set of settings, `forecast_groups` at the parameter groups of an
optimizer; `ebbtide.torch.explain` and `ebbtide explain` print what they return.

Imports the standard library and the mathematics below it; pictures import matplotlib when
they are asked for.
"""

from ebbtide.forecast.plot import Curve, plot_curves
from ebbtide.forecast.report import DecayForecast, Duration, Equilibrium, Moment, RunForecast
from ebbtide.forecast.run import EXACT_STEPS, forecast, forecast_groups
from ebbtide.forecast.settings import DecaySettings
from ebbtide.forecast.verdict import VERDICTS, judge

__all__ = [
    "EXACT_STEPS",
    "VERDICTS",
    "Curve",
    "DecayForecast",
    "DecaySettings",
    "Duration",
    "Equilibrium",
    "Moment",
    "RunForecast",
    "forecast",
    "forecast_groups",
    "judge",
    "plot_curves",
]
