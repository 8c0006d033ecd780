// Element type: f16, in 32-bit words: needs no f16 feature, and naga 30 cannot bitcast vec2<f16>.
alias Element8 = vec4<u32>;

alias Element4 = vec2<u32>;

alias Element2 = u32;

fn element8_lo(v: Element8) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(v.x), unpack2x16float(v.y));
}

fn element8_hi(v: Element8) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(v.z), unpack2x16float(v.w));
}

fn element4_load(v: Element4) -> vec4<f32> {
    return vec4<f32>(element2_load(v.x), element2_load(v.y));
}

fn element2_load(v: Element2) -> vec2<f32> {
    return unpack2x16float(v);
}

fn element2_store(v: vec2<f32>) -> Element2 {
    return pack2x16float(v);
}

// A load holds one run of eight, which is its own scale.
const ELEMENT_RUNS = 1u;
const ELEMENT_CODED = false;
const ELEMENT_SCALE = 0u;
const ELEMENT_SPLIT = false; // One f16 holds it.

fn element_run_lo(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element8_lo(v);
}

fn element_run_hi(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return element8_hi(v);
}
