/* Products of pairs in vector registers, where there are no matrix units. Needs what simd_pairs.h needs.
 *
 * Pairs are [columns / 2][LANES][2]; x is bf16 [column / 4][entry][column % 4] of nb entries. */

/* sum + both columns of each lane times the two at x. In assembly as `vi_dot_four` is: the load is free inside the
 * instruction. */
static inline vfloat vp_dot(vfloat sum, vint pair, const bf16 *x)
{
    const struct { bf16 column[2]; } *two = (const void *)x;
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pair), "m"(*two));
    return sum;
}

/* The two columns at x in every lane, for strips that share them. */
static inline vint vp_set(const bf16 *x)
{
    int32_t two;
    memcpy(&two, x, sizeof two);
    return _mm512_set1_epi32(two);
}

/* The four columns at x, over and over. */
static inline vint vp_four(const bf16 *x)
{
    int64_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi64(four);
}

/* Each 16-bit word takes one of 32 columns, by the low five bits of its pick; of four, which come over and over, by the
 * low two. */
static inline vint vp_pick(vint columns, vint pick)
{
    return _mm512_permutexvar_epi16(pick, columns);
}

/* Of a word of positions of eight groups, a column of group g and of the group two further on, of a unit of 32: the
 * first that they keep or the second. */
static inline vint vp_two_columns(vint positions, const int g, const int second)
{
    const int first = g % 4 * 8 + g / 4 * 4 + 2 * second, column = 4 * g;
    const __m512i base = _mm512_set1_epi32(column | (column + 8) << 16);
    vint place = first ? _mm512_srli_epi32(positions, first) : positions;
    return _mm512_ternarylogic_epi32(place, _mm512_set1_epi16(3), base, 0xea); /* place & 3 | base */
}

/* Of a word of places, those that begin at a bit and 16 bits on: of `size` columns from `first` on, and from `second`. */
static inline vint vp_places(vint places, const int bit, const int size, const int first, const int second)
{
    const __m512i base = _mm512_set1_epi32(first | second << 16);
    vint place = bit ? _mm512_srli_epi32(places, bit) : places;
    return _mm512_ternarylogic_epi32(place, _mm512_set1_epi16((short)(size - 1)), base, 0xea); /* and, or */
}

/* The low (0) or the high (1) 16 bits of each lane of a, then those of b. */
static inline vint vp_of_both(vint a, vint b, const int high)
{
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    __m512i first = high ? _mm512_srli_epi32(a, 16) : a, second = high ? b : _mm512_slli_epi32(b, 16);
    return _mm512_ternarylogic_epi32(upper, second, first, 0xca); /* upper ? second : first */
}

/* Both 16-bit words of each lane, moved down by as many places as each says. */
static inline vint vp_moved(vint words, const int even, const int odd)
{
    return _mm512_srlv_epi16(words, _mm512_set1_epi32(even | odd << 16));
}

/* Of a word of positions of eight groups, the columns that group g keeps, in the low two bits of words. */
static inline vint vp_columns(vint positions, const int g)
{
    const long long first = g % 4 * 8 + g / 4 * 4, both = first | (first + 2) << 16; /* bits, in two lanes at a time */
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(both | (both + 0x200020) << 32), positions);
}

/* Of a word of two nibbles each of four groups, those of group g, in the low bits of words. */
static inline vint vp_kept_nibbles(vint word, const int g)
{
    return vp_moved(vp_half(word, g / 2), g % 2 * 8, g % 2 * 8 + 4);
}

/* Of a lane's eight nibbles (columns 0 and 4 in its lowest byte, 3 and 7 in its highest), those of columns 2 * j
 * and 2 * j + 1, in the low bits of words: as in simd_pairs.h, but shifts are more plentiful here than shuffles. */
static inline vint vp_step(vint word, const int j)
{
    return vp_moved(vp_half(word, j % 2), j / 2 * 4, j / 2 * 4 + 8);
}

/* `vi_expand_words` where an expand waits for what its register held before, even if zeros come between (Zen 4): into
 * one that was just cleared. */
static inline vint vi_expand_words(__mmask32 mask, const void *p)
{
    const struct { uint16_t word[32]; } *words = p;
    vint to = _mm512_setzero_si512();
    __asm__("vpexpandw %1, %0%{%2%}" : "+v"(to) : "m"(*words), "Yk"(mask));
    return to;
}

static inline vint vi_expand_lanes(__mmask16 mask, vint lanes)
{
    vint to = _mm512_setzero_si512();
    __asm__("vpexpandd %1, %0%{%2%}" : "+v"(to) : "v"(lanes), "Yk"(mask));
    return to;
}

/* In assembly, as `vi_expand_words` is: `none` is copied for each block, so that none waits for the one before. */
static inline vint vi_expand_bytes(vint none, __mmask64 mask, vint bytes)
{
    __asm__("vpexpandb %1, %0%{%2%}" : "+v"(none) : "v"(bytes), "Yk"(mask));
    return none;
}

static inline vfloat vp_multiply_add(vint pair, vint x, vfloat sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)x);
}

/* `ahead`, where so many entries meet what is read that arithmetic takes longer than the read. Else the hardware is early
 * enough by itself, and to ask as well takes more than it brings. */
INLINE void ahead_if(const int pays, const void *p, const int bytes)
{
    if (pays)
        ahead(p, bytes);
}

/* How many sums each of nb outputs has, by turns: enough to hide the latency of a product. */
INLINE int dot_chains(const int nb)
{
    return nb == 1 ? 4 : 8 / nb;
}

INLINE void clear_dots(vfloat *sum, const int nb)
{
    #pragma GCC unroll 8
    for (int i = 0; i < nb * dot_chains(nb); i++)
        sum[i] = vf_zero();
}

/* The sums of nb entries += `columns` columns of pairs times x. */
INLINE void add_dots(vfloat *sum, const bf16 *pairs, const int columns, const bf16 *x, const int nb)
{
    for (int k = 0; k < columns; k += 16, x += 16 * nb)
        #pragma GCC unroll 8
        for (int i = 0; i < 8; i++, pairs += 2 * LANES) {
            vint pair = vp_load(pairs);
            vfloat *own = sum + i % dot_chains(nb) * nb;
            #pragma GCC unroll 8
            for (int n = 0; n < nb; n++)
                own[n] = vp_dot(own[n], pair, x + (i / 2 * nb + n) * 4 + i % 2 * 2);
        }
}

/* The same with pairs of `count` kept columns, and which of the 32 columns at x [nb][BK] they are. */
INLINE void add_dots_of_columns(vfloat *sum, const bf16 *kept, const int count, const bf16 *x, const int nb)
{
    #pragma GCC unroll 16
    for (int i = 0; i < count / 2; i++) {
        vint pair = vp_load(kept + i * 2 * LANES), pick = vp_load(kept + (count + 2 * i) * LANES);
        vfloat *own = sum + i % dot_chains(nb) * nb;
        #pragma GCC unroll 8
        for (int n = 0; n < nb; n++)
            own[n] = vp_multiply_add(pair, vp_pick(vp_load(x + n * BK), pick), own[n]);
    }
}

/* `count` numbers of x with the middle two of each four columns in each other's place. */
INLINE const bf16 *cross_columns(const bf16 *x, const int count, bf16 *to)
{
    for (int i = 0; i < count; i += 32) {
        __m512i four = _mm512_loadu_si512(x + i);
        _mm512_store_si512(to + i, _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(four, 0xd8), 0xd8));
    }
    return to;
}

/* The same x, of which compilers do not know that it is: they would load it once for all strips where it is short, and
 * store it again, as there are no registers for it. */
static inline const bf16 *anew_for_strip(const bf16 *x, const int strip)
{
    __asm__("" : "+r"(x) : "r"(strip));
    return x;
}

/* The same with pairs of kept columns, which stand behind each other, and of which of four columns they are. */
INLINE void add_picked_dots(vfloat *sum, const bf16 *kept, const int columns, const bf16 *x, const int nb)
{
    #pragma GCC unroll 8
    for (int i = 0; i < columns / 4; i++, x += 4 * nb) {
        vint pair = vp_load(kept + i * 2 * LANES), pick = vp_load(kept + (columns / 4 + i) * 2 * LANES);
        vfloat *own = sum + i % dot_chains(nb) * nb;
        #pragma GCC unroll 8
        for (int n = 0; n < nb; n++)
            own[n] = vp_multiply_add(pair, vp_pick(vp_four(x + 4 * n), pick), own[n]);
    }
}

/* A tile's columns of x, an entry after the other: fours of columns that stand entry by entry, parted again and again
 * in those of even and of odd entries, which brings entries in the order of their numbers' bits read backwards. */
INLINE const bf16 *entries_apart(const bf16 *x, bf16 *to, const int nb)
{
    const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    const __m512i odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    for (int k = 0; nb > 1 && k < BK; k += 32, x += 32 * nb) {
        vint all[8], parted[8];
        #pragma GCC unroll 8
        for (int i = 0; i < nb; i++)
            all[i] = vp_load(x + 32 * i);
        #pragma GCC unroll 3
        for (int size = nb; size > 1; size /= 2) {
            #pragma GCC unroll 4
            for (int i = 0; i < nb / 2; i++) {
                const int from = i * 2, at = from / size * size + from % size / 2;
                parted[at] = _mm512_permutex2var_epi64(all[from], even, all[from + 1]);
                parted[at + size / 2] = _mm512_permutex2var_epi64(all[from], odd, all[from + 1]);
            }
            #pragma GCC unroll 8
            for (int i = 0; i < nb; i++)
                all[i] = parted[i];
        }
        #pragma GCC unroll 8
        for (int i = 0; i < nb; i++) {
            const int n = nb == 8 ? i % 2 * 4 + i / 2 % 2 * 2 + i / 4 : nb == 4 ? i % 2 * 2 + i / 2 : i;
            vp_store(to + n * BK + k, all[i]);
        }
    }
    return nb > 1 ? to : x;
}

/* Of BK columns at x what each 16-bit word names, where the mask has it; zeros elsewhere. */
INLINE vint pick_columns(const bf16 *x, vint column, __mmask32 mask)
{
    enum { VECTORS = BK / 32 };
    __m512i picked = _mm512_setzero_si512(), sixty_four = _mm512_srli_epi16(column, 6);
    #pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i += 2) {
        const __m512i low = vp_load(x + 32 * i), high = vp_load(x + 32 * (i + 1 < VECTORS ? i + 1 : i));
        const __m512i own = _mm512_set1_epi16((short)(i / 2));
        const __mmask32 here = VECTORS <= 2 ? mask : _mm512_mask_cmpeq_epi16_mask(mask, sixty_four, own);
        picked = _mm512_or_si512(picked, _mm512_maskz_permutex2var_epi16(here, low, column, high));
    }
    return picked;
}

/* Add to acc [nb][LANES] one weight of each of some rows and another of some of them, times their own columns of x
 * [nb][BK]. Of rows that have none, x is not read: it may be infinite. */
INLINE void add_dots_apart(
    uint32_t rows, const uint8_t *columns, const bf16 *weights, uint32_t also, const uint8_t *other_columns,
    const bf16 *other_weights, const bf16 *x, float *acc, const int nb)
{
    const __mmask16 first = (__mmask16)rows, second = (__mmask16)also;
    const __m512i words = _mm512_maskz_set1_epi32(first, 0x0000ffff);
    const __mmask32 both = _mm512_movepi16_mask(_mm512_mask_set1_epi32(words, second, -1));
    __m512i weight = _mm512_cvtepu16_epi32(_mm256_maskz_expandloadu_epi16(first, weights));
    __m512i other = _mm512_cvtepu16_epi32(_mm256_maskz_expandloadu_epi16(second, other_weights));
    __m512i column = _mm512_cvtepu8_epi32(_mm_maskz_expandloadu_epi8(first, columns));
    __m512i other_column = _mm512_cvtepu8_epi32(_mm_maskz_expandloadu_epi8(second, other_columns));
    weight = _mm512_or_si512(weight, _mm512_slli_epi32(other, 16));
    column = _mm512_or_si512(column, _mm512_slli_epi32(other_column, 16));
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++) {
        vfloat sum = vp_multiply_add(weight, pick_columns(x + n * BK, column, both), vf_load_f32(acc + 16 * n));
        vf_store_f32(acc + 16 * n, sum);
    }
}

/* What entry n has in its sums, two by two. */
INLINE vfloat total_dots(const vfloat *sum, const int n, const int nb)
{
    vfloat all[8];
    #pragma GCC unroll 8
    for (int i = 0; i < dot_chains(nb); i++)
        all[i] = sum[i * nb + n];
    #pragma GCC unroll 3
    for (int half = dot_chains(nb) / 2; half > 0; half /= 2)
        #pragma GCC unroll 4
        for (int i = 0; i < half; i++)
            all[i] = vf_add(all[i], all[half + i]);
    return all[0];
}

/* Add them to acc [nb][LANES]. */
INLINE void store_dots(float *acc, const vfloat *sum, const int nb)
{
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++)
        vf_store_f32(acc + 16 * n, vf_add(vf_load_f32(acc + 16 * n), total_dots(sum, n, nb)));
}

/* Add them to acc [nb][LANES], times the scale of each row. */
INLINE void store_scaled_dots(float *acc, vfloat scale, const vfloat *sum, const int nb)
{
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++)
        vf_store_f32(acc + 16 * n, vf_fma(scale, total_dots(sum, n, nb), vf_load_f32(acc + 16 * n)));
}

/* As in simd_common.h, where a broadcast of four floats takes a shuffle as much as the pick does (Zen 4): of four entries,
 * one after the other, sixteen columns are loaded; of eight, four columns of four entries, among which they stand. */
INLINE const float *columns_to_pick(const float *x, float *room, const int nb)
{
    return BK % 16 || nb != 4 ? x : entries_one_by_one(x, room, nb);
}

INLINE void multiply_add_picked(
    vfloat w, vint pick, const float *x, const int k, vfloat *sum, const int column, const int nb)
{
    vfloat *own = sum + column % chains(nb) * nb;
    if (BK % 16 == 0 && nb == 4) {
        multiply_add_of_columns(w, pick, x + k / 16 * 16, k % 16, 4, sum, column, nb);
        return;
    }
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++) {
        if (nb < 4) {
            own[n] = vf_fma(w, vf_pick4(vf_broadcast4(x + k * nb + 4 * n), pick), own[n]);
        } else {
            const int from = nb == 4 ? 0 : n < 5 ? n : n - 3; /* not past the last */
            const __m512i mask = _mm512_set1_epi32(3), four = _mm512_set1_epi32((n - from) * 4);
            __m512i index = _mm512_ternarylogic_epi32(pick, mask, four, 0xea); /* pick & mask | four */
            own[n] = vf_fma(w, _mm512_permutexvar_ps(index, _mm512_loadu_ps(x + k * nb + from * 4)), own[n]);
        }
    }
}
