// Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight.
//
// One workgroup normalises one row. Lanes sum their strided part; the 64 partial sums meet in workgroup
// memory and every lane adds them up in the same order. The mean runs over `count` elements: what lies
// between `count` and `dim` is zero.

struct Params {
    n_rows: u32,
    dim: u32,
    count: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;               // [n_rows, dim]
@group(0) @binding(2) var<storage, read> weight: array<f32>;          // [dim]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;         // [n_rows, dim]

var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let row = group.x * params.dim;
    var sum = 0.0;
    for (var i = local.x; i < params.dim; i += 64u) {
        sum = fma(x[row + i], x[row + i], sum);
    }
    sums[local.x] = sum;
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < 64u; i++) {
        total += sums[i];
    }
    let scale = 1.0 / sqrt(total / f32(params.count) + params.eps);
    for (var i = local.x; i < params.dim; i += 64u) {
        y[row + i] = x[row + i] * scale * weight[i];
    }
}
