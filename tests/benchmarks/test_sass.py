"""Instructions are counted as they stand in the machine code, and the kernels keep to what is on record."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import gpu_operators
import gpu_plan
import numpy as np
import pytest
import sass
import table_reads
import torch
from gpu_cases import Case, of_stage

from dat_deploy.errors import UnsupportedError
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.plugins.launch import Launch

# A loop around a loop, one without exponentials, one that is longer, and code behind the end that comes back.
SASS = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R8, R4, R6, RZ ;
        /*0030*/                   FFMA.FTZ R8, R8, R9, -R10 ;
        /*0040*/                   MUFU.EX2 R8, R8 ;
        /*0050*/              @!P2 BRA `(.L_x_9) ;
.L_x_2:
        /*0060*/                   HADD2.F32 R11, -RZ, R4.H0_H0 ;
        /*0070*/                   HFMA2.MMA R12, -RZ, RZ, 0, 0 ;
        /*0080*/                   IMAD.MOV.U32 R13, RZ, RZ, R12 ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00b0*/              @!P1 BRA `(.L_x_0) ;
.L_x_3:
        /*00c0*/                   LDS R20, [R21] ;
        /*00d0*/               @P3 BRA `(.L_x_3) ;
.L_x_4:
        /*00e0*/                   MUFU.EX2 R8, R8 ;
        /*00f0*/                   MUFU.EX2 R9, R9 ;
        /*0100*/                   FADD R8, R8, R9 ;
        /*0110*/                   FADD R8, R8, R9 ;
        /*0120*/                   FADD R8, R8, R9 ;
        /*0130*/                   FADD R8, R8, R9 ;
        /*0140*/                   FADD R8, R8, R9 ;
        /*0150*/                   BRA.U UP0, `(.L_x_4) ;
        /*0160*/                   EXIT ;
.L_x_9:
        /*0170*/                   FMUL R8, R8, R8 ;
        /*0180*/                   BRA `(.L_x_2) ;
.L_x_10:
        /*0190*/                   BRA `(.L_x_10);
        /*01a0*/                   NOP;
"""


def test_a_parsed_instruction_has_its_predicate_and_its_suffixes():
    code, labels = sass.parse(SASS)
    assert len(code) == 0x1A0 // 16 + 1
    assert labels[".L_x_1"] == 2
    assert code[3] == sass.Instruction("", "FFMA.FTZ", "R8, R8, R9, -R10")
    assert code[5] == sass.Instruction("@!P2", "BRA", "`(.L_x_9)")


def test_the_hottest_loop_is_the_innermost_with_as_many_exponentials_as_it_should_have_and_of_such_the_shorter():
    counted, loop = sass.hottest(*sass.parse(SASS), 1)
    assert counted == "loop"
    assert Counter(map(sass.kind, loop)) == {"tensor": 1, "float": 1, "MUFU": 1, "conversion": 1, "other": 4}
    assert Counter(map(sass.kind, sass.hottest(*sass.parse(SASS), 2)[1])) == {"MUFU": 2, "float": 5, "other": 1}


def test_where_no_loop_has_exponentials_the_program_is_counted_to_its_end():
    counted, code = sass.hottest(*sass.parse(SASS.replace("MUFU.EX2", "MUFU.RCP")), 1)
    assert (counted, len(code), code[-1].operation) == ("program", 0x160 // 16 + 1, "EXIT")


DEFORMABLE = Case("deformable_attention", 2, 12, 10, 64, 2, (5, 4), 1, (23, 19), True)  # 12 · 10 queries, 20 keys
WINDOW = Case("window_attention", 2, 14, 7, 64, 2, window_size=7)  # 2 windows of 49 pixels
NEIGHBORHOOD = Case("neighborhood_attention", 2, 9, 9, 64, 2, kernel_size=5)
SAMPLE = Case("deformable_sample", 2, 9, 9, 64, 0, (5, 4), 2)
GENERAL = {"TILE_ROWS": 8, "TILE_COLUMNS": 8, "BLOCK_KEYS": 64}


@pytest.mark.parametrize(
    ("case", "programs", "constants", "trip", "every"),
    [
        (DEFORMABLE, 16, {"TILE_ROWS": 8, "TILE_COLUMNS": 8, "BLOCK_KEYS": 16}, 1024, 16 * 2 * 1024),
        (DEFORMABLE, 8, {"ROWS_A_LANE": 4, "WARPS": 1, "COLUMN_TILES": 2, "BLOCK_KEYS": 16}, 1024, 16 * 2 * 1024),
        (WINDOW, 8, {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 32, "KEEP_BIAS": False}, 1024, 8 * 64 * 64),
        (WINDOW, 8, {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 32, "KEEP_BIAS": True}, 2048, 8 * 64 * 64),
        (WINDOW, 8, {"BLOCK_QUERIES": 32, "KEYS": 32, "MORE_KEYS": 24}, 1792, 8 * 64 * 56),
        (
            NEIGHBORHOOD,
            16,
            {"TILE_ROWS": 8, "TILE_COLUMNS": 8, "KEY_ROWS": 5, "KEY_COLUMNS": 16},
            5120,
            16 * 64 * 15 * 16,
        ),
        (NEIGHBORHOOD, 3, {"KEY_COLUMNS": 10, "WARP_TILES": 4, "IMAGES": 4}, 5120, 3 * 2 * 5120),
        (NEIGHBORHOOD, 6, {"KEY_COLUMNS": 10, "WARP_TILES": 4, "IMAGES": 1}, 5120, 6 * 5120),
        (SAMPLE, 8, {"BLOCK_POINTS": 16, "BLOCK_CHANNELS": 32}, 512, 8 * 512),
    ],
)
def test_the_scores_of_a_trip_and_of_a_launch_are_those_counted_by_hand(case, programs, constants, trip, every):
    launch = Launch(SimpleNamespace(), programs, (), {}, constants, 4, 2)
    assert sass.scores(case, launch) == (trip, every)


def test_a_launch_of_an_unknown_form_is_refused():
    launch = Launch(SimpleNamespace(), 1, (), {}, {"NUM_HEADS": 2, "BLOCK_QUERIES": 64}, 4, 2)
    with pytest.raises(UnsupportedError) as error:
        sass.scores(WINDOW, launch)
    assert str(error.value) == (
        "window_attention was launched with the constants NUM_HEADS, BLOCK_QUERIES, of which it is not known how many "
        "scores one trip of the loop has; add that form to scores() in benchmarks/sass.py."
    )


def square(size, *, half_pixel):
    """A map of one head with the table of its size."""
    return Case("deformable_attention", 1, size, size, 32, 1, (4, 4), 1, (2 * size - 1,) * 2, half_pixel)


def shared(rows_a_lane, lane_rows, warp_rows, warps):
    names = ("ROWS_A_LANE", "LANE_ROWS", "WARP_ROWS", "WARPS")
    return dict(zip(names, (rows_a_lane, lane_rows, warp_rows, warps), strict=True)) | {
        "COLUMN_TILES": 1,
        "BLOCK_KEYS": 16,
    }


@pytest.mark.parametrize(
    ("case", "constants", "points", "expected"),
    [
        # All keys in one place. Half a warp reads columns 0, 2, 4 and 6 of one row.
        (square(24, half_pixel=False), shared(3, 2, 2, 2), [(0, 0)] * 16, 2),
        # Columns 0 and 2 of rows 0 and 4, and four rows are a multiple of 16 entries.
        (square(16, half_pixel=False), shared(4, 4, 1, 1), [(0, 0)] * 16, 4),
        # Four keys that are 16 columns apart from each other, each with columns 0, 2, 4 and 6.
        (square(64, half_pixel=False), shared(4, 2, 2, 2), [(0, (8 * (n % 8) + 0.5) / 31.5 - 1) for n in range(16)], 8),
        # 0.1 below an entry. Query row 4 is 4 rows less 0.25 further down, so row 3 is read with row 0, 84 entries from
        # it. The other half warp reads rows 7 and 11.
        (square(16, half_pixel=True), shared(4, 4, 1, 1), [(0.86875 / 7.5, 0)] * 16, 1 + 2),
        # Rows of 15 entries: the 8 from 48 on are in one line of 32, those from 63 on in two, and so on.
        (square(8, half_pixel=False), GENERAL, [(0, 0)] * 64, 1.5),
        # Every other key three rows further down: two lines for the seventh row of queries, three for all others.
        (square(8, half_pixel=False), GENERAL, [(0, 0), (-6 / 7, 0)] * 32, 23 / 8),
    ],
)
def test_the_passes_of_a_read_of_the_table_are_those_counted_by_hand(case, constants, points, expected):
    found = table_reads.wavefronts(case, constants, np.array(points, float).reshape(1, 1, -1, 2))
    assert found == pytest.approx(expected, abs=0 if isinstance(expected, int) else 0.02)


@pytest.mark.parametrize("half_pixel", [True, False])
def test_points_lie_where_the_benchmark_has_them(half_pixel):
    case = Case("deformable_attention", 2, 8, 6, 32, 2, (4, 3), 2, (15, 11), half_pixel)
    random = np.random.default_rng(0).standard_normal((2, 2, 4, 3, 2))
    expected = gpu_operators._locations(case, torch.from_numpy(random), stress=False)
    np.testing.assert_allclose(table_reads.benchmark_locations(case), expected.flatten(2, 3), atol=1e-6)


def test_with_the_points_of_the_benchmark_a_read_takes_as_many_passes_as_a_count_of_every_address_has():
    assert table_reads.wavefronts(gpu_plan.bar(), shared(3, 2, 2, 2)) == pytest.approx(3.86, abs=0.03)
    assert table_reads.wavefronts(gpu_plan.bar(), GENERAL) == pytest.approx(2.73, abs=0.03)
    assert table_reads.wavefronts(WINDOW, {}) is None


def test_the_table_has_a_line_for_each_row():
    row = sass.Row("op", "8x8", "fp16", "A=1", 64, 0, 4096, "loop", 10, 64, 1.5, dict.fromkeys(sass.KINDS, 0.5))
    other = replace(row, shape="9x9", a_score={**row.a_score, "half": 0.0}, wavefronts_a_read=3.86)
    lines = sass.markdown([row, other], 90).splitlines()
    assert lines[4].startswith("| op | 8x8 | fp16 | A=1 | 64 | 0 | 4,096 | loop | 1.50 | 8.25 | 5.50 | 0.50 |")
    assert lines[4].endswith(" | 0.50 | – |")  # as a record from before that was counted
    assert lines[5].endswith(" | 0.50 | 3.86 |")
    assert lines[5].count("–") == 1
    assert len({line.count("|") for line in lines[2:6]}) == 1


LAUNCHES = [
    gpu_plan.bar(),
    *(case for case in of_stage(VARIANTS["tiny"], 2, 64) if case.operator == "window_attention"),
    *(case for case in of_stage(VARIANTS["pp-tiny"], 2, 64) if case.operator == "neighborhood_attention"),
]


@pytest.mark.compiler
@pytest.mark.parametrize("case", LAUNCHES, ids=[case.operator for case in LAUNCHES])
def test_registers_and_instructions_are_within_a_tenth_of_what_is_on_record(case):
    path = sass.RECORDS / f"{sass.record_name(90)}.json"
    if not path.is_file():
        pytest.skip(f"there is no record {path.name}; make it with: python benchmarks/sass.py --write")
    launches = [sass.Row(**each) for each in json.loads(path.read_text("utf-8"))["launches"]]
    known = {row.configuration: row for row in launches if (row.operator, row.shape) == (case.operator, case.shape)}
    rows = list(sass.rows_of(case, "fp16", "default", 90))
    assert [row.configuration for row in rows] == list(known)
    for row in rows:
        expected = known[row.configuration]
        for what in ("registers", "padded"):
            assert getattr(row, what) == pytest.approx(getattr(expected, what), rel=0.1), (what, row, expected)
        assert row.spilled_bytes <= expected.spilled_bytes
