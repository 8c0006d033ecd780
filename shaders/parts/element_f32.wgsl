// Element type: f32. Eight in a row are loaded at once, two are stored at once.
struct Element8 {
    lo: vec4<f32>,
    hi: vec4<f32>,
}

alias Element4 = vec4<f32>;

alias Element2 = vec2<f32>;

fn element8_lo(v: Element8) -> vec4<f32> {
    return v.lo;
}

fn element8_hi(v: Element8) -> vec4<f32> {
    return v.hi;
}

fn element4_load(v: Element4) -> vec4<f32> {
    return v;
}

fn element2_load(v: Element2) -> vec2<f32> {
    return v;
}

fn element2_store(v: vec2<f32>) -> Element2 {
    return v;
}

// A load holds one run of eight, which is its own scale.
const ELEMENT_RUNS = 1u;
const ELEMENT_CODED = false;
const ELEMENT_SCALE = 0u;
const ELEMENT_SPLIT = true; // One f16 does not hold it.

fn element_run_lo(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return v.lo;
}

fn element_run_hi(v: Element8, run: u32, scale: u32) -> vec4<f32> {
    return v.hi;
}
