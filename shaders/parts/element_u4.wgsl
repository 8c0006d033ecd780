// Element type: codes of 4 bits with a scale and a zero point for each group, 32 in a load.
//
// A load of four words holds four runs of eight codes, the lowest four bits first. A code becomes a float
// without a conversion, which is slow on GPUs: its bits go into the mantissa of 2^23, from where the power
// of two and the zero point are taken off together. Every step is exact, fused or not.
alias Element8 = vec4<u32>;

const ELEMENT_RUNS = 4u;
const ELEMENT_CODED = true;
const ELEMENT_SCALE = 0xffffff00u; // Bits of a word of scales that are the scale.
const ELEMENT_SPLIT = true; // One f16 does not hold it.

// Four codes in the low 16 bits, less the zero point.
fn element_codes(bits: u32, scale: u32) -> vec4<f32> {
    let raised = (vec4<u32>(bits) & vec4<u32>(0xfu, 0xf0u, 0xf00u, 0xf000u)) | vec4<u32>(0x4b000000u);
    let shift = vec4<f32>(1.0, 0.0625, 0.00390625, 0.000244140625);
    let zero = vec4<f32>(f32(scale & 0xffu));
    return fma(bitcast<vec4<f32>>(raised), shift, -(shift * 8388608.0 + zero));
}

fn element_run_lo(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element_codes(v[run], scale);
}

fn element_run_hi(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element_codes(v[run] >> 16u, scale);
}
