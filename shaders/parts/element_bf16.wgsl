// Element type: bf16, the upper half of an f32, in 32-bit words.
alias Element8 = vec4<u32>;

alias Element4 = vec2<u32>;

alias Element2 = u32;

fn element8_lo(v: Element8) -> vec4<f32> {
    return vec4<f32>(element2_load(v.x), element2_load(v.y));
}

fn element8_hi(v: Element8) -> vec4<f32> {
    return vec4<f32>(element2_load(v.z), element2_load(v.w));
}

fn element4_load(v: Element4) -> vec4<f32> {
    return vec4<f32>(element2_load(v.x), element2_load(v.y));
}

fn element2_load(v: Element2) -> vec2<f32> {
    return vec2<f32>(bitcast<f32>(v << 16u), bitcast<f32>(v & 0xffff0000u));
}

// Rounds to nearest, ties to even.
fn element2_store(v: vec2<f32>) -> Element2 {
    let bits = bitcast<vec2<u32>>(v);
    let rounded = (bits + vec2<u32>(0x7fffu) + ((bits >> vec2<u32>(16u)) & vec2<u32>(1u))) >> vec2<u32>(16u);
    return rounded.x | (rounded.y << 16u);
}

// A load holds one run of eight, which is its own scale.
const ELEMENT_RUNS = 1u;
const ELEMENT_CODED = false;
const ELEMENT_SCALE = 0u;
const ELEMENT_SPLIT = true; // f16 has not its range.

fn element_run_lo(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element8_lo(v);
}

fn element_run_hi(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element8_hi(v);
}
