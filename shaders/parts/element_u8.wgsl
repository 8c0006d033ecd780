// Element type: codes of 8 bits with a scale and a zero point for each group, 16 in a load.
//
// A load of four words holds two runs of eight codes, the lowest byte first. A code becomes a float
// without a conversion, which is slow on GPUs: its bits go into the mantissa of 2^23. Exact.
alias Element8 = vec4<u32>;

const ELEMENT_RUNS = 2u;
const ELEMENT_CODED = true;
const ELEMENT_SCALE = 0xffffff00u; // Bits of a word of scales that are the scale.
const ELEMENT_SPLIT = true; // One f16 does not hold it.

// Four codes of a word, less the zero point.
fn element_codes(bits: u32, scale: u32) -> vec4<f32> {
    let bytes = (vec4<u32>(bits) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu);
    let raised = bitcast<vec4<f32>>(bytes | vec4<u32>(0x4b000000u));
    return raised - vec4<f32>(8388608.0 + f32(scale & 0xffu));
}

fn element_run_lo(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element_codes(v[2u * run], scale);
}

fn element_run_hi(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element_codes(v[2u * run + 1u], scale);
}
