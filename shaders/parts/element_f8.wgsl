// Element type: floats of 8 bits (e4m3) with a scale for each group, 16 in a load.
//
// A load of four words holds two runs of eight codes, the lowest byte first. The bits of a code become those
// of an f32 whose exponent is 120 more. That is right but for an exponent of 0, where there is no leading one:
// there, twice the number less 2^-6 is right, and it is the lesser of the two. No step meets a number too small
// for an f32, which a device may take for zero. Exact.
alias Element8 = vec4<u32>;

const ELEMENT_RUNS = 2u;
const ELEMENT_CODED = true;
const ELEMENT_SCALE = 0xffffffffu; // Bits of a word of scales that are the scale.
const ELEMENT_SPLIT = true; // One f16 does not hold it.

// Four codes of a word.
fn element_codes(bits: u32) -> vec4<f32> {
    let bytes = vec4<u32>(bits) >> vec4<u32>(0u, 8u, 16u, 24u);
    let normal = bitcast<vec4<f32>>(((bytes & vec4<u32>(0x7fu)) << vec4<u32>(20u)) + vec4<u32>(0x3c000000u));
    let size = min(normal, fma(normal, vec4<f32>(2.0), vec4<f32>(-0.015625)));
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(size) | ((bytes & vec4<u32>(0x80u)) << vec4<u32>(24u)));
}

fn element_run_lo(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element_codes(v[2u * run]);
}

fn element_run_hi(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element_codes(v[2u * run + 1u]);
}
