# SPDX-License-Identifier: MIT
"""Reading traces: what is a request, and what is refused with which words."""

from __future__ import annotations

import gzip
import os
import subprocess
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from blktrace import ON_8_0, ON_8_16, everything
from hypothesis import given
from hypothesis import strategies as st
from peers import peer

from pybitmap.errors import BitmapError, TraceError
from pybitmap.sizes import MAX_SIZE
from pybitmap.trace import MAX_LINE, Requests, Trace, read_trace

pytestmark = pytest.mark.core

EXAMPLES = Path(__file__).parents[2] / "examples" / "traces"
V2, V3 = b"fio version 2 iolog\n", b"fio version 3 iolog\n"


@dataclass(frozen=True)
class Whole(Trace):
    """A trace with all its requests."""

    offsets: array[int]
    lengths: array[int]
    lines: array[int]


def whole(path: Path, **options: Any) -> Whole:
    offsets, lengths, lines = array("Q"), array("Q"), array("Q")

    def take(requests: Requests) -> None:
        offsets.extend(requests.offsets)
        lengths.extend(requests.lengths)
        lines.extend(requests.lines)

    trace = read_trace(path, take, **options)
    return Whole(**vars(trace), offsets=offsets, lengths=lengths, lines=lines)


def read(text: bytes, **options: Any) -> Whole:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t")
        path.write_bytes(text)
        return whole(path, **options)


def requests(trace: Whole) -> list[tuple[int, int]]:
    return list(zip(trace.offsets, trace.lengths))


def refusal(text: bytes, **options: Any) -> str:
    """The message of the error, without the folder of the file."""
    with pytest.raises(TraceError) as caught:
        read(text, **options)
    return str(caught.value).rpartition(os.sep + "t:")[2]


# ---- what is read -----------------------------------------------------------

ranges = st.tuples(st.integers(0, MAX_SIZE), st.integers(0, MAX_SIZE)).filter(
    lambda pair: sum(pair) <= MAX_SIZE
)
native = st.lists(st.tuples(st.sampled_from(["write", "zero", "discard"]), ranges))
iolog = st.lists(st.tuples(st.sampled_from(["write", "trim", "read", "sync"]), ranges))


@given(native, st.booleans(), st.sampled_from([" ", "  ", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_a_trace_written_is_the_trace_read(
    written: list[tuple[str, tuple[int, int]]], zipped: bool, space: str, end: str
) -> None:
    text = "".join(f"{verb}{space}{at}{space}{n}{end}" for verb, (at, n) in written).encode()
    trace = read(gzip.compress(text) if zipped else text)
    assert requests(trace) == [pair for _, pair in written]
    verbs = [verb for verb, _ in written]
    counts = (trace.writes, trace.zeroes, trace.discards)
    assert counts == (verbs.count("write"), verbs.count("zero"), verbs.count("discard"))
    assert trace.end == max((sum(pair) for _, pair in written), default=0)
    assert list(trace.lines) == list(range(1, len(written) + 1))


@given(iolog, st.booleans())
def test_writes_and_trims_of_an_iolog_are_requests(
    written: list[tuple[str, tuple[int, int]]], timed: bool
) -> None:
    lines = ["disk add", "disk open", *(f"disk {verb} {at} {n}" for verb, (at, n) in written)]
    lines.append("disk close")
    if timed:
        lines = [f"{17 * index} {line}" for index, line in enumerate(lines)]
    trace = read((V3 if timed else V2) + "\n".join(lines).encode())
    assert requests(trace) == [pair for verb, pair in written if verb in ("write", "trim")]
    assert trace.writes == sum(verb == "write" for verb, _ in written)
    assert trace.discards == sum(verb == "trim" for verb, _ in written)


def test_offsets_and_lengths_are_arrays_of_uint64() -> None:
    trace = read(b"write 4096 512\n")
    assert (trace.offsets, trace.lengths) == (array("Q", [4096]), array("Q", [512]))


def test_blank_lines_are_skipped_and_counted_in_line_numbers() -> None:
    trace = read(b"\nwrite 0 1\n \t\n\nzero 5 1\n\n")
    assert list(trace.lines) == [2, 5]


def test_the_last_line_needs_no_line_end() -> None:
    assert requests(read(b"write 0 1\nwrite 2 3")) == [(0, 1), (2, 3)]


def test_an_empty_file_is_a_trace_without_requests() -> None:
    trace = read(b"")
    assert (len(trace), trace.end) == (0, 0)


def test_an_iolog_that_only_reads_has_no_requests() -> None:
    assert len(read(V3 + b"1 disk read 0 4096\n")) == 0


def test_a_request_of_no_length_counts_as_one() -> None:
    assert requests(read(b"write 7 0\n")) == [(7, 0)]


def test_the_largest_end_is_read() -> None:
    assert read(b"write %d 1\n" % (MAX_SIZE - 1)).end == MAX_SIZE


def test_gzip_is_told_by_its_content() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.txt")
        path.write_bytes(gzip.compress(b"write 1 2\n"))
        assert len(whole(path)) == 1
        path = Path(folder, "t.gz")
        path.write_bytes(b"write 1 2\n")
        assert len(whole(path)) == 1


def test_gzip_of_several_members_is_read_to_the_end() -> None:
    text = gzip.compress(b"write 0 1\nwri") + gzip.compress(b"te 1 1\n")
    assert requests(read(text)) == [(0, 1), (1, 1)]


def test_lines_across_chunks_of_reading_stay_whole() -> None:
    text = b"".join(b"write %d 4096\n" % (i * 4096) for i in range(200_000))
    trace = read(text)
    assert list(trace.offsets) == list(range(0, 200_000 * 4096, 4096))
    assert list(trace.lines) == list(range(1, 200_001))


@pytest.mark.parametrize("line", [b"write 0 1\n", b"zero  0 0\n"])
def test_requests_are_given_in_pieces_in_order(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(line * 600_000)
    pieces: list[Requests] = []
    read_trace(path, pieces.append)
    assert len(pieces) >= 2
    assert max(map(len, pieces)) < 300_000
    numbers = [number for piece in pieces for number in piece.lines]
    assert numbers == list(range(1, 600_001))


def test_a_reader_that_gives_up_has_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"write 0 1\n" * 600_000 + b"bad\n")
    pieces: list[Requests] = []

    def enough(piece: Requests) -> None:
        pieces.append(piece)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_trace(path, enough)
    assert len(pieces) == 1


def test_the_first_request_beyond_a_size_is_told_by_its_line() -> None:
    piece = Requests(
        "t", array("Q", [0, 5, 9, 5]), array("Q", [9, 5, 9, 6]), array("Q", [1, 3, 4, 9])
    )
    assert piece.end == 18
    assert piece.beyond(18) is None
    assert piece.beyond(17) == ("t:4", 9, 9)
    assert piece.beyond(9) == ("t:3", 5, 5)


def test_progress_is_told_bytes_read_of_all() -> None:
    calls: list[tuple[int, int | None]] = []
    text = b"write 0 1\n" * 300_000
    read(text, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 1
    assert calls == sorted(calls)
    assert calls[-1] == (len(text), len(text))


def test_the_hash_is_of_the_unzipped_text() -> None:
    assert read(b"write 0 1\n").text_sha256 == read(gzip.compress(b"write 0 1\n")).text_sha256


def test_every_other_action_of_an_iolog_is_passed_over() -> None:
    actions = ("read", "sync", "datasync", "sync_file_range", "wait")
    text = b"".join(b"disk %s 0 4096\n" % action.encode() for action in actions)
    assert len(read(V2 + b"disk add\ndisk open\n" + text + b"disk close\n")) == 0


def test_file_names_of_an_iolog_may_hold_blanks() -> None:
    assert requests(read(V3 + b"18 my disk add\n106 my disk write 0 4096\n")) == [(0, 4096)]


def test_one_file_of_an_iolog_can_be_chosen() -> None:
    text = V2 + b"a write 0 1\nb write 10 1\na trim 20 1\n"
    assert requests(read(text, file="a")) == [(0, 1), (20, 1)]
    assert requests(read(text, file="b")) == [(10, 1)]


def test_files_that_are_only_read_need_no_choice() -> None:
    assert requests(read(V2 + b"a read 0 1\nb write 10 1\n")) == [(10, 1)]


def test_the_iolog_that_fio_writes_is_read(tmp_path: Path) -> None:
    fio = peer("fio", "fio")
    command = [fio, "--name=j", "--ioengine=null", "--size=1M", "--bs=4k", "--rw=randtrimwrite"]
    subprocess.run([*command, "--write_iolog=log"], cwd=tmp_path, check=True, capture_output=True)
    trace = whole(tmp_path / "log")
    assert trace.writes == trace.discards
    assert trace.writes > 0
    assert set(trace.lengths) == {4096}
    assert trace.end <= 1 << 20


def test_the_iolog_to_which_fio_has_appended_is_read(tmp_path: Path) -> None:
    fio = peer("fio", "fio")
    command = [fio, "--name=j", "--ioengine=null", "--size=64k", "--bs=4k", "--rw=randwrite"]
    for runs in (1, 2, 3):
        done = [*command, "--write_iolog=log"]
        subprocess.run(done, cwd=tmp_path, check=True, capture_output=True)
        trace = whole(tmp_path / "log")
        assert (len(trace), trace.writes, trace.end) == (16 * runs, 16 * runs, 1 << 16)
    assert (tmp_path / "log").read_bytes().count(b"iolog") == 3


def test_each_header_of_an_iolog_begins_a_run_in_its_version() -> None:
    text = V2 + b"f write 0 1\n" + V3 + b"7 f write 10 1\n" + V3 + b"9 f trim 20 1\n" + V2
    assert requests(read(text + b"f write 30 1\n")) == [(0, 1), (10, 1), (20, 1), (30, 1)]
    assert requests(read(V2 + V2 + b"f write 0 1\n")) == [(0, 1)]


@pytest.mark.parametrize(
    "line",
    [
        b"fio version 2",
        b"fio version 2 io",
        b"io version 2 iolog",
        b"f write 0 4fio version 2 iolog",
        b"fio version 4 iolog",
    ],
)
def test_a_header_that_is_torn_or_unknown_is_refused(line: bytes) -> None:
    assert refusal(V2 + b"f write 0 1\n" + line + b"\nf write 0 1\n").startswith("3: ")


@pytest.mark.parametrize(("name", "counts"), [("fio-v2", (5, 0, 1)), ("fio-v3", (40, 0, 40))])
def test_the_iologs_of_the_examples_are_read(name: str, counts: tuple[int, int, int]) -> None:
    trace = whole(EXAMPLES / f"{name}.iolog")
    assert (trace.writes, trace.zeroes, trace.discards) == counts


# ---- what is refused --------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"read 0 1", "expected `write`, `zero` or `discard`, found 'read'"),
        (b"WRITE 0 1", "found 'WRITE'"),
        (b"write 0", "expected `write|zero|discard OFFSET LENGTH`, found 'write 0'"),
        (b"write 0 1 2", "found 'write 0 1 2'"),
        (b"write", "found 'write'"),
        (b"write 0x10 1", "expected a number of bytes in decimal, found '0x10'"),
        (b"write 0 4K", "found '4K'"),
        (b"write -1 1", "found '-1'"),
        (b"write +1 1", "found '+1'"),
        (b"write 1_0 1", "found '1_0'"),
        (b"write 1.0 1", "found '1.0'"),
        ("write ٣ 1".encode(), r"found '\xd9\xa3'"),
        ("écrire 1 1".encode(), r"found '\xc3\xa9crire'"),
        (b"\xef\xbb\xbfwrite 1 1", r"found '\xef\xbb\xbfwrite'"),
        (b"\0\0\0", r"found '\x00\x00\x00'"),
        (b"\x1b[31mwrite 1 1", r"found '\x1b[31mwrite'"),
        (b"write 9223372036854775807 1", "exceeds 2^63 - 1"),
        (b"write 1 9223372036854775807", "exceeds 2^63 - 1"),
        (b"write 9999999999999999999 0", "exceeds 2^63 - 1"),
        (b"write %s 1" % (b"9" * 20), "exceeds 2^63 - 1"),
        (b"write %s 1" % (b"9" * 5000), "exceeds 2^63 - 1"),
        (b"write 0 1 " + b"x" * MAX_LINE, "a line of more than 65536 bytes"),
        (b" " * (MAX_LINE + 1), "a line of more than 65536 bytes"),
        (b"fio version 2 iolog", "found 'fio version 2 iolog'"),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(line: bytes, words: str) -> None:
    message = refusal(b"write 0 1\n\n" + line + b"\nwrite 0 1\n")
    assert message.startswith("3: ")
    assert words in message
    assert len(message) < 200


def test_a_malformed_first_line_has_number_1() -> None:
    assert refusal(b"nonsense\n").startswith("1: ")


def test_a_malformed_line_far_into_the_file_has_its_number() -> None:
    assert refusal(b"write 0 1\n" * 300_000 + b"bad\n").startswith("300001: ")


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a sparse file of zeros
    with pytest.raises(TraceError, match=":1: a line of more than 65536 bytes"):
        whole(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (V2 + b"disk write 0\n", "2: expected `FILENAME ACTION [OFFSET LENGTH]`"),
        (V2 + b"disk write 0 1 2\n", "2: expected `FILENAME ACTION [OFFSET LENGTH]`"),
        (V2 + b"disk erase 0 1\n", "2: expected `FILENAME ACTION [OFFSET LENGTH]`"),
        (V2 + b"disk unlink\n", "2: expected `FILENAME ACTION [OFFSET LENGTH]`"),
        (V2 + b"open\n", "2: expected `FILENAME ACTION [OFFSET LENGTH]`"),
        (V2 + b"disk write -4096 1\n", "2: expected a number of bytes in decimal, found '-4096'"),
        (V2 + b"disk trim %d 2\n" % (MAX_SIZE - 1), "exceeds 2^63 - 1"),
        (V3 + b"disk write 0 1\n", "2: expected a timestamp, found 'disk'"),
        (V3 + b"-5 disk write 0 1\n", "2: expected a timestamp, found '-5'"),
        (V3 + b"5\n", "2: expected `TIMESTAMP FILENAME ACTION [OFFSET LENGTH]`, found '5'"),
        (b"fio version 1 iolog\n", "1: only versions 2 and 3 of fio's iolog are known"),
        (b"fio version 23 iolog\n", "1: only versions 2 and 3 of fio's iolog are known"),
    ],
)
def test_a_malformed_line_of_an_iolog_is_refused(text: bytes, words: str) -> None:
    assert words in refusal(text)


def test_an_iolog_of_several_files_is_refused_by_their_names() -> None:
    message = refusal(V2 + b"a write 0 1\nb write 0 1\n")
    assert "writes to 2 files, 'a', 'b'; choose one" in message


def test_many_files_are_not_all_named() -> None:
    log = V2 + b"".join(b"f%d write 0 1\n" % i for i in range(1000))
    for message in (refusal(log), refusal(log, file="g")):
        assert "'f0', 'f1', 'f2', 'f3', 'f4', 'f5', 'f6', 'f7', ..." in message
        assert message.count("'f") == 8
    assert "writes to more than 8 files, 'f0', " in refusal(log)


# ---- blkparse ---------------------------------------------------------------

#: As blkparse 1.2.0 prints blktrace.everything(), with its summary.
BLKPARSE = Path(__file__).parent / "blkparse.txt"


def check_blkparse(text: bytes) -> None:
    trace = read(text, file="8,0")
    assert set(requests(trace)) == set(ON_8_0)
    # What is queued, issued and completed counts each time; two are that once.
    assert (trace.writes, trace.zeroes, trace.discards) == (3 * 5 + 2, 0, 3)
    assert set(requests(read(text, file="8,16"))) == set(ON_8_16)
    message = refusal(text)
    assert "writes to 2 files, '8,0', '8,16'" in message


def test_the_text_of_blkparse_is_read() -> None:
    check_blkparse(BLKPARSE.read_bytes())


@pytest.mark.parametrize("options", [[], ["-q"], ["-t"]])
def test_what_blkparse_prints_today(tmp_path: Path, options: list[str]) -> None:
    blkparse = peer("blkparse", "blktrace")
    (tmp_path / "t.blktrace.0").write_bytes(everything())
    command = [blkparse, *options, "-i", "t"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    check_blkparse(done.stdout)
    check_blkparse(done.stderr + done.stdout)


EVENT = b"  8,0    0        3     0.000000000   697  Q  WS 2048 + 8 [dd]\n"


def test_sectors_of_blkparse_have_512_bytes() -> None:
    trace = read(EVENT)
    assert (requests(trace), list(trace.lines)) == ([(2048 * 512, 4096)], [1])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (EVENT.replace(b"2048 + 8", b"18014398509481984 + 1"), "exceeds 2^63 - 1"),
        (EVENT.replace(b"2048 + 8", b"9" * 5000 + b" + 1"), "exceeds 2^63 - 1"),
        (EVENT.replace(b"2048 + 8", b"512"), "blkparse -a fs"),
        (EVENT.replace(b"2048 + 8", b"-1 + 8"), "blkparse -a fs"),
        (EVENT.replace(b"2048 + 8", b"2048 + 8x"), "blkparse -a fs"),
        (EVENT.replace(b"WS 2048 + 8 [dd]", b""), "as blkparse prints it"),
        (EVENT[:30] + b"\n", "as blkparse prints it"),
        (b"write 0 1\n", "as blkparse prints it"),
        (V2, "as blkparse prints it"),
    ],
)
def test_what_blkparse_does_not_print_is_refused(line: bytes, why: str) -> None:
    message = refusal(EVENT + line)
    assert message.startswith("2: ")
    assert why in message
    assert len(message) < 300


def test_a_trace_of_blkparse_that_has_reads_only_has_no_requests() -> None:
    trace = read(EVENT.replace(b"WS", b"RS"))
    assert (len(trace), trace.end) == (0, 0)


def test_a_file_that_comes_after_many_others_can_be_chosen() -> None:
    log = V2 + b"".join(b"f%d write %d 1\n" % (i, i) for i in range(1000))
    assert requests(read(log, file="f999")) == [(999, 1)]
    assert requests(read(log, file="f0")) == [(0, 1)]


@pytest.mark.parametrize("options", [{}, {"file": "c"}])
def test_a_long_name_of_a_file_is_not_repeated_in_full(options: dict[str, str]) -> None:
    message = refusal(V2 + b"x" * 60_000 + b" write 0 1\nb write 0 1\n", **options)
    assert f"'{'x' * 255}'..., 'b'" in message


def test_a_file_that_the_iolog_does_not_write_is_refused() -> None:
    assert "has no write to 'c'; it writes to 'a'" in refusal(V2 + b"a write 0 1\n", file="c")


def test_choosing_a_file_of_a_native_trace_is_refused() -> None:
    assert "neither a fio iolog nor of blkparse" in refusal(b"write 0 1\n", file="a")


@pytest.mark.parametrize("cut", [3, 12, -9, -4, -1])
def test_a_gzip_file_cut_short_is_refused(cut: int) -> None:
    assert "the gzip file is cut short" in refusal(gzip.compress(b"write 0 1\n")[:cut])


def test_a_damaged_gzip_file_is_refused() -> None:
    text = bytearray(gzip.compress(b"write 0 1\nwrite 1 1\n"))
    text[-8] ^= 1  # the checksum
    assert "the gzip file is damaged" in refusal(bytes(text))


def test_what_follows_a_gzip_file_is_refused() -> None:
    assert "the gzip file is damaged" in refusal(gzip.compress(b"write 0 1\n") + b"more")


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        whole(tmp_path / "none")


def test_a_directory_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        whole(tmp_path)


def test_a_trace_error_is_a_bitmap_error_and_a_value_error() -> None:
    assert issubclass(TraceError, BitmapError)
    assert issubclass(TraceError, ValueError)


def test_control_characters_in_a_path_are_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m"
    path.write_bytes(b"bad\n")
    with pytest.raises(TraceError, match=r"\\x1b\[31m:1: "):
        whole(path)


def test_a_first_line_of_an_iolog_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"fio version 2 iolog" + b" " * (3 << 20) + b"\nf write 0 4096\n")
    with pytest.raises(TraceError, match="log:1: a line of more than"):
        whole(path)
