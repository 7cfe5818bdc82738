"""Chapter 08: the trace format, the readers of published traces, the generators, and what their figures are."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Run as RunCommand
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_mini.cluster.trace import (
    CODE_TOKENS,
    CONVERSATION_TOKENS,
    FaasFunction,
    TokenLengths,
    Trace,
    TraceLabel,
    TraceRequest,
    assign_models,
    burst_trace,
    describe,
    diurnal_trace,
    faas_functions,
    faas_trace,
    import_trace,
    iter_trace,
    open_trace,
    read_trace,
    shipped_trace,
    write_trace,
    zipf_shares,
)
from sllm_mini.cluster.trace.azure_functions import DURATIONS_2019, YEAR_2019, YEAR_2021
from sllm_mini.cluster.trace.published import AZURE_LLM, BURSTGPT, BURSTGPT_SESSIONS
from sllm_mini.cluster.trace.request import MAX_TOKENS, Again, TraceError
from sllm_mini.cluster.trace.shipped import SHIPPED, make_shipped
from sllm_mini.errors import CheckpointExistsError, FormatError, WriteError

REPOSITORY = Path(__file__).resolve().parent.parent
LABEL = TraceLabel("a", "a test", "synthetic", 1)
ENDINGS = [".csv", ".jsonl", ".csv.gz", ".jsonl.gz"]
HEADER = '# sllm-mini trace 1 {"name":"a","source":"a test","kind":"synthetic"}\narrival_seconds,model,input_tokens,output_tokens,prefix,duration_seconds\n'
JSON_HEADER = '{"format":"sllm-mini trace","version":1,"label":{"name":"a","source":"a test","kind":"synthetic"}}\n'


def trace_of(*requests: TraceRequest) -> Trace:
    return Trace(LABEL, requests)


def ask(arrival: float, model: str = "m", inputs: int = 1, outputs: int = 1) -> TraceRequest:
    return TraceRequest(arrival, model, inputs, outputs)


# The format on disk

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8) | st.sampled_from(['a,b', 'say "hi"', "# x", "a b", "'", "é/ü:latest"])
seconds = st.floats(0, 1e12, allow_nan=False) | st.floats(0, 1e-300)
tokens = st.integers(0, MAX_TOKENS)
bodies = st.tuples(seconds, names, tokens, tokens, st.none() | names, st.none() | seconds)
traces = st.lists(bodies, max_size=12).map(lambda rows: trace_of(*(TraceRequest(*row) for row in sorted(rows, key=lambda row: row[0]))))


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=60)
@given(trace=traces)
def test_every_trace_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, ending: str, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("round") / f"t{ending}"
    assert write_trace(path, trace) == len(list(trace))
    assert read_trace(path) == trace
    assert list(iter_trace(path)) == list(trace)
    opened = open_trace(path)
    assert list(opened) == list(opened) == list(trace)  # it can be run through again
    before = path.read_bytes()
    write_trace(path, read_trace(path), overwrite=True)
    assert path.read_bytes() == before


def test_the_documented_lines_are_what_is_written(tmp_path: Path) -> None:
    trace = trace_of(TraceRequest(0.118301, "model-03", 1155, 211), TraceRequest(2.0, "f", 0, 0, "s", 0.5))
    write_trace(tmp_path / "t.csv", trace)
    assert (tmp_path / "t.csv").read_text() == HEADER.replace('"synthetic"}', '"synthetic","seed":1}') + "0.118301,model-03,1155,211,,\n2.0,f,0,0,s,0.5\n"
    write_trace(tmp_path / "t.jsonl", trace)
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert lines == [
        {"format": "sllm-mini trace", "version": 1, "label": {"name": "a", "source": "a test", "kind": "synthetic", "seed": 1}},
        {"arrival_seconds": 0.118301, "model": "model-03", "input_tokens": 1155, "output_tokens": 211},
        {"arrival_seconds": 2.0, "model": "f", "input_tokens": 0, "output_tokens": 0, "prefix": "s", "duration_seconds": 0.5},
    ]


def test_gzip_carries_no_time_and_no_name(tmp_path: Path) -> None:
    """Or the same trace would give other bytes a second later."""
    write_trace(tmp_path / "t.csv.gz", trace_of(ask(1)))
    header = (tmp_path / "t.csv.gz").read_bytes()[:10]
    assert header[3] == 0 and header[4:8] == bytes(4)


def test_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(("\ufeff" + HEADER + "1,m,2,3,,\n").replace("\n", "\r\n").encode())
    assert list(iter_trace(tmp_path / "t.csv")) == [TraceRequest(1.0, "m", 2, 3)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1,m,2,3,\n", "5 columns where the header has 6"),
        ("1,m,2,3,,,\n", "7 columns"),
        ("\n", "0 columns"),
        ("x,m,2,3,,\n", "arrival_seconds is 'x'"),
        ("-1,m,2,3,,\n", "arrival_seconds is '-1'"),
        ("nan,m,2,3,,\n", "arrival_seconds is 'nan'"),
        ("1e999,m,2,3,,\n", "arrival_seconds is '1e999'"),
        ("1_0,m,2,3,,\n", "arrival_seconds is '1_0'"),
        (" 1,m,2,3,,\n", "arrival_seconds is ' 1'"),
        ("1,m,2.5,3,,\n", "input_tokens is '2.5'; give a whole number"),
        ("1,m,2,-3,,\n", "output_tokens is '-3'"),
        ("1,m,2,٣,,\n", "output_tokens is"),
        ("1,m,2,1000000001,,\n", "output_tokens is '1000000001'"),
        (f"1,m,{'9' * 5000},3,,\n", "input_tokens is '9"),
        ("1,,2,3,,\n", "asks for the model ''"),
        ("1, m,2,3,,\n", "asks for the model ' m'"),
        ("1,m\x07,2,3,,\n", "asks for the model 'm\\x07'"),
        ("1,m,2,3, ,\n", "has the prefix ' '"),
        ("1,m,2,3,,-0.5\n", "duration_seconds is '-0.5'"),
        ('1,"m,2,3,,\n', "no row of comma-separated values"),
        ('1,"m"x,2,3,,\n', "no row of comma-separated values"),
        ("0.25,m,2,3,,\n", "after one at 0.5 s; sort the requests"),
        ("1,m,2,3,,", "may have been cut off"),
        ("1,m,2," + "3" * (1 << 20), "longer than"),
    ],
)
def test_a_wrong_row_is_said_in_one_sentence(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "0.5,m,2,3,,\n" + row)
    requests = iter_trace(path)
    assert next(requests) == TraceRequest(0.5, "m", 2, 3)  # what comes before is served
    with pytest.raises(FormatError) as raised:
        next(requests)
        next(requests)
    assert str(raised.value).startswith(f"{path}: line 4: ") and words in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"arrival_seconds":1,"model":"m","input_tokens":2}', "output_tokens"),
        ('{"arrival_seconds":1,"model":"m","input_tokens":2,"output_tokens":3,"x":1}', "unknown field `x`"),
        ('{"arrival_seconds":"1","model":"m","input_tokens":2,"output_tokens":3}', "arrival_seconds"),
        ('{"arrival_seconds":1,"model":"m","input_tokens":2.5,"output_tokens":3}', "input_tokens"),
        ('{"arrival_seconds":1,"model":"m","input_tokens":true,"output_tokens":3}', "input_tokens"),
        ('{"arrival_seconds":1,"model":"m","input_tokens":-2,"output_tokens":3}', "-2 input"),
        ('{"arrival_seconds":1,"model":"m","input_tokens":2,"output_tokens":1000000001}', "1000000001 output"),
        ('{"arrival_seconds":1,"model":"m","input_tokens":2,"output_tokens":3,"prefix":""}', "prefix ''"),
        ('{"arrival_seconds":1,"model":"m","input_tokens":2,"output_tokens":3,"duration_seconds":-1}', "runs for -1"),
        ('{"arrival_seconds":NaN,"model":"m","input_tokens":2,"output_tokens":3}', "no request of a trace"),
        ('{"arrival_seconds":-1,"model":"m","input_tokens":2,"output_tokens":3}', "count seconds from 0"),
        ('{"arrival_seconds":0.1,"model":"m","input_tokens":2,"output_tokens":3}', "sort the requests"),
        ("", "no request of a trace"),
        ("{", "no request of a trace"),
    ],
)
def test_a_wrong_line_of_json_is_said_in_one_sentence(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(JSON_HEADER + '{"arrival_seconds":0.5,"model":"m","input_tokens":2,"output_tokens":3}\n' + row + "\n")
    with pytest.raises(FormatError) as raised:
        read_trace(path)
    assert str(raised.value).startswith(f"{path}: line 3: ") and words in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"", "it is empty"),
        ("t.csv", b"a,b\n1,2\n", "import a published one first"),
        ("t.csv", HEADER.replace("trace 1", "trace 2").encode(), "version '2' and this sllm_mini reads version 1"),
        ("t.csv", HEADER.replace('"a test"', "3").encode(), "the header of the trace is wrong"),
        ("t.csv", HEADER.replace("synthetic", "made up").encode(), "the header of the trace is wrong"),
        ("t.csv", HEADER.replace('"name":"a"', '"name":""').encode(), "the name of a trace is ''"),
        ("t.csv", HEADER.replace("input_tokens", "prompt").encode(), "the columns are not"),
        ("t.csv", HEADER.splitlines()[0].encode(), "the columns are not"),
        ("t.csv", HEADER.encode() + b"\xff\xfe\n", "not UTF-8"),
        ("t.jsonl", JSON_HEADER.replace('"version":1', '"version":2').encode(), "version '2'"),
        ("t.jsonl", b"{}\n", "the header of the trace is wrong"),
        ("t.jsonl", JSON_HEADER.replace("sllm-mini trace", "other").encode(), "the header of the trace is wrong"),
        ("t.csv.gz", HEADER.encode(), "damaged or cut off"),
        ("t.csv.gz", gzip.compress(HEADER.encode() + b"1,m,2,3,,\n" * 9)[:-9], "damaged or cut off"),
        ("t.txt", b"", "end it in .csv, .jsonl"),
    ],
)
def test_a_wrong_file_is_said_in_one_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as raised:
        read_trace(tmp_path / name)
    assert str(raised.value).startswith(str(tmp_path / name)) and words in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_is_a_folder_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, words in (("absent.csv", "No such file"), ("folder.csv", "Is a directory"), ("absent.csv.gz", "No such file")):
        for read in (read_trace, import_trace):
            with pytest.raises(FormatError, match=words):
                read(tmp_path / name)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_fails_while_it_is_written_leaves_what_was_there(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"t{ending}"
    write_trace(path, trace_of(ask(1)))
    before = path.read_bytes()
    with pytest.raises(CheckpointExistsError, match="it exists already"):
        write_trace(path, trace_of(ask(2)))
    with pytest.raises(TraceError, match="sort the requests"):
        write_trace(path, trace_of(*(ask(1) for _ in range(5000)), ask(0.5)), overwrite=True)

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        write_trace(path, trace_of(ask(2)), overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_where_nothing_can_be_written_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No such file"):
        write_trace(tmp_path / "absent" / "t.csv", trace_of())
    with pytest.raises(WriteError, match=r"end it in \.csv"):
        write_trace(tmp_path / "t.json", trace_of())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask(math.nan), "count seconds from 0"),
        (ask(math.inf), "count seconds from 0"),
        (ask(-1), "count seconds from 0"),
        (ask(1, "a\nb"), "name it in printable text"),
        (ask(1, "m", -1), "-1 input"),
        (ask(1, "m", 0, MAX_TOKENS + 1), "1000000001 output"),
        (TraceRequest(1, "m", 0, 0, "a\tb"), "has the prefix"),
        (TraceRequest(1, "m", 0, 0, None, math.nan), "runs for nan"),
    ],
)
def test_no_trace_holds_a_request_that_cannot_be(tmp_path: Path, request_: TraceRequest, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        trace_of(ask(0.5), request_).hold()
    with pytest.raises(TraceError, match="request 2"):
        write_trace(tmp_path / "t.csv", trace_of(ask(0.5), request_))


@pytest.mark.parametrize("wrong", [("", "s", "synthetic"), ("n", "a\nb", "synthetic"), ("n", "s", "measured"), ("n", "s", "recorded", -1), ("n", "s", "recorded", 1 << 63)])
def test_a_label_says_what_it_should(wrong: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match=r"of a trace is|is of kind|has the seed"):
        TraceLabel(*wrong)


def peak_nbytes(run: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def count(items: Iterator[TraceRequest]) -> int:
    return sum(1 for _ in items)


@pytest.mark.parametrize("ending", [".csv", ".jsonl.gz"])
def test_memory_is_flat_in_the_length_of_the_trace(tmp_path: Path, ending: str) -> None:
    def run(requests: int) -> None:
        path = tmp_path / f"t{ending}"
        assert write_trace(path, burst_trace(requests=requests, requests_per_second=2), overwrite=True) == requests
        assert count(iter_trace(path)) == requests
        assert describe(faas_trace(requests=requests)).requests == requests

    run(10)  # what is made once
    short, long = peak_nbytes(lambda: run(300)), peak_nbytes(lambda: run(9000))
    assert long < short + 60_000  # held, 8 700 requests are above 1 MB


# Published traces


def test_azure_llm_2023_as_published(tmp_path: Path) -> None:
    """CRLF, seven digits, no end after the last line."""
    path = tmp_path / "AzureLLMInferenceTrace_code.csv"
    path.write_bytes(f"{AZURE_LLM}\r\n2023-11-16 23:59:59.9799600,4808,10\r\n2023-11-16 23:59:59.9799601,110,27\r\n2023-11-17 00:01:00.0000000,34,12".encode())
    trace = import_trace(path, model="code")
    assert trace.label == TraceLabel("AzureLLMInferenceTrace_code", "Azure LLM inference trace 2023", "recorded")
    wanted = [TraceRequest(0.0, "code", 4808, 10), TraceRequest(1e-7, "code", 110, 27), TraceRequest(60.02004, "code", 34, 12)]
    assert list(trace) == list(trace) == wanted
    packed = tmp_path / "x.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(import_trace(packed, model="code")) == wanted


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2023-11-16 18:17:03.979960,1,2", "write it as"),
        ("2023-11-16T18:17:03.9799600,1,2", "write it as"),
        ("2023-11-16 24:17:03.9799600,1,2", "write it as"),
        ("2023-02-30 18:17:03.9799600,1,2", "no calendar"),
        ("2023-11-16 18:17:03.9799600,1", "2 columns"),
        ("2023-11-16 18:17:03.9799600,1,x", "GeneratedTokens is 'x'"),
        ("2023-11-16 18:17:03.9799600,,2", "ContextTokens is ''"),
        ("2023-11-16 18:17:00.9799600,1,2", "sort the file by TIMESTAMP"),
    ],
)
def test_a_wrong_line_of_azure_llm_is_said_in_one_sentence(tmp_path: Path, row: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(f"{AZURE_LLM}\r\n2023-11-16 18:17:02.0000000,1,2\r\n{row}\r\n")
    with pytest.raises(FormatError, match=words) as raised:
        list(import_trace(tmp_path / "a.csv"))
    assert f"{tmp_path / 'a.csv'}: line 3: " in str(raised.value)


def write_2019(path: Path, counts: dict[str, dict[int, int]]) -> None:
    rows = [f"owner,app,{name},http," + ",".join(str(by_minute.get(minute, 0)) for minute in range(1, 1441)) for name, by_minute in counts.items()]
    path.write_text("\n".join([YEAR_2019, *rows]) + "\n")


def test_azure_functions_2019_as_published(tmp_path: Path) -> None:
    counts = {"f": {1: 3, 7: 1, 1440: 40}, "g": {7: 5}, "never": {}}
    write_2019(tmp_path / "day.csv", counts)
    trace = import_trace(tmp_path / "day.csv", seed=5).hold()
    assert trace.label.kind == "recorded" and trace.label.seed == 5 and "instants within each minute drawn" in trace.label.source
    got: dict[str, Counter[int]] = {}
    for request in trace:
        assert (request.input_tokens, request.output_tokens, request.duration_seconds) == (0, 0, None)
        got.setdefault(request.model.removeprefix("app/"), Counter())[int(request.arrival_seconds // 60) + 1] += 1
    assert got == {name: Counter(by_minute) for name, by_minute in counts.items() if by_minute}
    last = [request.arrival_seconds - 60 * 1439 for request in trace if request.arrival_seconds >= 60 * 1439]
    assert len(set(last)) == 40 and statistics.fmean(last) == pytest.approx(30, abs=10)  # spread, not piled up
    assert list(import_trace(tmp_path / "day.csv", seed=5)) == list(trace)
    assert list(import_trace(tmp_path / "day.csv", seed=6)) != list(trace)


def test_durations_of_2019_are_drawn_between_the_percentiles(tmp_path: Path) -> None:
    write_2019(tmp_path / "day.csv", {"f": {2: 4000}, "g": {3: 2}})
    (tmp_path / "run.csv").write_text(f"{DURATIONS_2019}\nowner,app,f,500,4000,1,9000,100,200,300,400,500,600,2000\n")
    trace = import_trace(tmp_path / "day.csv", durations=tmp_path / "run.csv").hold()
    ran = sorted(request.duration_seconds for request in trace if request.duration_seconds is not None)
    assert len(ran) == 4000 and ran[0] >= 0.1 and ran[-1] <= 2.0
    assert [ran[1000], ran[2000], ran[3000], ran[3960]] == pytest.approx([0.3, 0.4, 0.5, 0.6], abs=0.02)
    assert [request.duration_seconds for request in trace if request.model == "app/g"] == [None, None]


def test_a_wrong_line_of_azure_functions_2019_is_said_in_one_sentence(tmp_path: Path) -> None:
    day, run = tmp_path / "day.csv", tmp_path / "run.csv"
    write_2019(day, {"f": {1: 1}})
    good = day.read_text()
    for bad, words in (
        (good + "o,a,f,http,1\n", "line 3: it has 5 columns where the header has 1444"),
        (good.replace("http,1", "http,-1"), "line 2: 1 is '-1'"),
        (good.replace(",app,", ",,"), "name application and function"),
    ):
        day.write_text(bad)
        with pytest.raises(FormatError, match=words):
            list(import_trace(day))
    day.write_text(good)
    for bad, words in (
        ("a,b\n", "does not begin with HashOwner"),
        (f"{DURATIONS_2019}\nowner,app,f,1,1,1,1,1,2,3,x,5,6,7\n", "percentile_Average_50 is 'x'"),
        (f"{DURATIONS_2019}\nowner,app,f,1,1,1,1,1,2,3,2,5,6,7\n", "fall where they should rise"),
    ):
        run.write_text(bad)
        with pytest.raises(FormatError, match=words) as raised:
            list(import_trace(day, durations=run))
        assert str(run) in str(raised.value)


def test_azure_functions_2021_as_published(tmp_path: Path) -> None:
    """The published file is not in order; an invocation arrives when it begins."""
    path = tmp_path / "two-weeks.txt"
    path.write_text(f"{YEAR_2021}\na,f,5160.5,0.25\nb,f,5200.0,100.0\na,g,5150.0,0\n")
    trace = import_trace(path).hold()
    assert list(trace) == [
        TraceRequest(0.0, "b/f", 0, 0, None, 100.0),
        TraceRequest(50.0, "a/g", 0, 0, None, 0.0),
        TraceRequest(60.25, "a/f", 0, 0, None, 0.25),
    ]
    for row, words in (("a,f,x,1", "end_timestamp is 'x'"), ("a,f,1,-1", "duration is '-1'"), ("a,f,1", "3 columns"), ("a,,1,1", "name application")):
        path.write_text(f"{YEAR_2021}\n{row}\n")
        with pytest.raises(FormatError, match=words):
            list(import_trace(path))


def test_burstgpt_as_published_in_both_forms(tmp_path: Path) -> None:
    old, new = tmp_path / "BurstGPT_1.csv", tmp_path / "BurstGPT_3.csv"
    old.write_text(f"{BURSTGPT}\n5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n118,GPT-4,417,276,693,API log\n")
    assert list(import_trace(old)) == [TraceRequest(0.0, "ChatGPT", 472, 18), TraceRequest(113.0, "GPT-4", 417, 276)]
    assert [request.output_tokens for request in import_trace(old, failures=True)] == [18, 0, 276]
    assert "failed requests left out" in import_trace(old).label.source and "failed" not in import_trace(old, failures=True).label.source
    new.write_text(
        f"{BURSTGPT_SESSIONS}\n19440110.0,1722ac82-0a46,43,GPT-4,906,446,1352,Conversation log\n"
        "19440161.5,1722ac82-0a46,2,ChatGPT,36,29,65,Conversation log\n19440170.0,,,ChatGPT,1,2,3,API log\n"
    )
    assert list(import_trace(new)) == [
        TraceRequest(0.0, "GPT-4", 906, 446, "1722ac82-0a46"),
        TraceRequest(51.5, "ChatGPT", 36, 29, "1722ac82-0a46"),
        TraceRequest(60.0, "ChatGPT", 1, 2),
    ]
    for row, words in (
        ("x,GPT-4,1,2,3,API log", "Timestamp is 'x'"),
        ("4,GPT-4,1,2,3,API log", "sort the file by Timestamp"),
        ("6,,1,2,3,API log", "name the model"),
        ("6,GPT-4,1.5,2,3,API log", "Request tokens is '1.5'"),
        ("6,GPT-4,1,2,3", "5 columns"),
    ):
        old.write_text(f"{BURSTGPT}\n5,ChatGPT,472,18,490,Conversation log\n{row}\n")
        with pytest.raises(FormatError, match=words):
            list(import_trace(old))


def test_import_opens_our_own_format_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for ending in ENDINGS:
        write_trace(tmp_path / f"t{ending}", trace_of(ask(1)))
        assert import_trace(tmp_path / f"t{ending}").hold() == trace_of(ask(1))
    (tmp_path / "x.csv").write_text("time,tokens\n1,2\n")
    with pytest.raises(FormatError, match="begins with 'time,tokens' and as none of the traces known here"):
        import_trace(tmp_path / "x.csv")
    (tmp_path / "b.csv").write_text(f"{BURSTGPT}\n")
    assert list(import_trace(tmp_path / "b.csv")) == []
    with pytest.raises(ValueError, match="leave durations out"):
        import_trace(tmp_path / "b.csv", durations=tmp_path / "x.csv")
    with pytest.raises(ValueError, match="name it in printable text"):
        import_trace(tmp_path / "b.csv", model="")


# The command line


def test_published_traces_are_imported_from_the_command_line(run: RunCommand, tmp_path: Path) -> None:
    """Each of the five, told apart by its first line; what is written is what `import_trace` reads."""
    write_2019(tmp_path / "day.csv", {"f": {2: 3, 9: 1}})
    (tmp_path / "run.csv").write_text(f"{DURATIONS_2019}\nowner,app,f,500,4000,1,9000,100,200,300,400,500,600,2000\n")
    (tmp_path / "weeks.txt").write_text(f"{YEAR_2021}\na,f,5160.5,0.25\nb,f,5200.0,100.0\n")
    (tmp_path / "llm.csv").write_text(f"{AZURE_LLM}\n2023-11-16 23:59:59.9799600,4808,10\n")
    (tmp_path / "burst.csv").write_text(f"{BURSTGPT}\n5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n")
    (tmp_path / "sessions.csv").write_text(f"{BURSTGPT_SESSIONS}\n19440110.0,1722ac82-0a46,43,GPT-4,906,446,1352,Conversation log\n")
    given: list[tuple[str, list[str], dict[str, Any]]] = [
        ("day.csv", ["--durations", str(tmp_path / "run.csv"), "--seed", "3"], {"durations": tmp_path / "run.csv", "seed": 3}), ("weeks.txt", [], {}),
        ("llm.csv", ["--model", "code"], {"model": "code"}), ("burst.csv", ["--failures"], {"failures": True}), ("sessions.csv", [], {}),
    ]  # fmt: skip
    for name, options, arguments in given:
        out = tmp_path / f"{name}.jsonl"
        ended = run("trace", "import", tmp_path / name, out, *options, "--json")
        assert ended.code == 0, ended.err
        wanted = import_trace(tmp_path / name, **arguments)
        assert read_trace(out) == wanted.hold() and ended.document["requests"] == len(list(wanted)) > 0
        assert ended.document["source"] == wanted.label.source
        assert run("trace", "show", out, "--json").document["requests"] == ended.document["requests"]
    assert run("trace", "import", tmp_path / "weeks.txt", tmp_path / "weeks.txt.jsonl").code == 1, "it is there already"
    assert "2 requests of Azure Functions invocation trace 2021" in run("trace", "import", tmp_path / "weeks.txt", tmp_path / "weeks.txt.jsonl", "--overwrite").out
    for wrong in (["--seed", "3"], ["--model", "m"], ["--failures"], ["--durations", str(tmp_path / "run.csv")]):
        ended = run("trace", "import", tmp_path / "weeks.txt", tmp_path / "w.csv", *wrong)
        assert ended.code == 2 and not (tmp_path / "w.csv").exists(), wrong
    (tmp_path / "x.csv").write_text("time,tokens\n1,2\n")
    assert "none of the traces known here" in run("trace", "import", tmp_path / "x.csv", tmp_path / "w.csv", "--json").error["message"]
    assert "trace import" in run("simulate", tmp_path / "llm.csv", "--json").error["message"]


def test_a_trace_is_shown_on_the_command_line(run: RunCommand) -> None:
    document = run("trace", "show", "faas", "--json").document
    assert document["label"]["name"] == "faas" and len(document["models"]) == 20 and document["requests"] == sum(1 for _ in shipped_trace("faas"))
    said = run("trace", "show", "burst").out
    assert "model-00" in said and "and 6 more" in said and "CV of gaps" in said and "mean duration" not in said
    assert "did you mean diurnal?" in run("trace", "show", "diurnl", "--json").error["message"]


# Generators


def gaps_of(trace: Trace) -> list[float]:
    instants = [request.arrival_seconds for request in trace]
    return [b - a for a, b in itertools.pairwise(instants)]


@pytest.mark.parametrize(("cv", "requests", "tolerance"), [(0.2, 20_000, 0.02), (1.0, 40_000, 0.03), (8.0, 200_000, 0.06)])
def test_gamma_arrivals_have_their_rate_and_cv(cv: float, requests: int, tolerance: float) -> None:
    """Of n gaps the variance is off by √((kurtosis − 1) / n), with kurtosis 3 + 6 CV²: 4.4 % at CV 8, the CV half of that."""
    found = describe(burst_trace(requests=requests, requests_per_second=2.5, cv=cv, models=1, seed=3))
    assert found.requests_per_second == pytest.approx(2.5, rel=3 * cv / math.sqrt(requests))
    assert found.interarrival_cv == pytest.approx(cv, rel=tolerance)


def test_gamma_gaps_follow_their_distribution() -> None:
    """CV 1 is exponential: the largest distance between the two distribution functions, 1.63 / √n at the 1 % level."""
    gaps = sorted(gaps_of(burst_trace(requests=20_001, requests_per_second=4, cv=1.0, models=1)))
    distance = max(abs((at + 0.5) / len(gaps) - (1 - math.exp(-4 * gap))) for at, gap in enumerate(gaps))
    assert distance < 1.63 / math.sqrt(len(gaps))
    assert set(gaps_of(burst_trace(requests=50, requests_per_second=4, cv=0.0))) == {0.25}


def test_popularity_is_zipf() -> None:
    shares = zipf_shares(8, 1.1)
    assert sum(shares) == pytest.approx(1) and shares[0] / shares[3] == pytest.approx(4**1.1)
    assert zipf_shares(4, 0) == [0.25] * 4
    found = describe(burst_trace(requests=40_000, requests_per_second=1, models=8, exponent=1.1)).models
    assert list(found) == [f"model-{number:02d}" for number in range(8)]
    squares = sum((own.requests - 40_000 * share) ** 2 / (40_000 * share) for own, share in zip(found.values(), shares, strict=True))
    assert squares < 18.5  # chi-square, 7 degrees of freedom, 1 %


def test_a_burst_is_split_at_random_or_made_for_each_model_apart() -> None:
    together = describe(burst_trace(requests=60_000, requests_per_second=1, models=["a", "b"], exponent=2.0, seed=2)).models
    apart = describe(burst_trace(requests=60_000, requests_per_second=1, models=["a", "b"], exponent=2.0, apart=True, seed=2)).models
    assert {name: own.share for name, own in apart.items()} == pytest.approx({"a": 0.8, "b": 0.2}, rel=0.15)
    assert [own.interarrival_cv for own in apart.values()] == pytest.approx([8, 8], rel=0.2)
    # Split with probability p, a renewal process of CV c has the CV √(p c² + 1 − p).
    assert [own.interarrival_cv for own in together.values()] == pytest.approx([math.sqrt(p * 64 + 1 - p) for p in (0.8, 0.2)], rel=0.1)


@pytest.mark.parametrize("lengths", [CODE_TOKENS.input, CODE_TOKENS.output, CONVERSATION_TOKENS.input, CONVERSATION_TOKENS.output], ids=str)
def test_token_lengths_have_the_published_mean_median_and_maximum(lengths: TokenLengths) -> None:
    draw = lengths.sampler(random.Random(4))
    drawn = [draw() for _ in range(60_000)]
    assert statistics.fmean(drawn) == pytest.approx(lengths.mean, rel=0.02)
    assert statistics.median(drawn) == pytest.approx(lengths.median, rel=0.02)
    assert min(drawn) >= 1 and max(drawn) <= lengths.maximum


@settings(max_examples=60)
@given(st.floats(1, 1e5), st.floats(1.0001, 30), st.floats(1.01, 1e4))
def test_any_three_figures_are_met_or_refused(median: float, spread: float, room: float) -> None:
    maximum = math.ceil(median * spread * room)
    try:
        lengths = TokenLengths(median * spread, median, maximum)
    except ValueError as error:
        assert "no log-normal with median" in str(error) or "no such lengths" in str(error)
        return
    draw = lengths.sampler(random.Random(0))
    drawn = sorted(draw() for _ in range(999))
    assert drawn[0] >= 1 and drawn[-1] <= maximum
    # 999 draws: the ranks 420 and 580 are five standard deviations on either side of the median's.
    assert drawn[419] - 1 <= median <= drawn[579] + 1


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no such lengths"):
        TokenLengths(10, 20, 100)
    with pytest.raises(ValueError, match="a lower mean or a higher maximum"):
        TokenLengths(60, 20, 100)


def test_a_day_has_its_rhythm() -> None:
    trace = diurnal_trace(seconds=20 * 86_400, requests_per_second=0.05, amplitude=0.8, seed=1)
    hours = Counter(int(request.arrival_seconds % 86_400 // 3600) for request in trace)
    for hour in range(24):
        expected = 20 * 3600 * 0.05 * (1 + 0.8 * math.cos(2 * math.pi * (hour + 0.5 - 15) / 24))
        assert hours[hour] == pytest.approx(expected, abs=4.5 * math.sqrt(expected) + 0.01 * expected), hour
    assert describe(trace).requests_per_second == pytest.approx(0.05, rel=0.02)
    flat = [request.arrival_seconds for request in diurnal_trace(requests=2000, requests_per_second=1, amplitude=0, period_seconds=10)]
    assert statistics.fmean(flat) == pytest.approx(1000, rel=0.1)


def test_functions_are_as_rainbowcake_has_them() -> None:
    functions = faas_functions(seed=3)
    assert Counter(function.runtime for function in functions) == {"nodejs": 6, "python": 9, "java": 5}
    assert len({function.name for function in functions}) == 20
    cvs = sorted(function.cv for function in functions)
    assert (cvs[0], cvs[-1]) == pytest.approx((0.2, 8.0))
    assert all(60 <= f.mean_gap_seconds <= 1800 and 0.05 <= f.mean_run_seconds <= 5 for f in functions)


def test_each_function_comes_by_its_own_process() -> None:
    functions = faas_functions(seed=3)
    trace = faas_trace(seconds=4e6, functions=functions, seed=3).hold()
    found = describe(trace).models
    ran: dict[str, list[float]] = {}
    for request in trace:
        ran.setdefault(request.model, []).append(request.duration_seconds or 0.0)
    assert set(found) == {function.name for function in functions}
    for function in functions:
        own = found[function.name]
        expected = 4e6 / function.mean_gap_seconds
        assert own.requests == pytest.approx(expected, abs=5 * function.cv * math.sqrt(expected) + 2)
        off = 2.5 * math.sqrt((2 + 6 * function.cv**2) / expected)  # five standard deviations of a CV
        assert own.interarrival_cv == pytest.approx(function.cv, rel=max(0.05, off))
        assert statistics.fmean(ran[function.name]) == pytest.approx(function.mean_run_seconds, rel=5 / math.sqrt(own.requests))


MAKERS: dict[str, Callable[[int], Trace]] = {
    "burst": lambda seed: burst_trace(requests=300, requests_per_second=2, seed=seed),
    "apart": lambda seed: burst_trace(requests=300, requests_per_second=2, apart=True, seed=seed),
    "diurnal": lambda seed: diurnal_trace(requests=300, requests_per_second=0.1, seed=seed),
    "faas": lambda seed: faas_trace(requests=300, seed=seed),
    "assigned": lambda seed: assign_models(burst_trace(requests=300, requests_per_second=2), 5, seed=seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_gives_the_same_trace_each_time_and_another_seed_another(name: str) -> None:
    trace = MAKERS[name](7)
    assert list(trace) == list(trace) == list(MAKERS[name](7)) != list(MAKERS[name](8))
    assert len(trace.hold().requests) == 300
    assert (trace.label.kind, trace.label.seed) == ("synthetic", 7)


def test_what_is_drawn_for_one_thing_leaves_the_others_alone() -> None:
    one, other = (list(burst_trace(requests=50, requests_per_second=1, models=models, seed=4)) for models in (3, 9))
    assert [(r.arrival_seconds, r.input_tokens, r.output_tokens) for r in one] == [(r.arrival_seconds, r.input_tokens, r.output_tokens) for r in other]
    assigned = assign_models(Trace(LABEL, tuple(TraceRequest(r.arrival_seconds, r.model, 1, 2, "p", 3.0) for r in one)), ["x", "y"], seed=4)
    assert {(r.input_tokens, r.output_tokens, r.prefix, r.duration_seconds) for r in assigned} == {(1, 2, "p", 3.0)}
    assert {r.model for r in assigned} == {"x", "y"} and [r.arrival_seconds for r in assigned] == [r.arrival_seconds for r in one]
    assert "2 models assigned" in assigned.label.source and assigned.label.kind == "synthetic"


def test_a_trace_ends_where_it_is_told_to() -> None:
    whole = list(burst_trace(requests=100, requests_per_second=1, cv=1))
    until = list(burst_trace(seconds=whole[60].arrival_seconds, requests_per_second=1, cv=1))
    assert until == whole[:60] or until == whole[:61]  # an instant is rounded to a microsecond when it is written down
    assert list(burst_trace(requests=10, seconds=1e9, requests_per_second=1, cv=1)) == whole[:10]
    assert list(burst_trace(requests=0, requests_per_second=1)) == list(faas_trace(seconds=0)) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: burst_trace(requests_per_second=1), "has no end"),
        (lambda: burst_trace(requests=-1, requests_per_second=1), "has no end"),
        (lambda: burst_trace(seconds=math.nan, requests_per_second=1), "has no end"),
        (lambda: burst_trace(requests=1, requests_per_second=0), "are no rate"),
        (lambda: burst_trace(requests=1, requests_per_second=1, cv=-1), "cannot be drawn"),
        (lambda: burst_trace(requests=1, requests_per_second=1, models=0), "give at least one"),
        (lambda: burst_trace(requests=1, requests_per_second=1, models="abc"), "a list of different names"),
        (lambda: burst_trace(requests=1, requests_per_second=1, models=["a", "a"]), "a list of different names"),
        (lambda: burst_trace(requests=1, requests_per_second=1, exponent=math.nan), "an exponent of 0 or more"),
        (lambda: diurnal_trace(requests=1, requests_per_second=1, amplitude=1.5), "give 0 to 1"),
        (lambda: diurnal_trace(requests=1, requests_per_second=1, period_seconds=0), "give seconds above 0"),
        (lambda: diurnal_trace(requests=1, requests_per_second=math.inf), "are no rate"),
        (lambda: faas_trace(requests=1, functions=[FaasFunction("f", "java", 0, 1, 1)]), "give numbers above 0"),
        (lambda: faas_trace(requests=1, functions=[FaasFunction("f", "java", 1, -1, 1)]), "cannot be drawn"),
        (lambda: shipped_trace("other"), "name one of burst, diurnal, faas"),
    ],
)
def test_a_trace_that_cannot_be_made_is_refused_before_its_first_request(make: Callable[[], Trace], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# What travels with the package


def test_the_shipped_traces_are_made_again_bit_for_bit(tmp_path: Path) -> None:
    shipped = REPOSITORY / "data/traces"
    made = make_shipped(tmp_path)
    assert {path.name for path in made} == {path.name for path in shipped.glob("*.csv")} == {f"{name}.csv" for name in SHIPPED}
    for path in made:
        assert path.read_bytes() == (shipped / path.name).read_bytes(), path.name
    assert sum(path.stat().st_size for path in made) <= 300_000
    readme = (shipped / "README.md").read_text()
    assert "**All of them are synthetic**" in readme and all(f"`{name}.csv`" in readme for name in SHIPPED)


def test_the_shipped_traces_are_near_what_they_are_calibrated_to() -> None:
    """Tolerances are three standard errors of a draw of this size; a CV of 8 takes more requests than these to show itself."""
    burst, diurnal, faas = (describe(shipped_trace(name)) for name in ("burst", "diurnal", "faas"))
    assert [found.label.kind for found in (burst, diurnal, faas)] == ["synthetic"] * 3
    for found, profile in ((burst, CONVERSATION_TOKENS), (diurnal, CODE_TOKENS)):
        for spread, lengths in ((found.input_tokens, profile.input), (found.output_tokens, profile.output)):
            assert spread is not None
            assert spread.mean == pytest.approx(lengths.mean, rel=0.15)
            assert spread.median == pytest.approx(lengths.median, rel=0.10)
            assert spread.maximum <= lengths.maximum
    assert burst.requests == 2500 and len(burst.models) == 16
    assert burst.interarrival_cv == pytest.approx(8, rel=0.35)
    assert burst.requests_per_second == pytest.approx(1.4, rel=3 * 8 / math.sqrt(2500))
    assert Counter(name.split("-")[0] for name in faas.models) == {"nodejs": 6, "python": 9, "java": 5}


def test_the_command_makes_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sllm_mini.cluster.trace.shipped"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.splitlines() == [str(tmp_path / f"{name}.csv") for name in SHIPPED]
    assert "usage" in subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY).stderr


def test_importing_traces_brings_in_nothing_heavy() -> None:
    code = "import json, sys, sllm_mini.cluster.trace as t\nfor name in t.__all__: getattr(t, name)\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert {"torch", "transformers", "numpy", "matplotlib", "cupy"} & set(json.loads(done.stdout)) == set()


# What is in a trace


@settings(max_examples=80)
@given(traces)
def test_the_figures_are_those_of_the_statistics_module(trace: Trace) -> None:
    found = describe(trace)
    requests = list(trace)
    assert found.requests == len(requests) == sum(own.requests for own in found.models.values())
    for spread, values in ((found.input_tokens, [r.input_tokens for r in requests]), (found.output_tokens, [r.output_tokens for r in requests])):
        if values:
            assert spread is not None
            assert (spread.mean, spread.median, spread.maximum) == (pytest.approx(statistics.fmean(values)), statistics.median(values), max(values))
        else:
            assert spread is None
    gaps = gaps_of(trace)
    assert found.gaps_over_60_seconds == sum(gap > 60 for gap in gaps)
    if len(gaps) >= 2 and requests[-1].arrival_seconds - requests[0].arrival_seconds > 1e-3:
        assert found.requests_per_second == pytest.approx(len(gaps) / (requests[-1].arrival_seconds - requests[0].arrival_seconds))
        assert found.interarrival_cv == pytest.approx(statistics.pstdev(gaps) / statistics.fmean(gaps), rel=1e-6, abs=1e-9)
    assert [own.requests for own in found.models.values()] == sorted((own.requests for own in found.models.values()), reverse=True)


def test_a_trace_of_nothing_has_no_figures() -> None:
    found = describe(trace_of())
    assert (found.requests, found.seconds, found.requests_per_second, found.interarrival_cv, found.input_tokens, found.models) == (0, 0, None, None, None, {})
    one = describe(Trace(LABEL, Again(lambda: iter([TraceRequest(5.0, "m", 3, 4, None, 2.0)]))))
    assert (one.requests, one.requests_per_second, one.interarrival_cv, one.mean_duration_seconds) == (1, None, None, 2.0)
    assert one.models["m"].share == 1.0
    assert describe(trace_of(ask(0), ask(60), ask(120.001))).gaps_over_60_seconds == 1  # one of exactly 60 s is not over
