// A 16 x 16 transposition in registers, for layouts in which 16 rows lie side by side.

#pragma once

#include "common.h"

#if defined(KBIT_AVX512)
namespace {

// Words of 4 bytes, 16 rows r of 16, as columns in t; r is lost.
inline void transpose16(__m512i* r, __m512i* t) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; j += 2) {
        t[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
        t[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 16; j += 4) {
        r[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
        r[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
        r[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
        r[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
    }
    // r[4g + c] holds, in its lane l, column 4l + c of rows 4g to 4g + 3.
#pragma GCC unroll 16
    for (int c = 0; c < 4; c++) {
        __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44), high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee);
        __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
        __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
        t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
}

}  // namespace
#endif
