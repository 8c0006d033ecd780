// uses: softmax_state
// Merge: attention output of a row from the partials of the splits that it sees.
//
// One workgroup merges one head of one row. All lanes look for the largest score of the partials, and weigh
// each partial once; then lanes with four channels each go over the partials, GROUPS of them side by side,
// in the row's fixed order. The sums of the GROUPS meet in workgroup memory. How many there are follows from
// the width of a head alone.

struct Params {
    n_rows: u32,
    n_heads: u32,
    head_dim: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> ranges: array<u32>;              // [n_rows + 1]
@group(0) @binding(2) var<storage, read> order: array<u32>;               // [n_pairs]
@group(0) @binding(3) var<storage, read> partial: array<vec4<f32>>;       // [n_pairs, n_heads, HEAD_DIM]
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;         // [n_pairs, n_heads]: max, sum
@group(0) @binding(5) var<storage, read_write> y: array<vec4<f32>>;       // [n_rows, n_heads, HEAD_DIM]

const WIDTH = HEAD_DIM / 4u;
const GROUPS = LANES / WIDTH;
const MOST = 512u; // Partials that are weighed at once.

var<workgroup> places: array<u32, MOST>;
var<workgroup> weights: array<f32, MOST>;
var<workgroup> sums: array<vec4<f32>, LANES>;
// A number of each subgroup, which have four lanes or more.
var<workgroup> bests: array<f32, LANES / 4u>;
var<workgroup> totals: array<f32, LANES / 4u>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    let lane = local.x;
    let begin = ranges[group.x];
    let end = ranges[group.x + 1u];
    var best = NEG_LARGE;
    for (var i = begin + lane; i < end; i += LANES) {
        best = max(best, stats[order[i] * params.n_heads + group.y].x);
    }
    best = subgroupMax(best);
    if subgroup_lane == 0u {
        bests[subgroup] = best;
    }
    workgroupBarrier();
    for (var i = 0u; i < num_subgroups; i++) {
        best = max(best, bests[i]);
    }

    var total = 0.0;
    var sum = vec4<f32>();
    for (var first = begin; first < end; first += MOST) {
        let n = min(MOST, end - first);
        for (var i = lane; i < n; i += LANES) {
            let at = order[first + i] * params.n_heads + group.y;
            let of_partial = stats[at];
            let weight = softmax_rescale(of_partial.x, best);
            places[i] = at * WIDTH;
            weights[i] = weight;
            total = fma(of_partial.y, weight, total);
        }
        workgroupBarrier();
        if lane < GROUPS * WIDTH {
            for (var i = lane / WIDTH; i < n; i += GROUPS) {
                sum = fma(vec4<f32>(weights[i]), partial[places[i] + lane % WIDTH], sum);
            }
        }
        workgroupBarrier();
    }
    sums[lane] = sum;
    total = subgroupAdd(total);
    if subgroup_lane == 0u {
        totals[subgroup] = total;
    }
    workgroupBarrier();
    if lane < WIDTH {
        total = 0.0;
        for (var i = 0u; i < num_subgroups; i++) {
            total += totals[i];
        }
        sum = vec4<f32>();
        for (var i = lane; i < GROUPS * WIDTH; i += WIDTH) {
            sum += sums[i];
        }
        y[(group.x * params.n_heads + group.y) * WIDTH + lane] = sum / total;
    }
}
