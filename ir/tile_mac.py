"""A format's C: what `TileFormat.tile_mac` returns, for the CPU backend."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from stoicc.ir.fragment import Planes, Tile

NEVER = 1 << 30
"""For a `least_..`: batch entries that no call has."""


@dataclass(frozen=True)
class TilePairs:
    """How a tile is unpacked for matrix units (`codegen/cpu/simd_amx.h`) or bf16 products in vectors, unit by unit.

    A unit is one strip and `columns` of its columns; a strip's units are neighbours, unpacked a few ahead of those that
    are multiplied, in turns with them: small ones keep all parts of a core busy. The text of the function is

        INLINE void {name}(<one pointer per plane>, const int unit, bf16 *pairs)

    and writes `[columns / 2][16][2]` to pairs: two neighbouring columns of a row are one 32-bit lane.
    With `scaled` it is `INLINE vfloat {name}(...)` and returns what each row's sums are multiplied by in
    fp32, so that integer codes need not be rounded again.

    Attributes:
        columns: of a unit; a multiple of 32 that divides BK. Where the text says `{columns}` for them, units of fewer
            will do: without matrix units 32 columns are multiplied in vectors while they are in registers.
        group: neighbouring units of a strip that return the same; their sums are scaled once.
        least: batch entries from which they are faster than floats and digits.
        least_in_vectors: the same without matrix units; each eight entries unpack a tile once.
        least_blocked: without matrix units, batch entries from which unpacking once for all of them is faster; no fewer
            than `least_in_vectors`.
        crossed: of `TileMac.dots`: pairs are columns 0 and 2, then 1 and 3 of each four, as they come out of codes of
            which four neighbours share a lane's bytes: a shift for each pair, where neighbours take a shuffle as well.
        picked: of `TileMac.dots`, or of the pairs of `TileMac.in_vectors`, which then serve any batch: lanes pick their
            columns of x, so many of a unit, which has 32: an even number. The function writes weights two by two,
            `[picked / 2][16][2]`, then as many 16-bit words: the column of the unit that each belongs to. 0: they do
            not pick.
        most: of `TileMac.dots`: batch entries at a time (1, 2, 4 or 8) up to which they are faster than what else
            there is.
        ordered: of `TileMac.dots`: the units of a tile come in order, and the function takes `int64_t *place` last, a
            number of its own that is 0 at the first of them: where its codes go on, if they are of no fixed length.
        apart: of `TileMac.dots`: C text of a function that adds what a strip's units leave out, after them:

            INLINE void {name}(<planes>, const int strip, const bf16 *x, float *acc, const int nb, int64_t *place)

            x is bf16 `[nb][BK]`, acc the strip's fp32 `[nb][16]`, and place as above.
        whole: of `TileMac.dots`: the function multiplies a whole tile in an order of its own, as `TileMac.source` does,
            and serves any batch below the `least_blocked` of `pairs`, or any at all where that is `NEVER`:

            INLINE void {name}(<planes>, const bf16 *x, float *acc, const int nb)
    """

    source: str
    columns: int
    scaled: bool = False
    group: int = 1
    least: int = 2
    least_in_vectors: int = 5
    least_blocked: int = 16
    crossed: bool = False
    picked: int = 0
    most: int = 8
    ordered: bool = False
    apart: str = ""
    whole: bool = False

    @property
    def alone(self) -> bool:
        """Whether a unit is all there is to it: no place that goes on from unit to unit, nothing after a strip."""
        return not (self.ordered or self.apart or self.whole)

    def in_units(self, columns: int, name: str = "") -> "TilePairs":
        """The same for units of so many columns, which the text then says as a number or by name."""
        return replace(self, source=self.source.replace("{columns}", name or str(columns)), columns=columns)


@dataclass(frozen=True)
class TileOctets:
    """How a tile of codes is unpacked for integer matrix units (`codegen/cpu/simd_octets.h`), unit by unit.

    As `TilePairs`, but x is multiplied as three 8-bit digits (`TileMac.digits`) and codes are not rounded:
    they are signed bytes. The text of the function is

        INLINE vfloat {name}(<one pointer per plane>, const int unit, int8_t *octets)

    It writes `[columns / 4][16][4]` to octets, four neighbouring columns of a row to a 32-bit lane, and returns
    what each row's sums are multiplied by in fp32.

    Attributes:
        columns: of a unit; a multiple of 64 that divides BK.
        most: batch entries up to which octets are faster than pairs, where a kernel has both: there are
            three rows of digits to an entry, and three sums to scale.
        group: neighbouring units of a strip that return the same; their sums are scaled once.
    """

    source: str
    columns: int
    most: int = 16
    group: int = 1


@dataclass(frozen=True)
class TileFloats:
    """How a tile is unpacked to fp32, strip by strip, for a large batch on vector units (`codegen/cpu/blocked.py`).

    The text of the function is

        INLINE void {name}(<one pointer per plane>, const int strip, float *weights)

    and writes `[COLUMNS][16]` to weights: a column of the strip after the other, zeros in columns past BK.

    Attributes:
        least: batch entries from which that is faster than `TileMac.source`, which may leave out what is not stored.
    """

    source: str
    least: int = 48


@dataclass(frozen=True)
class PairsOfCodes:
    """How codes become bf16 pairs by a look-up, for a composed format that has them elsewhere.

    Attributes:
        start: C before a unit's codes; `unit / GROUP` is its group of columns, counted over strips.
        pairs: C that sets `vint pair[2]`: columns 0 and 2, then 1 and 3, of the four in the bytes of `code`, which are
            codes as they are packed.
        scale: C of the group's scales.
        size: columns of a group.
    """

    start: str
    pairs: str
    scale: str
    size: int


@dataclass(frozen=True)
class LaneCodes:
    """What codes mean one by one, wherever they stand, for a composed format that has them elsewhere.

    In all texts `code` is a vint of four codes to a lane, as the canonical plane has them, in bytes of their own, and
    `at` is the group of scales, counted over strips.

    Attributes:
        scale: C of what a group's sums are multiplied by in fp32.
        start: C before a group's codes.
        signed: C of a vint of signed bytes, where codes are whole numbers from -128 to 127; "" where they are not.
        floats: C of a vfloat, of the codes in bytes j; "" where `signed` says it. For pairs of bf16 there is
            `TileMac.pairs_of`, without which they are made of signed bytes.
    """

    scale: str
    start: str = ""
    signed: str = ""
    floats: str = ""


@dataclass(frozen=True)
class TileMac:
    """A format's CPU code: multiply one tile by a block of x, never materialising the tile.

    `source` is one C function (helpers may stand before it), emitted as it is but for its name:

        INLINE void {name}(<one pointer per plane>, const float *x, float *acc, const int nb)

    Lanes are rows: a *strip* is 16 rows of the tile. The function adds the tile times x to acc.

    - A plane's pointer is at this tile's (packed) entry and has the C type of the packed
      dtype: f32, f16, bf16, uint8_t, int8_t, int16_t, int32_t or int64_t. A RAGGED plane passes
      its pointer and then its count, an int64_t.
    - x holds nb batch entries of the tile's columns, fp32: column k of entry n is at
      `x[(k / 4 * nb + n) * 4 + k % 4]`. Columns past the matrix are zero.
    - acc is fp32 `[STRIPS][nb][16]`: row r of entry n is lane `r % 16` of strip `r / 16`.
    - nb is 1, 2, 4 or 8 and a constant at every call, so that loops over it unroll.
    - BM, BK, COLUMNS (BK rounded up to a multiple of 4), STRIPS and LANES (16) are constants.

    The vector vocabulary (`vf_load_bf16`, `multiply_add`, ...) is in `codegen/cpu/simd_*.h`; code
    written in it runs on every instruction set, and only what it uses is emitted. Planes are
    put in lane order by `pack`, with the helpers of `stoicc.codegen.cpu.lanes`. Planes of more than
    1 KB an entry are streams: call `ahead(p, bytes)` as they are read, or memory is not kept busy.

    Attributes:
        source: C text of the function.
        pack: canonical planes (one row per *entry*: a shared GROUP entry comes once) -> planes in
            SIMD lane order, same names and leading dimensions. A RAGGED plane comes with its
            offsets `<plane>_ptr`, which may change.
        decode: optional C text of a function that writes the whole tile, for large batches:

            static void {name}(<one pointer per *canonical* plane>, T *out, const int64_t stride)

            T is the weight's C type; out[r * stride + k] must equal `TileFormat.decode` bit for bit, used without it.
        digits: optional C text for integer units (`simd_digits.h`):

            INLINE void {name}(<planes>, const int8_t *x, float *acc, const int nb)

            x is three 8-bit digits of a number of 22 bits and a sign, in units of each tile column and entry:
            `[BK / 16][nb][digit][16]`; what follows is read by `digit_sums` and `digit_units`. nb is 1, 2, 4 or 8, of
            which `few_digits(nb)` have sums in registers at a time. x that has no such form comes to `source`.
        code_bits: bits of the codes that `digits` multiplies. Without VNNI products are added in 16 bits, which is for
            codes of up to 5 bits, at batch 1.
        digits_of: optional: makes the text of `digits` for a composed format, which has the codes elsewhere, from: the
            parameters in place of the codes' plane, `codes` among them; the C type that it points to; C that sets
            `vint four[4]` to the stored codes of columns k .. k + 15 of a `group` of a `strip`, four neighbours in a
            lane's bytes, and moves `codes` on; and C that goes first.
        pairs_of: optional: how codes are looked up, for the same.
        in_lanes: what codes mean one by one, for the same, where `Elements.in_lanes` says that this is here.
        pairs: optional code for matrix units, used for bf16 weights and x at a larger batch.
        octets: optional code for integer matrix units, used from batch 2 on for x in digits, of any dtype.
        unpack: optional exact inverse of `pack`, for any run of entries: `unpack(packed, tile)` are canonical planes
            bit for bit. With it a kernel that has packed its planes lets the canonical ones go. RAGGED planes stay.
        decode_packed: optional C text like `decode`, from *packed* planes, none RAGGED; else they are unpacked first.
        floats: optional code for large batches on vector units.
        picks: optional code of 2:4 tiles for bf16 products in vectors, where there are no matrix units, instead of
            `pairs`, which have to be there too. A unit has 32 columns. The function writes the two kept columns of
            each four as a pair, `[8][16][2]`, then as many 16-bit words, whose low two bits say which of the four
            columns it is; other bits are ignored.
        dots: optional code for bf16 products in vectors of a batch of few, instead of `pairs`, which have to be there
            too. A unit may have 16 columns.
        in_vectors: optional code of the same tiles with planes packed in another order, instead of all this, where no
            matrix units multiply them. `unpack` has to be there.
    """

    source: str
    pack: Callable[[Planes], Planes] = lambda planes: planes
    decode: str = ""
    digits: str = ""
    pairs: TilePairs | None = None
    octets: TileOctets | None = None
    unpack: Callable[[Planes, Tile], Planes] | None = None
    decode_packed: str = ""
    floats: TileFloats | None = None
    picks: TilePairs | None = None
    dots: TilePairs | None = None
    in_vectors: "TileMac | None" = None
    code_bits: int = 8
    digits_of: Callable[[str, str, str, str], str] | None = None
    pairs_of: PairsOfCodes | None = None
    in_lanes: LaneCodes | None = None

    @property
    def units(self) -> TilePairs | None:
        """What a format that is composed with this one can unpack for a batch of few: `dots`, else `pairs`."""
        code = self.dots if self.dots is not None and self.dots.alone else self.pairs
        return code and code.in_units(code.columns)
