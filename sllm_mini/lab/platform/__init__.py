"""A serverless LLM platform whose techniques are switches: one trace, live and forecast, row by row. Chapter 11."""

from sllm_mini.lab.platform.contest import Row, Run, contest
from sllm_mini.lab.platform.forecast import Costs, calibrate, forecast
from sllm_mini.lab.platform.switches import SWITCHES, Platform, bursts, platform_with, stretched, switched

__all__ = ["SWITCHES", "Costs", "Platform", "Row", "Run", "bursts", "calibrate", "contest", "forecast", "platform_with", "stretched", "switched"]
