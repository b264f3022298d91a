"""Registers that are read and never written are found, in a listing of what ptxas 12.8 made once, and early touches."""

from __future__ import annotations

import pytest

from tests.compile.sass import disturbed, is_serialized, unwritten

RIGHT = """
        /*0010*/                   UMOV UR7, URZ ;
        /*0020*/                   S2UR UR4, SR_CgaCtaId ;
        /*0030*/                   USGXT.U32 UR30, UR4, 0xe ;
        /*0040*/                   UIADD3 UR26, UP0, UR30, 0x40, URZ ;
        /*0050*/                   UIADD3.X UR27, UR7, -0x7fffffe0, URZ, UP0, !UPT ;
        /*0060*/                   ULDC.64 UR8, c[0x0][0x208] ;
        /*0070*/              @!P0 LDG.E R2, desc[UR8][R4.64] ;
        /*0080*/                   HGMMA.64x32x16.F32 R56, R28, gdesc[UR24].tnspB, R56 ;
"""


def test_what_is_written_above_may_be_read() -> None:
    assert unwritten(RIGHT) == []


def test_half_of_a_description_that_nothing_wrote_is_found() -> None:
    wrong = RIGHT.replace("UP0, UR30", "UP0, UR26").replace("UR7, -0x", "UR27, -0x")
    assert unwritten(wrong) == [
        "UIADD3 UR26, UP0, UR26, 0x40, URZ",
        "UIADD3.X UR27, UR27, -0x7fffffe0, URZ, UP0, !UPT",
    ]


def test_both_registers_of_a_pair_count() -> None:
    assert unwritten(RIGHT.replace("ULDC.64", "ULDC")) == ["LDG.E R2, desc[UR8][R4.64]"]
    assert unwritten(RIGHT.replace("UR27", "UR28")) == ["HGMMA.64x32x16.F32 R56, R28, gdesc[UR24].tnspB, R56"]


def test_logic_may_write_a_predicate_before_its_register() -> None:
    logic, jump = "/*0010*/ ULOP3.LUT UP0, UR15, UR11, 0x1, URZ, 0xc0, !UPT ;", "/*0020*/ UIADD3 UR2, UR15, 0x1, URZ ;"
    assert unwritten("/*0000*/ UMOV UR11, URZ ;" + logic + jump) == []
    assert unwritten(logic) == ["ULOP3.LUT UP0, UR15, UR11, 0x1, URZ, 0xc0, !UPT"]


def test_a_comparison_writes_no_register() -> None:
    assert unwritten("/*0010*/ UISETP.GE.AND UP0, UPT, UR5, UR6, UPT ;") == ["UISETP.GE.AND UP0, UPT, UR5, UR6, UPT"]


# Weights of the first half in R96 to R99, of the second in R104 to R107; sums of 16 rows in R24 to R31.
LOOP = """
        /*0100*/                   LOP3.LUT R96, R10, 0xf000f, R11, 0xf8, !PT ;
        /*0110*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0120*/                   FFMA R40, R24, R50, R40 ;
        /*0130*/                   WARPGROUP.ARRIVE ;
        /*0140*/                   HGMMA.64x16x16.F32 R24, R96, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0150*/                   LOP3.LUT R104, R12, 0xf000f, R11, 0xf8, !PT ;
        /*0160*/                   HGMMA.64x16x16.F32 R24, R104, gdesc[UR16], R24, gsb0 ;
        /*0170*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0180*/              @P4  BRA 0x100 ;
        /*0190*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*01a0*/                   STG.E.64 desc[UR4][R2.64], R30 ;
"""


def test_products_that_are_waited_for_in_the_right_places_are_not_disturbed() -> None:
    assert disturbed(LOOP) == []


@pytest.mark.parametrize(
    ("old", "new", "touched"),
    [
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "NOP", "LOP3.LUT R96"),  # the next turn overwrites the first half
        ("LE gsb0, 0x0 ;\n        /*0120*/", "LE gsb0, 0x1 ;\n        /*0120*/", "FFMA R40, R24"),
        ("LE gsb0, 0x0 ;\n        /*01a0*/", "LE gsb0, 0x1 ;\n        /*01a0*/", "STG.E.64"),
        ("LOP3.LUT R104", "LDSM.16.M88.4 R93", "LDSM.16.M88.4 R93"),
        ("LOP3.LUT R104", "IMAD.MOV.U32 R31", "IMAD.MOV.U32 R31"),
    ],
)
def test_a_touch_before_the_end_of_a_product_is_found(old: str, new: str, touched: str) -> None:
    assert old in LOOP
    assert disturbed(LOOP.replace(old, new))[0].startswith(touched)


def test_products_that_are_all_waited_for_are_serialized() -> None:
    assert not is_serialized(LOOP)
    arrival = "/*0150*/                   WARPGROUP.ARRIVE ;\n"
    assert is_serialized(LOOP + arrival)
    assert not is_serialized(arrival), "there is no product"
