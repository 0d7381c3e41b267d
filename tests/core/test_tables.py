# SPDX-License-Identifier: MIT
"""What is dirty goes straight into tables of pandas, Polars and pyarrow, of the versions that are
here, and comes back."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from peers import package
from support import collect

from pybitmap import BlockGraph, HBitmap

CASES = [[], [(4096, 8192)], [(16 * 4096 * n, 4096) for n in range(10_000)]]


def bitmap(areas: list[tuple[int, int]]) -> HBitmap:
    hb = HBitmap(1 << 40, group_size=4096)
    hb.set_many([offset for offset, _ in areas], [length for _, length in areas])
    return hb


@pytest.fixture(params=CASES, ids=["none", "one", "many"])
def areas(request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = request.param
    return found


def columns(areas: list[tuple[int, int]]) -> dict[str, list[int]]:
    return {"offset": [each[0] for each in areas], "length": [each[1] for each in areas]}


def test_polars_takes_areas_and_items(areas: list[tuple[int, int]]) -> None:
    polars, hb = package("polars"), bitmap(areas)
    frame = polars.DataFrame(hb.areas_array())
    assert frame.schema == {"offset": polars.UInt64, "length": polars.UInt64}
    assert frame.to_dict(as_series=False) == columns(areas)
    assert polars.DataFrame(hb.items_array()).to_dict(as_series=False) == {"offset": list(hb)}
    back = HBitmap(hb.size, hb.granularity)
    back.set_many(frame["offset"], frame["length"])
    assert back == hb


def test_pyarrow_takes_areas_and_items(areas: list[tuple[int, int]]) -> None:
    pyarrow, hb = package("pyarrow"), bitmap(areas)
    table = pyarrow.table(hb.areas_array())
    table.validate(full=True)
    assert table.to_pydict() == columns(areas)
    assert {field.type for field in table.schema} == {pyarrow.uint64()}
    assert pyarrow.table(hb.items_array()).to_pydict() == {"offset": list(hb)}
    reader = pyarrow.RecordBatchReader.from_stream(hb.areas_array())
    assert reader.read_all() == table
    others = pyarrow.table(columns(areas), schema=table.schema)
    assert pyarrow.concat_tables([table, others]).num_rows == 2 * len(areas)
    back = HBitmap(hb.size, hb.granularity)
    back.set_many(table["offset"], table["length"])
    assert back == hb


def test_pandas_takes_areas_and_items(areas: list[tuple[int, int]]) -> None:
    pandas, hb = package("pandas"), bitmap(areas)
    numbers = hb.areas_array()
    frame = pandas.DataFrame(numbers, columns=numbers.names)
    assert frame.to_dict("list") == columns(areas)
    assert areas == [] or set(map(str, frame.dtypes)) == {"uint64"}
    if areas:
        assert pandas.DataFrame(numbers).shape == (len(areas), 2)
    series = pandas.Series(hb.items_array(), name="offset")
    assert series.tolist() == list(hb)
    back = HBitmap(hb.size, hb.granularity)
    back.set_many(frame["offset"].astype("uint64"), frame["length"].astype("uint64"))
    assert back == hb


def test_pandas_takes_the_names_by_arrow(areas: list[tuple[int, int]]) -> None:
    pandas, hb = package("pandas"), bitmap(areas)
    package("pyarrow")
    if not hasattr(pandas.DataFrame, "from_arrow"):
        pytest.skip("pandas.DataFrame.from_arrow is there from pandas 3 on")
    assert pandas.DataFrame.from_arrow(hb.areas_array()).to_dict("list") == columns(areas)
    assert pandas.DataFrame.from_arrow(hb.items_array()).to_dict("list") == {"offset": list(hb)}


def test_a_named_bitmap_goes_into_a_table() -> None:
    polars = package("polars")
    with BlockGraph() as graph:
        disk = graph.add_node("disk", size=1 << 20)
        daily = disk.add_bitmap("daily", granularity=4096)
        disk.mark_dirty(5000, 1)
        with daily.freeze() as frozen:
            frame = polars.DataFrame(daily.areas_array())
            disk.mark_dirty(0, 1)
            frozen.done()
        assert frame.rows() == [(4096, 4096)]


@pytest.mark.parametrize("name", ["polars", "pyarrow"])
def test_tables_outlive_bitmap_and_array_and_are_dropped_in_other_threads(name: str) -> None:
    made = package(name)
    make = made.DataFrame if name == "polars" else made.table
    areas = CASES[2]
    tables: list[Any] = [make(bitmap(areas).areas_array()) for _ in range(20)]
    columns_of = [table["length"] for table in tables]
    collect()

    def drop() -> None:
        while tables:
            tables.pop()

    threads = [threading.Thread(target=drop) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    collect()
    assert {
        int(column[n].as_py() if name == "pyarrow" else column[n])
        for column in columns_of
        for n in (0, -1)
    } == {4096}


def test_tables_of_before_a_fork_are_the_child_s_as_well() -> None:
    pyarrow = package("pyarrow")
    table = pyarrow.table(bitmap(CASES[1]).areas_array())
    child = os.fork()
    if not child:
        try:
            good = table["length"].to_pylist() == [8192]
            del table
            collect()
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert table["length"].to_pylist() == [8192]


@pytest.mark.parametrize("name", ["pandas", "polars", "pyarrow"])
def test_from_extents_takes_the_columns_of_a_table_as_it_says(name: str) -> None:
    module, numpy = package(name), package("numpy")
    make = module.table if name == "pyarrow" else module.DataFrame
    table = make(columns(CASES[2]))
    with pytest.raises(TypeError, match=rf"no table \({name}'s \w+\).*numpy.column_stack"):
        HBitmap.from_extents(table)
    extents = numpy.column_stack((table["offset"], table["length"]))
    assert list(HBitmap.from_extents(extents).areas()) == CASES[2]
