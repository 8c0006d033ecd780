// uses: softmax_state
// Merge: attention output of a row from the partials of the splits that it sees.
//
// One workgroup merges one head of one row; each lane goes over all partials for its channels, in the
// row's fixed order: first for the largest score, then for the weighted sums.

struct Params {
    n_rows: u32,
    n_heads: u32,
    head_dim: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> ranges: array<u32>;              // [n_rows + 1]
@group(0) @binding(2) var<storage, read> order: array<u32>;               // [n_pairs]
@group(0) @binding(3) var<storage, read> partial: array<f32>;             // [n_pairs, n_heads, HEAD_DIM]
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;         // [n_pairs, n_heads]: max, sum
@group(0) @binding(5) var<storage, read_write> y: array<f32>;             // [n_rows, n_heads, HEAD_DIM]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let begin = ranges[group.x];
    let end = ranges[group.x + 1u];
    var best = NEG_LARGE;
    for (var i = begin; i < end; i++) {
        best = max(best, stats[order[i] * params.n_heads + group.y].x);
    }
    for (var d = local.x; d < HEAD_DIM; d += 64u) {
        var total = 0.0;
        var sum = 0.0;
        for (var i = begin; i < end; i++) {
            let at = order[i] * params.n_heads + group.y;
            let weight = softmax_rescale(stats[at].x, best);
            total = fma(stats[at].y, weight, total);
            sum = fma(partial[at * HEAD_DIM + d], weight, sum);
        }
        y[(group.x * params.n_heads + group.y) * HEAD_DIM + d] = sum / total;
    }
}
