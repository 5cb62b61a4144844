/* Kept 16-bit values to their lanes in one instruction. Needs AVX512-VBMI2, which CPUs with matrix units have. */

/* Both columns of sixteen rows as pairs, where bit 2r + c of the mask says whether row r of column c is stored. */
static inline vint vp_expand(const bf16 *p, uint32_t mask)
{
    return _mm512_maskz_expandloadu_epi16(mask, p);
}

/* Two columns of sixteen rows of which only some are stored, from p; zeros in the other lanes. Bits 0-15 of the mask
 * say which rows the first column keeps, bits 16-31 the second, whose values follow. */
static inline void vf_expand_f16(const f16 *p, const f16 *end, uint32_t mask, vfloat *first, vfloat *second)
{
    __m512i both = _mm512_maskz_expandloadu_epi16(mask, p);
    *first = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
    *second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}

/* The same with bf16, where bit 2r + c of the mask is row r of column c, and values stand in that order. */
static inline void vf_expand_bf16(const bf16 *p, const bf16 *end, uint32_t mask, vfloat *first, vfloat *second)
{
    __m512i both = vp_expand(p, mask);
    *first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}
