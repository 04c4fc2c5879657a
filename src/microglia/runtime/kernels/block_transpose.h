// Rows of 32-bit numbers become columns, in AVX-512 registers. Include after the target pragma, and <immintrin.h> before it.
#ifndef MICROGLIA_BLOCK_TRANSPOSE_H
#define MICROGLIA_BLOCK_TRANSPOSE_H

namespace microglia::block {
namespace {

constexpr int side = 16;

// 16 rows of 16 dwords become columns.
inline void transpose(__m512i (&row)[side]) {
  __m512i half[side];
  for (int i = 0; i < side; i += 2) {
    half[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]), half[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < side; i += 4) {
    row[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]), row[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]), row[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88), half[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xDD);
    half[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    half[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    row[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88), row[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xDD);
  }
}

// Within each 128 bits, 4 rows of 4 dwords become columns: 16 outputs of a pixel, and four outputs of 16 pixels, and back.
inline void transpose_lanes(__m512i (&row)[4]) {
  const __m512i low = _mm512_unpacklo_epi32(row[0], row[1]), high = _mm512_unpackhi_epi32(row[0], row[1]);
  const __m512i other_low = _mm512_unpacklo_epi32(row[2], row[3]), other_high = _mm512_unpackhi_epi32(row[2], row[3]);
  row[0] = _mm512_unpacklo_epi64(low, other_low), row[1] = _mm512_unpackhi_epi64(low, other_low);
  row[2] = _mm512_unpacklo_epi64(high, other_high), row[3] = _mm512_unpackhi_epi64(high, other_high);
}

}  // namespace
}  // namespace microglia::block

#endif
