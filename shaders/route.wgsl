// Routing: which experts a row chooses, and with what weight. One workgroup serves one row.
//
// An expert is chosen if fewer than `top_k` others score higher (of equals, the lower index wins), so that
// no sorting is needed: every lane ranks its own experts. With groups, the best `top_groups` of them compete
// first, by the sum of their two best scores. The bias decides the choice, never the weight.

struct Params {
    n_rows: u32,
    n_experts: u32,
    top_k: u32,
    sigmoid: u32,
    normalise: u32,
    scale: f32,
    n_groups: u32,
    top_groups: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;          // [n_rows, n_experts]
@group(0) @binding(2) var<storage, read> bias: array<f32>;            // [n_experts]
@group(0) @binding(3) var<storage, read_write> chosen: array<u32>;    // [n_rows, top_k]: experts, ascending
@group(0) @binding(4) var<storage, read_write> gates: array<f32>;     // [n_rows, top_k]

var<workgroup> scores: array<f32, EXPERTS>; // What the weight is made of.
var<workgroup> ranked: array<f32, EXPERTS>; // What the choice is made by.
var<workgroup> group_scores: array<f32, EXPERTS>;
var<workgroup> takes: array<u32, EXPERTS>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let row = group.x * params.n_experts;
    var best = NEG_LARGE;
    for (var e = 0u; e < params.n_experts; e++) {
        best = max(best, logits[row + e]);
    }
    for (var e = local.x; e < params.n_experts; e += 64u) {
        let logit = logits[row + e];
        if params.sigmoid == 1u {
            scores[e] = 1.0 / (1.0 + exp(-max(logit, -80.0)));
            ranked[e] = scores[e] + bias[e];
        } else {
            scores[e] = exp(logit - best);
            ranked[e] = logit;
        }
    }
    workgroupBarrier();

    let size = params.n_experts / params.n_groups;
    for (var g = local.x; g < params.n_groups; g += 64u) {
        var first = NEG_LARGE;
        var second = NEG_LARGE;
        for (var e = g * size; e < (g + 1u) * size; e++) {
            second = max(second, min(first, ranked[e]));
            first = max(first, ranked[e]);
        }
        group_scores[g] = first + second;
    }
    workgroupBarrier();
    if params.top_groups < params.n_groups {
        for (var e = local.x; e < params.n_experts; e += 64u) {
            let mine = e / size;
            var rank = 0u;
            for (var g = 0u; g < params.n_groups; g++) {
                let higher = group_scores[g] > group_scores[mine];
                let equal = group_scores[g] == group_scores[mine] && g < mine;
                rank += select(0u, 1u, higher || equal);
            }
            // What is out of the running scores zero, as in the published code, and not less.
            takes[e] = select(0u, 1u, rank < params.top_groups);
        }
        workgroupBarrier();
        for (var e = local.x; e < params.n_experts; e += 64u) {
            ranked[e] = select(0.0, ranked[e], takes[e] == 1u);
        }
    }
    workgroupBarrier();

    for (var e = local.x; e < params.n_experts; e += 64u) {
        var rank = 0u;
        for (var other = 0u; other < params.n_experts; other++) {
            let higher = ranked[other] > ranked[e];
            let equal = ranked[other] == ranked[e] && other < e;
            rank += select(0u, 1u, higher || equal);
        }
        takes[e] = select(0u, 1u, rank < params.top_k);
    }
    workgroupBarrier();

    if local.x == 0u {
        var total = 0.0;
        var sum = 0.0;
        for (var e = 0u; e < params.n_experts; e++) {
            total += scores[e];
            sum += select(0.0, scores[e], takes[e] == 1u);
        }
        // A softmax is divided by its sum; what is normalised, by that of the chosen.
        var divisor = select(total, 1.0, params.sigmoid == 1u);
        if params.normalise == 1u {
            divisor = select(sum, sum + 1e-20, params.sigmoid == 1u);
        }
        var n = 0u;
        for (var e = 0u; e < params.n_experts; e++) {
            // Numbers that are none rank anywhere; no more than top_k are stored.
            if takes[e] == 1u && n < params.top_k {
                chosen[group.x * params.top_k + n] = e;
                gates[group.x * params.top_k + n] = scores[e] / divisor * params.scale;
                n++;
            }
        }
    }
}
