// Eight weights times eight numbers, summed in a fixed order. A sum of such sums errs less than one long
// chain: a lane of a small subgroup adds up thousands of products.
fn dot8(lo: vec4<f32>, hi: vec4<f32>, a: vec4<f32>, b: vec4<f32>) -> f32 {
    var sum = lo.x * a.x;
    sum = fma(lo.y, a.y, sum);
    sum = fma(lo.z, a.z, sum);
    sum = fma(lo.w, a.w, sum);
    sum = fma(hi.x, b.x, sum);
    sum = fma(hi.y, b.y, sum);
    sum = fma(hi.z, b.z, sum);
    return fma(hi.w, b.w, sum);
}

// A run of eight weights of each of four rows, as floats, and the rows' scales there.
struct Quad {
    lo0: vec4<f32>,
    hi0: vec4<f32>,
    lo1: vec4<f32>,
    hi1: vec4<f32>,
    lo2: vec4<f32>,
    hi2: vec4<f32>,
    lo3: vec4<f32>,
    hi3: vec4<f32>,
    scale: vec4<f32>,
}

// Run `run` of four loads, one of each row; it is run `at` of the rows, which have `n_groups` scales each.
fn quad_run(w: array<Weight8, 4>, run: u32, rows: vec4<u32>, at: u32, n_groups: u32) -> Quad {
    var s = vec4<u32>();
    var q: Quad;
    q.scale = vec4<f32>(1.0);
    if WEIGHT_CODED {
        let group = at / GROUP;
        s = vec4<u32>(
            scales[rows.x * n_groups + group],
            scales[rows.y * n_groups + group],
            scales[rows.z * n_groups + group],
            scales[rows.w * n_groups + group],
        );
        q.scale = bitcast<vec4<f32>>(s & vec4<u32>(WEIGHT_SCALE));
    }
    q.lo0 = weight_run_lo(w[0], run, s.x);
    q.hi0 = weight_run_hi(w[0], run, s.x);
    q.lo1 = weight_run_lo(w[1], run, s.y);
    q.hi1 = weight_run_hi(w[1], run, s.y);
    q.lo2 = weight_run_lo(w[2], run, s.z);
    q.hi2 = weight_run_hi(w[2], run, s.z);
    q.lo3 = weight_run_lo(w[3], run, s.w);
    q.hi3 = weight_run_hi(w[3], run, s.w);
    return q;
}

// The four rows' sums so far, and their products with eight numbers.
fn quad_add(sums: vec4<f32>, q: Quad, a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    let dots = vec4<f32>(
        dot8(q.lo0, q.hi0, a, b),
        dot8(q.lo1, q.hi1, a, b),
        dot8(q.lo2, q.hi2, a, b),
        dot8(q.lo3, q.hi3, a, b),
    );
    return fma(dots, q.scale, sums);
}
