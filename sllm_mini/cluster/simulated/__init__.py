"""A cluster in simulated time: the driver that runs the same `Controller` as the live ones, thousands of requests a second.

`driver` is the loop, `parts` what it remembers, `links` and `store` what loads contend for, `moving` how long a live
migration takes, `account` where device time and memory went, `table` one row per request, `result` and `chrome` what is
made of it all, `policies` names them, `checks` says what cannot be, `run` is the one call `simulate`. Importing this package costs nothing. Taught in chapters 08 to 10.
"""

from __future__ import annotations

from sllm_mini.lazy import lazy_names

_HOMES = {
    "Account": "account",
    "InstanceSpan": "account",
    "MisfitWarning": "checks",
    "ModelSummary": "summary",
    "RequestRow": "table",
    "RequestTable": "table",
    "SimulatedCluster": "driver",
    "SimulationError": "parts",
    "SimulationOptions": "options",
    "SimulationResult": "result",
    "Spread": "summary",
    "even_cluster": "run",
    "make_policies": "policies",
    "misfits": "checks",
    "move_rounds": "moving",
    "simulate": "run",
    "write_chrome_trace": "chrome",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list
__getattr__ = lazy_names(__name__, _HOMES)
