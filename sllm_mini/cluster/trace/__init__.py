"""One workload format for simulation and for live runs: who asks for which model, when, and for how many tokens.

`request` holds the words, `file` the format on disk, `published` reads the traces that others published, `workloads`
generates synthetic ones and `summary` says what is in any of them. Everything streams: ten million requests need no
more memory than ten. Importing this package costs nothing. Taught in chapters 08 and 09.
"""

from __future__ import annotations

from sllm_mini.lazy import lazy_names

_HOMES = {
    "CODE_TOKENS": "tokens",
    "CONVERSATION_TOKENS": "tokens",
    "FaasFunction": "workloads",
    "ModelStatistics": "summary",
    "Spread": "summary",
    "TokenLengths": "tokens",
    "TokenProfile": "tokens",
    "Trace": "request",
    "TraceLabel": "request",
    "TraceRequest": "request",
    "TraceStatistics": "summary",
    "assign_models": "workloads",
    "burst_trace": "workloads",
    "describe": "summary",
    "diurnal_trace": "workloads",
    "faas_functions": "workloads",
    "faas_trace": "workloads",
    "import_trace": "published",
    "iter_trace": "file",
    "open_trace": "file",
    "read_trace": "file",
    "shipped_trace": "shipped",
    "write_trace": "file",
    "zipf_shares": "arrivals",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list
__getattr__ = lazy_names(__name__, _HOMES)
