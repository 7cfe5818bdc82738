"""Forecasts of the next idle time, for the hybrid histogram: an autoregression by least squares. Shown in chapter 09.

The paper fits an ARIMA; this is its autoregressive part, ARIMA(p, 0, 0) with a mean, which is what idle times around one
length need. Any other serves as well, statsmodels' for one:

    lambda times: float(ARIMA(times, order=(1, 1, 1)).fit().forecast()[0])
"""

from __future__ import annotations

from collections.abc import Sequence

from sllm_mini.control.keepalive.histogram import Forecaster


def autoregression(order: int = 1, least: int = 4) -> Forecaster:
    """A forecaster: the next value as a linear function of the last `order`, fitted anew at each call in O(n x order^2).

    With fewer than `least` values or `order + 2` their mean; None for none. Raises ValueError for an order below 1.
    """
    if order < 1:
        raise ValueError(f"an autoregression of order {order} looks at nothing; give at least 1")

    def forecast(times: Sequence[float]) -> float | None:
        import numpy as np

        values = np.asarray(times, dtype=float)
        if not len(values):
            return None
        if len(values) < max(least, order + 2):
            return float(values.mean())
        before = np.stack([values[order - lag - 1 : len(values) - lag - 1] for lag in range(order)], axis=1)
        fitted = np.linalg.lstsq(np.column_stack([np.ones(len(before)), before]), values[order:], rcond=None)[0]
        ahead = float(fitted[0] + fitted[1:] @ values[: -order - 1 : -1])
        return ahead if ahead > 0 else float(values.mean())

    return forecast
