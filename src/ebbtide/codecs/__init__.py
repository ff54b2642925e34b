"""How numbers are stored in fewer bits: the definition that `csrc/` repeats bit for bit.

Plain Python on single numbers and lists, and the standard library only. Encoding rounds by adding
bits below the kept part: a fixed pattern rounds to nearest, uniform bits round stochastically (the
expected value is the number itself). The bits come from a counter-based hash, so a run can be
repeated exactly on any number of threads and resumed from the step count alone.
`docs/low_memory.md` tells why the encodings are what they are.
"""

from ebbtide.codecs.dither import block_word, dither_bits, lane_constant, row_key
from ebbtide.codecs.floats import (
    bfloat16_decode,
    bfloat16_encode,
    float16_decode,
    float16_encode,
)
from ebbtide.codecs.moments import (
    EncodedMoments,
    decode_first,
    decode_second,
    encode_moments,
    encode_second,
    window_of,
)
from ebbtide.codecs.split import join, split

__all__ = [
    "MASTER_FORMATS",
    "STATE_FORMATS",
    "EncodedMoments",
    "bfloat16_decode",
    "bfloat16_encode",
    "block_word",
    "decode_first",
    "decode_second",
    "dither_bits",
    "encode_moments",
    "encode_second",
    "float16_decode",
    "float16_encode",
    "join",
    "lane_constant",
    "row_key",
    "split",
    "window_of",
]

# In which a user asks for moments to be kept, and for what a 16-bit parameter cannot hold.
STATE_FORMATS = ("float32", "bfloat16", "8bit")
MASTER_FORMATS = ("none", "stochastic", "24bit", "32bit")
