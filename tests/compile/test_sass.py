"""Registers that are read and never written are found, in a listing of what ptxas 12.8 made once."""

from __future__ import annotations

from tests.compile.sass import unwritten

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


def test_a_comparison_writes_no_register() -> None:
    assert unwritten("/*0010*/ UISETP.GE.AND UP0, UPT, UR5, UR6, UPT ;") == ["UISETP.GE.AND UP0, UPT, UR5, UR6, UPT"]
