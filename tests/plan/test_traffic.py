"""The count of bytes, on HLO text in which every byte can be counted by hand."""

import re

import pytest
from traffic import Program

LINE = 8 * 128 * 4  # one tile of float32
TEXT = """HloModule small, is_scheduled=true

%lookup (p0: f32[16,8,128], p1: s32[]) -> f32[8,128] {
  %p0 = f32[16,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %inner = f32[16,8,128]{2,1,0:T(8,128)} fusion(%p0), kind=kLoop, calls=%same
  %taken = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%inner, %p1), dynamic_slice_sizes={1,8,128}
  ROOT %out = f32[8,128]{1,0:T(8,128)} bitcast(%taken)
}

%same (q0: f32[16,8,128]) -> f32[16,8,128] {
  %q0 = f32[16,8,128]{2,1,0:T(8,128)} parameter(0)
  ROOT %bit = f32[16,8,128]{2,1,0:T(8,128)} bitcast(%q0)
}

%change (r0: f32[16,8,128], r1: f32[8,128], r2: s32[]) -> f32[16,8,128] {
  %r0 = f32[16,8,128]{2,1,0:T(8,128)} parameter(0)
  %r1 = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)
  %r2 = s32[]{:T(128)} parameter(2)
  %new = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%r1)
  ROOT %put = f32[16,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%r0, %new, %r2)
}

%body (state: (s32[], f32[16,8,128])) -> (s32[], f32[16,8,128]) {
  %state = (s32[]{:T(128)S(6)}, f32[16,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %cache = f32[16,8,128]{2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %entry = f32[8,128]{1,0:T(8,128)S(1)} fusion(%cache, %i), kind=kLoop, calls=%lookup
  %changed = f32[16,8,128]{2,1,0:T(8,128)} fusion(%cache, %entry, %i), kind=kLoop, calls=%change
  ROOT %next = (s32[]{:T(128)S(6)}, f32[16,8,128]{2,1,0:T(8,128)}) tuple(%i, %changed)
}

%condition (state.1: (s32[], f32[16,8,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)S(6)}, f32[16,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)S(6)} constant(5)
  ROOT %less = pred[]{:T(512)S(6)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (start: s32[], stack: f32[16,8,128], few: f32[3,130]) -> (s32[], f32[16,8,128]) {
  %start = s32[]{:T(128)S(6)} parameter(0)
  %stack = f32[16,8,128]{2,1,0:T(8,128)} parameter(1)
  %few = f32[3,130]{1,0:T(8,128)} parameter(2)
  %prefetch = (f32[3,130]{1,0:T(8,128)S(1)}, f32[3,130]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%few)
  %fetched = f32[3,130]{1,0:T(8,128)S(1)} copy-done(%prefetch)
  %state.2 = (s32[]{:T(128)S(6)}, /*index=1*/f32[16,8,128]{2,1,0:T(8,128)}) tuple(%start, %stack)
  ROOT %loop = (s32[]{:T(128)S(6)}, f32[16,8,128]{2,1,0:T(8,128)}) while(%state.2), condition=%condition, body=%body
}
"""


def test_a_step_reads_and_writes_its_slice_only():
  assert Program(TEXT).traffic("body") == 2 * LINE


def test_a_loop_counts_as_often_as_it_runs():
  # Beside the loop, the prefetch reads 3 x 130 numbers, which take two tiles.
  assert Program(TEXT).traffic() == 5 * 2 * LINE + 2 * LINE


def test_a_cache_that_is_copied_counts_twice():
  copied = TEXT.replace("= f32[16,8,128]{2,1,0:T(8,128)} fusion(%cache, %entry", "= COPY fusion(%whole, %entry")
  copy = "  %whole = f32[16,8,128]{2,1,0:T(8,128)} copy(%cache)\n  %changed = f32[16,8,128]{2,1,0:T(8,128)}"
  copied = re.sub(r"  %changed = COPY", copy, copied)
  assert Program(copied).traffic("body") == 2 * LINE + 2 * 16 * LINE


def test_the_open_loop_is_the_one_that_the_data_ends():
  with pytest.raises(ValueError):
    Program(TEXT).open_loop()
  ended_by_data = TEXT.replace("compare(%i.1, %limit), direction=LT", "and(%i.1, %limit)")
  assert Program(ended_by_data).open_loop() == "body"
  assert Program(ended_by_data).traffic() == 2 * LINE + 2 * LINE
